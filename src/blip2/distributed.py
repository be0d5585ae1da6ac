"""The processes of one run: who this one is, and what they tell each other. On one process all of it does nothing.

    torchrun --nproc-per-node 4 -m blip2 train RECIPE      four ranks; each computes a quarter of every batch

R ranks; a rank holds B rows of a batch, the world W = R * B, rank by rank in the order of the batch. What is gathered
"with gradient" hands the gradients of all ranks back to the rank that a row came from, so that training on R ranks
computes what one process with the whole batch computes.
"""

import datetime
import os
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from blip2.errors import UserError

PATIENCE = datetime.timedelta(hours=2)  # of a collective: one rank may be evaluating or loading; hangs are watched for
MEETING = datetime.timedelta(minutes=10)  # until all ranks must have come, from the start of one
SEE_ABOVE = "What went wrong there stands in its own output."
LOOKS_EVERY = 0.02  # seconds, the first rank for the others


def rank() -> int:
    """This process's number among the run's, 0 ... world_size() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """R, the number of the run's processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes and reports."""
    return rank() == 0


def is_launched() -> bool:
    """Whether torchrun, or something that speaks as it does, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined() -> Iterator[None]:
    """Inside, this process is one of those that torchrun started together; alone, nothing happens.

    With GPUs each rank takes the one of its LOCAL_RANK, and they speak NCCL (and gloo about what lies on the CPU).

    Raises:
        UserError: not all ranks came within MEETING.
    """
    if not is_launched() or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store, rank, size = next(rendezvous("env://", timeout=MEETING))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=PrefixStore(meet(store, rank, size), store),
        rank=rank,
        world_size=size,
        timeout=PATIENCE,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def meet(store: Store, rank: int, size: int, patience: datetime.timedelta = MEETING) -> str:
    """A name that all ranks of this start have in common, and no other start has.

    After a failure torchrun starts all ranks again with the store of before, in which the addresses of the dead still
    stand; who read one would wait for it. Starts cannot be counted either: each machine's torchrun counts its own
    failures (https://github.com/pytorch/pytorch/issues/135712). So each process makes up a name, and the first rank
    answers names, not ranks, with its own, until every rank has said that it has that one.

    Raises:
        UserError: not all ranks came in time.
    """
    mine, here = uuid.uuid4().hex, f"rank {rank}"
    if rank:
        store.set(here, mine)
        try:
            store.wait([mine], patience)
        except dist.DistError:
            raise UserError(f"Rank {rank} waited for rank 0 for {patience}, in vain. {SEE_ABOVE}") from None
        name = store.get(mine).decode()
        store.set(f"{name} {here}", "")
        return name
    others, deadline = range(1, size), time.monotonic() + patience.total_seconds()
    while missing := [other for other in others if not store.check([f"{mine} rank {other}"])]:
        for other in missing:
            if store.check([f"rank {other}"]):
                store.set(store.get(f"rank {other}").decode(), mine)
        if time.monotonic() > deadline:
            raise UserError(f"Of the {size} ranks, {missing} did not come within {patience}. {SEE_ABOVE}")
        time.sleep(LOOKS_EVERY)
    return mine


def launch_again(processes: int) -> None:
    """Becomes torchrun, which starts this command so many times on this machine; does not return.

    Raises:
        UserError: there are GPUs, but not as many.
    """
    if 0 < (there := torch.cuda.device_count()) < processes:
        raise UserError(f"--devices is {processes}, and this machine has {there} GPUs.")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    os.execv(sys.executable, [*torchrun, "-m", "blip2", *sys.argv[1:]])


# Numbers about the whole world


def summed(values: Tensor) -> Tensor:
    """The sum of `values` over all ranks, without gradient."""
    if world_size() == 1:
        return values.detach()
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


def share_of(count: Tensor) -> Tensor:
    """What a rank divides its sum over `count` items by, so that the mean over ranks is the mean over all items.

    The items of all ranks over R; on one process, `count` itself.
    """
    return summed(count.float()) / world_size()


def wait_for_all() -> None:
    """Returns when every rank has come here."""
    if world_size() > 1:
        dist.barrier()


@contextmanager
def first_goes_first() -> Iterator[None]:
    """Inside, the first rank is alone until it has ended; then come the others, who find its work done."""
    if not is_first():
        wait_for_all()
    yield
    if is_first():
        wait_for_all()


def said_by_first(value: Any) -> Any:
    """What the first rank gives, on every rank; plain values only."""
    if world_size() == 1:
        return value
    said = [value]
    dist.broadcast_object_list(said)
    return said[0]


# Rows of all ranks


def gather(rows: Tensor) -> Tensor:
    """The rows (B, ...) of all ranks, (W, ...), rank by rank; without gradient. B is the same on all."""
    if world_size() == 1:
        return rows.detach()
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.detach().contiguous())
    return torch.cat(parts)


def gather_with_gradient(rows: Tensor) -> Tensor:
    """The rows (B, ...) of all ranks, (W, ...); a row's gradients from all ranks come back to it, added up."""
    return rows if world_size() == 1 else _Gather.apply(rows)


def gather_padded(rows: Tensor, fill: int) -> Tensor:
    """Token rows (B, T) of all ranks, (W, longest T), shorter ones filled up on the right; without gradient."""
    if world_size() == 1:
        return rows
    longest = torch.tensor(rows.shape[1], device=rows.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return gather(torch.nn.functional.pad(rows, (0, int(longest) - rows.shape[1]), value=fill))


def fetch_rows(rows: Tensor, wanted: Tensor) -> Tensor:
    """Rows of the world by their numbers; only these travel, and their gradients travel back.

    Args:
        rows: (B, ...) of this rank.
        wanted: (M,) numbers in 0 ... W - 1, of rows of any rank; M may differ between ranks.

    Returns:
        (M, ...).
    """
    if world_size() == 1:
        return rows.index_select(0, wanted)
    asked = _asked_of_each(wanted, len(rows))
    return _Fetch.apply(rows, wanted, asked)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.size = len(rows)
        return gather(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        first = rank() * ctx.size
        return summed(gradients[0].contiguous())[first : first + ctx.size]


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, wanted: Tensor, asked: Sequence[Tensor]) -> Tensor:
        by_rank = wanted.argsort(stable=True)  # (M,) places of `wanted`, in the order in which the ranks answer
        incoming = torch.bincount(wanted // len(rows), minlength=world_size()).tolist()
        ctx.by_rank, ctx.asked, ctx.incoming, ctx.size = by_rank, torch.cat(list(asked)), incoming, len(rows)
        ctx.outgoing = [len(part) for part in asked]
        received = _exchanged(rows.index_select(0, ctx.asked), ctx.outgoing, incoming)
        fetched = torch.empty_like(received)
        fetched[by_rank] = received
        return fetched

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        returned = _exchanged(gradients[0].index_select(0, ctx.by_rank), ctx.incoming, ctx.outgoing)
        total = returned.new_zeros(ctx.size, *returned.shape[1:])
        return total.index_add_(0, ctx.asked, returned), None, None


def _asked_of_each(wanted: Tensor, size: int) -> list[Tensor]:
    """Which of this rank's rows each rank wants, as row numbers here, in ascending order."""
    counts = gather(torch.tensor([len(wanted)], device=wanted.device))  # (R,)
    padded = torch.nn.functional.pad(wanted, (0, int(counts.max()) - len(wanted)), value=-1)
    everyone = gather(padded[None])  # (R, longest M)
    ordered = everyone.sort(dim=1).values
    first = rank() * size
    return [row[(row >= first) & (row < first + size)] - first for row in ordered]


def _exchanged(rows: Tensor, outgoing: list[int], incoming: list[int]) -> Tensor:
    """Sends outgoing[r] rows to each rank r in turn, and receives incoming[r] from it."""
    received = rows.new_empty(sum(incoming), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), incoming, outgoing)
    return received
