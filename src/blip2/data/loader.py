"""Items read and decoded ahead by worker processes, and given in order.

    consumer --positions--> one pipe; an idle worker takes the next       (a slow picture holds up no other)
    worker   --items------> a pipe each, to a thread that keeps the items (a worker never waits to be heard)

What stands at a position depends on `read` alone, so any number of workers gives the same items. Processes and not
threads: decoding releases Python's lock but what is around it does not, and the training loop wants that lock as well.
They are forked, so `read` may be a closure over anything. A fork is safe here because a child takes part in nothing of
the parent's threads: it uses no intra-operation threads of torch (set to 1 in it; OpenMP's do not survive a fork), no
CUDA, no lock that the parent might have held. Make the loader before the first use of a GPU all the same.
"""

import contextlib
import io
import mmap
import multiprocessing
import os
import pickle
import signal
import struct
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from multiprocessing import connection
from types import TracebackType
from typing import Any, Generic, TypeVar

from blip2.errors import Blip2Error, UserError

T = TypeVar("T")

MOST_AHEAD = 2048  # tasks of 16 bytes that fit into a pipe of the smallest usual size (64 kB), twice
_TASK = struct.Struct("<qq")  # which stream, position
_HEAD = struct.Struct("<qq?IQ")  # stream, position, whether it went well, number of buffers, bytes of the pickle
_LENGTH = struct.Struct("<Q")  # bytes of a buffer
_PIPE_BYTES = 1 << 20  # of a worker's pipe, where the system lets it be chosen: fewer turns for a picture
_STOP_SECONDS = 2.0


class LoaderFailed(Blip2Error):
    """A worker ended before its time, or its item cannot be sent."""


class OrderedLoader(Generic[T]):
    """Reads items in worker processes; use as a context manager, or close it.

    The workers start with the first `stream` and serve all further ones. They end with `close`, with the program, and
    when the program is killed.
    """

    def __init__(self, read: Callable[[int], T], *, workers: int, ahead: int) -> None:
        """Nothing is started yet.

        Args:
            read: gives the item at a position. With workers it runs in a forked process: give it no GPU to use, and
                let it return arrays or CPU tensors, which are sent without pickling their contents. What it raises ends
                the stream; bad samples are better returned than raised.
            workers: processes; 0 reads in place, when asked.
            ahead: items read before their turn, at most.
        """
        if workers < 0 or ahead < 1:
            raise ValueError("workers is at least 0, ahead at least 1")
        if workers and "fork" not in multiprocessing.get_all_start_methods():
            raise UserError("Loader workers need processes that fork, which this system lacks. Use 0 workers.")
        self.read, self.workers, self.ahead = read, workers, min(max(ahead, workers), MOST_AHEAD)
        self._crew: _Crew | None = None

    def stream(self, first: int, end: int) -> Iterator[T]:
        """The items first ... end - 1 in order. A stream that another one follows gives nothing more.

        Raises:
            LoaderFailed: a worker was killed.
            Exception: what `read` raised, at its turn; its cause tells where in the worker.
        """
        if not self.workers:
            return map(self.read, range(first, end))
        if self._crew is None:
            self._crew = _Crew(self.read, self.workers)
            weakref.finalize(self, _Crew.close, self._crew)
        return self._ordered(self._crew, first, end)

    def close(self) -> None:
        """Ends the workers; a second time does nothing."""
        if self._crew is not None:
            self._crew.close()
            self._crew = None

    def __enter__(self) -> "OrderedLoader[T]":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()

    def _ordered(self, crew: "_Crew", first: int, end: int) -> Iterator[T]:
        number = crew.begin()
        try:
            asked = min(end, first + self.ahead)
            crew.ask(number, first, asked)
            for position in range(first, end):
                item = crew.take(number, position)
                if asked < end:
                    crew.ask(number, asked, asked + 1)
                    asked += 1
                yield item
        finally:
            crew.end(number)


