"""One optimiser step over all ranks: backward in parts, norm, clip, AdamW; or nothing, where that would do harm.

Gradients and losses are averaged over the ranks before anything is decided, so that all decide the same.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from blip2 import distributed
from blip2.training.averages import RunningAverage
from blip2.training.devices import moved
from blip2.training.optimizer import learning_rate
from blip2.training.sections import Recipe
from blip2.training.sharding import not_yet_averaged

STEPS_TO_KNOW_NORMS = 50  # before which no gradient counts as unusually long


@dataclass(frozen=True)
class StepOutcome:
    """What a step came to, over all ranks.

    Attributes:
        metrics: the means of what the module gives, and the gradient's norm.
        fault: why the step changed nothing; "" where it did.
        is_told_to_stop: whether any rank was.
    """

    metrics: dict[str, float]
    fault: str
    is_told_to_stop: bool


class Stepper:
    """Makes the steps of a run.

    Args:
        module: forward(batch) gives scalars by name, as `loop.Job` says; wrapped for the ranks already.
        optimizer: over the module's trainable parameters.
        average: their running average; None for none.
        recipe: of the run.
        precision: float32 or bfloat16, of the matrix products.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: RunningAverage | None,
        recipe: Recipe,
        precision: str,
    ) -> None:
        self.module, self.optimizer, self.average = module, optimizer, average
        self.recipe, self.precision = recipe, precision
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.device = self.parameters[0].device

    def make(
        self, step: int, batches: list[Any], usual_norm: float, is_told_to_stop: Callable[[], bool]
    ) -> StepOutcome:
        """One step, or none where loss or gradient are not finite or the gradient is unusually long.

        Args:
            step: counted from 0.
            batches: the step's parts, of this rank.
            usual_norm: of the gradient so far.
            is_told_to_stop: tells whether this rank was; asked when the step is nearly over.
        """
        section = self.recipe.optimizer
        seed_step(self.recipe.seed, step, distributed.rank())
        losses = self._backward(batches)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        metrics, told_any = self._averaged(losses, is_told_to_stop())
        metrics["grad_norm"] = float(norm)
        fault = self._fault(step, metrics, usual_norm)
        if not fault:
            if section.max_grad_norm:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, section.max_grad_norm, norm)
            rate = learning_rate(step, section, self.recipe.training.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["layer_share"]
            self.optimizer.step()
            if self.average:
                self.average.update()
        self.optimizer.zero_grad(set_to_none=True)
        return StepOutcome(metrics, fault, told_any)

    def _backward(self, batches: list[Any]) -> dict[str, Tensor]:
        """Gradients of the mean loss of a step's parts; returns the means of what the module gives on this rank."""
        total: dict[str, Tensor] = {}
        for number, batch in enumerate(batches, start=1):
            with not_yet_averaged(self.module, is_last=number == len(batches)):
                with self._autocast():
                    losses = self.module(moved(batch, self.device))
                (losses["loss"] / len(batches)).backward()
            for name, value in losses.items():
                part = value.detach().float() / len(batches)
                total[name] = total[name] + part if name in total else part
        return total

    def _averaged(self, losses: dict[str, Tensor], is_told_to_stop: bool) -> tuple[dict[str, float], bool]:
        """The means over the ranks, and whether any rank was told to stop: one exchange for both."""
        told = torch.tensor(float(is_told_to_stop), device=self.device)
        summed = distributed.summed(torch.stack([*losses.values(), told])) / distributed.world_size()
        *means, told_any = summed.tolist()
        return dict(zip(losses, means, strict=True)), told_any > 0

    def _fault(self, step: int, metrics: dict[str, float], usual_norm: float) -> str:
        """Why the step must change nothing; "" where it may."""
        norm, most = metrics["grad_norm"], self.recipe.training.skip_spikes
        if not (math.isfinite(metrics["loss"]) and math.isfinite(norm)):
            return f"{', '.join(name for name, value in metrics.items() if not math.isfinite(value))} not finite"
        if most and step >= STEPS_TO_KNOW_NORMS and norm > most * usual_norm:
            return f"grad_norm {norm:.3g} is {norm / usual_norm:.0f} times the usual"
        return ""

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Sets torch's generators to what follows from the run's seed, the step and the rank alone."""
    entropy = [seed, step, rank] if rank else [seed, step]
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))
