"""Several processes that speak gloo, as torchrun would start them, each running one function of a test."""

import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from blip2 import distributed


def on_ranks(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns on each of `count` ranks; `work` is a module's function."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("forkserver")
    context.set_forkserver_preload(["blip2.training.loop"])
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        futures = [pool.submit(_run, rank, count, port, work, arguments) for rank in range(count)]
        return [future.result() for future in futures]


def _run(rank: int, count: int, port: int, work: Callable[..., Any], arguments: tuple) -> Any:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    with distributed.joined():
        return work(*arguments)