class _Crew:
    """The workers, their pipes, and the thread that listens to them. Knows nothing of the loader, which may so be
    collected while they run."""

    def __init__(self, read: Callable[[int], Any], workers: int) -> None:
        self._owner = os.getpid()
        self._stream = mmap.mmap(-1, 8)  # number of the stream in use, seen by all processes
        self._number = 0
        self._items: dict[int, tuple[bool, Any]] = {}
        self._failure: LoaderFailed | None = None
        self._is_closed = False
        self._changed = threading.Condition()
        self._asking = threading.Lock()
        self._tasks_out, self._tasks_in = os.pipe()
        self._ears: list[connection.Connection] = []
        self._processes = []
        context = multiprocessing.get_context("fork")
        for _ in range(workers):
            ear, mouth = context.Pipe(duplex=False)
            _widen(ear)
            self._ears.append(ear)
            process = context.Process(
                target=_work,
                args=(read, self._tasks_out, mouth, self._stream, [self._tasks_in], list(self._ears)),
                name="blip2-loader",
                daemon=True,
            )
            # Ended before it has begun, a worker would do what this process does then, with all that this process has.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            mouth.close()  # so that the pipe ends with its worker
            self._processes.append(process)
        os.close(self._tasks_out)
        self._listener = threading.Thread(target=self._listen, name="blip2-loader", daemon=True)
        self._listener.start()

    def begin(self) -> int:
        """The number of a new stream; what was asked for before is forgotten."""
        with self._changed:
            self._number += 1
            self._items.clear()
        self._stream[:] = struct.pack("<q", self._number)
        return self._number

    def end(self, number: int) -> None:
        """Lets the workers skip what is left of a stream."""
        if number == self._number and not self._is_closed:
            self.begin()

    def ask(self, number: int, first: int, end: int) -> None:
        """Has the items first ... end - 1 read."""
        tasks = b"".join(_TASK.pack(number, position) for position in range(first, end))
        with self._asking, contextlib.suppress(OSError):  # no worker is left; `take` says so
            for begin in range(0, len(tasks), 4096):  # each write of that size is one piece for whoever reads
                if not self._is_closed:  # the number of a closed pipe may soon be that of another file
                    os.write(self._tasks_in, tasks[begin : begin + 4096])

    def take(self, number: int, position: int) -> Any:
        """The item, when it is there."""
        with self._changed:
            while True:
                if self._is_closed or number != self._number:
                    raise LoaderFailed("The loader was closed, or another stream was begun, while this one was read.")
                if position in self._items:
                    went_well, item = self._items.pop(position)
                    break
                if self._failure is not None:
                    raise self._failure
                self._changed.wait()
        if not went_well:
            error, told = item
            raise error from LoaderFailed(f"It was raised in a loader worker:\n{told}")
        return item

    def close(self) -> None:
        """Ends all workers, whatever they are doing."""
        if os.getpid() != self._owner:  # a fork's copy, which some collection has come upon
            return
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._changed.notify_all()
        with self._asking:
            os.close(self._tasks_in)
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(_STOP_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
        if self._listener is not threading.current_thread():
            self._listener.join()
        for ear in self._ears:
            ear.close()

    def _listen(self) -> None:
        """Keeps what the workers send until its turn, and notices the end of one."""
        listening = list(self._ears)
        while listening:
            for ear in connection.wait(listening):
                assert isinstance(ear, connection.Connection)
                try:
                    number, position, went_well, item = _receive(ear)
                except (EOFError, OSError):
                    listening.remove(ear)
                    self._note_end(self._ears.index(ear))
                    continue
                except Exception as error:  # an item whose own way of unpickling fails
                    self._fail(f"What a loader worker sent cannot be read: {type(error).__name__}: {error}")
                    continue
                with self._changed:
                    if number == self._number:
                        self._items[position] = (went_well, item)
                        self._changed.notify_all()

    def _note_end(self, worker: int) -> None:
        if self._is_closed:
            return
        process = self._processes[worker]
        process.join(_STOP_SECONDS)
        code = process.exitcode
        how = f"was ended by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        self._fail(
            f"A loader worker (process {process.pid}) {how}. Out of memory is the usual reason: "
            "use fewer workers or a smaller look-ahead, and see the system's log."
        )

    def _fail(self, told: str) -> None:
        with self._changed:
            self._failure = self._failure or LoaderFailed(told)
            self._changed.notify_all()


