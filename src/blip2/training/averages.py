"""The running average of a run's weights (EMA): what is judged and exported where a recipe asks for it.

average <- decay * average + (1 - decay) * weights, after every step that changed the weights
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class RunningAverage:
    """The average of a module's trainable parameters, in their own precision."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Starts from the parameters as they are; `decay` in [0, 1)."""
        self.decay = decay
        self._weights = {name: value for name, value in module.named_parameters() if value.requires_grad}
        self._averages = {name: value.detach().clone() for name, value in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes the parameters as they are now in."""
        for name, average in self._averages.items():
            average.lerp_(self._weights[name], 1 - self.decay)

    def state(self) -> dict[str, Tensor]:
        """The averages by parameter name: the live tensors."""
        return dict(self._averages)

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Goes on from saved averages."""
        for name, average in self._averages.items():
            average.copy_(saved[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the module has the averages for weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._weights.items():
            kept = weight.clone()
            weight.copy_(self._averages[name])
            self._averages[name].copy_(kept)
