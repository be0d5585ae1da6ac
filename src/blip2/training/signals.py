"""SIGTERM, SIGUSR1 and Ctrl-C, turned into a request to stop that the training loop meets between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


class BrokenOff(Exception):
    """Raised inside an evaluation when a signal asks the run to stop."""


class StopSignals(ExitStack):
    """Remembers that SIGTERM, SIGUSR1 or Ctrl-C asked the run to stop; a second Ctrl-C interrupts as usual.

    SIGUSR1 is what schedulers can be told to send some time before they end a job (Slurm: --signal=USR1@120).

    Attributes:
        asked: the signal's name, or an empty string.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked = ""
        self._breaks_off = False

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self.callback(signal.signal, number, signal.signal(number, self._on_signal))
        return self

    @contextmanager
    def breaking_off(self) -> Iterator[None]:
        """Inside, a signal raises BrokenOff at once."""
        self._breaks_off = True
        try:
            yield
        finally:
            self._breaks_off = False

    def _on_signal(self, number: int, _frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
        if self._breaks_off:
            raise BrokenOff