def _work(
    read: Callable[[int], Any],
    tasks: int,
    mouth: connection.Connection,
    stream: mmap.mmap,
    others: list[int],
    ears: list[connection.Connection],
) -> None:
    """The life of a worker: ends with the pipe of tasks, whose other end the parent alone holds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair, which then ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    for descriptor in others:
        os.close(descriptor)
    for ear in ears:
        ear.close()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the parent is gone
        while task := os.read(tasks, _TASK.size):
            number, position = _TASK.unpack(task)
            if number != int.from_bytes(stream[:], "little"):
                continue
            try:
                item, went_well = read(position), True
            except Exception as error:
                item, went_well = _sendable(error), False
            _send(mouth, number, position, went_well, item)


def _end_with_parent() -> None:
    """Ends a worker whose parent was killed, though it may be in the middle of an item."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _send(mouth: connection.Connection, number: int, position: int, went_well: bool, item: Any) -> None:
    """Sends an item; the contents of arrays and tensors as they are, behind it."""
    buffers: list[pickle.PickleBuffer] = []
    try:
        body = _pickled(item, buffers)
    except Exception as error:
        buffers.clear()
        told = f"An item of type {type(item).__name__} cannot be sent from a loader worker: {error}"
        went_well, body = False, pickle.dumps((LoaderFailed(told), "".join(traceback.format_exception(error))))
    _write(mouth, _HEAD.pack(number, position, went_well, len(buffers), len(body)) + body)
    for buffer in buffers:
        raw = buffer.raw()
        _write(mouth, _LENGTH.pack(raw.nbytes))
        _write(mouth, raw)


def _receive(ear: connection.Connection) -> tuple[int, int, bool, Any]:
    number, position, went_well, count, size = _HEAD.unpack(_read(ear, _HEAD.size))
    body = _read(ear, size)
    buffers = [_read(ear, *_LENGTH.unpack(_read(ear, _LENGTH.size))) for _ in range(count)]
    return number, position, went_well, pickle.loads(body, buffers=buffers)


def _widen(ear: connection.Connection) -> None:
    """A larger pipe than the usual 64 kB, which is less work for each picture."""
    with contextlib.suppress(ImportError, AttributeError, OSError):  # another system; the user's share is used up
        import fcntl

        fcntl.fcntl(ear.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def _write(mouth: connection.Connection, data: bytes | memoryview) -> None:
    """Without the copies that `send_bytes` makes."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(mouth.fileno(), rest) :]


def _read(ear: connection.Connection, size: int) -> bytearray:
    """So many bytes, read to where they stay, and writable as what was sent. Raises EOFError: the worker ended."""
    data = bytearray(size)
    rest = memoryview(data)
    while rest:
        count = os.readv(ear.fileno(), [rest])
        if not count:
            raise EOFError
        rest = rest[count:]
    return data


class _Pickler(pickle.Pickler):
    """Pickles a CPU tensor as the array that shares its memory: torch's own way writes a file of its own."""

    def reducer_override(self, obj: Any) -> Any:
        torch = sys.modules.get("torch")
        if torch is not None and type(obj) is torch.Tensor and obj.device.type == "cpu" and not obj.requires_grad:
            with contextlib.suppress(TypeError):  # a type that NumPy lacks, such as bfloat16
                return torch.from_numpy, (obj.numpy(),)
        return NotImplemented


def _pickled(item: Any, buffers: list[pickle.PickleBuffer]) -> bytes:
    file = io.BytesIO()
    _Pickler(file, protocol=5, buffer_callback=buffers.append).dump(item)
    return file.getvalue()


def _sendable(error: Exception) -> tuple[Exception, str]:
    """An error and where it came from; in words where it is of a kind that cannot be sent."""
    told = "".join(traceback.format_exception(error))
    try:
        again = pickle.loads(pickle.dumps(error))
        if type(again) is type(error):
            return again, told
    except Exception:  # unpickling calls the error's class with arguments it may not take
        pass
    return LoaderFailed(f"{type(error).__name__}: {error}"), told
