"""A run small enough to be killed often: two layers with dropout and drawn negatives, on a mixture of two sources."""

import multiprocessing
import random
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blip2.data.order import mixture_draw
from blip2.training.loop import Job, Summary, train
from blip2.training.recipe import apply_overrides, parse_recipe
from blip2.training.sections import Recipe

RECIPE = """
stage: stage1
name: tiny
seed: 3
data: {mixture: [{split: pairs, weight: 2}, {split: scenes, weight: 1}]}
optimizer: {learning_rate: 1e-2, min_learning_rate: 1e-3, warmup_learning_rate: 1e-3, warmup_steps: 10}
training:
  {steps: 60, batch_size: 8, log_every: 7, checkpoint_every: 10, evaluate_every: 25, precision: float32, threads: 1}
"""
SIZES = (37, 11)  # of the two sources; no multiples of the batch size, so that epochs end inside a batch
WIDTH = 8


class TinyModel(nn.Module):
    """Fits the sum of its inputs; draws dropout and one negative a sample, and has a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.bridge = nn.Sequential(
            nn.Linear(WIDTH, 16), nn.GELU(), nn.Dropout(0.2), nn.LayerNorm(16), nn.Linear(16, 1)
        )

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        given = self.bridge(self.frozen(inputs)).float()  # (B, 1)
        negatives = torch.multinomial(torch.ones(len(inputs)), len(inputs), replacement=True)  # (B,)
        fit = (given - inputs.sum(dim=-1, keepdim=True)).square().mean()
        margin = (1 - given + given[negatives]).relu().mean()
        return {"loss": fit + 0.1 * margin, "fit": fit, "margin": margin}


def tiny_recipe(*overrides: str) -> Recipe:
    """The recipe of the tiny run, changed by settings such as "training.steps=20"."""
    return apply_overrides(parse_recipe(RECIPE, "tiny.yaml"), overrides)


def sample(source: int, index: int) -> Tensor:
    """The inputs of one sample, (WIDTH,)."""
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(1000 * source + index))


def sample_ids(recipe: Recipe, batch: int) -> list[tuple[int, int]]:
    """(source, index) of each sample of a batch."""
    size = recipe.training.micro_batch_size
    weights = [item.weight for item in recipe.data.mixture]
    draws = [mixture_draw(recipe.seed, batch * size + place, weights, SIZES) for place in range(size)]
    return [(draw.source, draw.index) for draw in draws]


def tiny_job(recipe: Recipe, module: nn.Module | None = None, **changes: Any) -> Job:
    """The job of the tiny run, with another module or other parts if given."""
    module = module or TinyModel()

    def batches(index: int) -> Tensor:
        return torch.stack([sample(*place) for place in sample_ids(recipe, index)])  # (B, WIDTH)

    def evaluate() -> dict[str, float]:
        return {"held_out_fit": float(module(torch.stack([sample(2, index) for index in range(5)]))["fit"])}

    parts = {"module": module, "batches": batches, "evaluators": [(recipe.training.evaluate_every, evaluate)]}
    return Job(**{**parts, **changes})


def run_tiny(run_dir: Path, overrides: Iterable[str] = (), tell: Connection | None = None) -> Summary:
    """Trains the tiny run in this process; `tell` receives the number of each batch as it is read."""
    recipe = tiny_recipe(*overrides)
    job = tiny_job(recipe)
    if tell:
        job.batches = telling(job.batches, tell)
    return train(job, recipe, run_dir)


def start_process(target: Callable, *arguments: Any) -> tuple[multiprocessing.Process, Connection]:
    """A process of its own, quickly: forked from a server that has imported torch already; and what it tells."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["blip2.training.loop"])
    listen, tell = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*arguments, tell))
    process.start()
    tell.close()
    return process, listen


def kill_five_times(seed: int | str, target: Callable, *arguments: Any) -> int:
    """Starts the target in a process of its own and kills it after a batch or two, five times; how often that hit."""
    chance = random.Random(seed)
    killed = 0
    for _ in range(5):
        process, listen = start_process(target, *arguments)
        try:
            for _ in range(chance.randrange(1, 3)):
                listen.recv()
        except EOFError:
            pass
        process.kill()
        process.join()
        killed += process.exitcode == -9
    return killed


def telling(batches: Callable[[int], Any], tell: Connection) -> Callable[[int], Any]:
    """The same batches; `tell` receives the number of each as it is read."""

    def told(index: int) -> Any:
        tell.send(index)
        return batches(index)

    return told
