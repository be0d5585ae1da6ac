"""One token of a decoder LLM as work of one fixed shape, so that a GPU can record it once and replay it.

A step at batch 1 is some thousand kernels of microseconds each, and launching them takes longer than running them.
Here keys and values lie in buffers of a fixed length, the new token's place is a number on the device, the mask says
what is filled: nothing changes shape between two tokens, so the whole step becomes a CUDA graph, one launch. Rows and
lengths are rounded up to sizes of which each is recorded once, at its first use.

    Reading.cache ── bind ──▶ a recorded step's buffers ── replayed for each token ── release ──▶ Reading.cache
                              (rows join, leave or change places: released, then bound again)
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from blip2.model.key_values import RoomyLayer, is_roomy

if TYPE_CHECKING:
    from blip2.model.language import Reading

LENGTHS = 128  # buffers are a multiple of this long
MOST_ROWS = 256  # more are not replayed: launching is no longer what takes the time


class _FixedLayer(DynamicLayer):
    """Keys and values in buffers of fixed length; a new token's are written at `slot`, and all are given back."""

    def __init__(self, keys: Tensor, values: Tensor, slot: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True
        self._slot = slot  # (1,)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, self._slot, key_states)
        self.values.index_copy_(2, self._slot, value_states)
        return self.keys, self.values


class FixedStep:
    """A step of `rows` rows over `length` positions; recorded where there is a GPU, else run as it is.

    Attributes:
        rows, length: the sizes it was made for; a reading may have fewer of both.
        reading: the reading that is bound to it, if any.
        num_filled: how many positions of it are read.
    """

    def __init__(self, model: Any, cache: DynamicCache, rows: int, length: int) -> None:
        """Buffers shaped as `cache`'s layers, which is not changed; records the step."""
        layers: list[Any] = cache.layers
        device = layers[0].keys.device
        self.rows, self.length = rows, length
        self.reading: Reading | None = None
        self.num_filled = 0
        self._model = model
        self._token_ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._positions = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._mask = torch.zeros(rows, 1, 1, length, dtype=torch.bool, device=device)
        self._slot = torch.zeros(1, dtype=torch.long, device=device)
        self._layers: list[_FixedLayer] = []
        for layer in layers:
            shape = (rows, layer.keys.shape[1], length)
            keys, values = (states.new_zeros(*shape, states.shape[3]) for states in (layer.keys, layer.values))
            self._layers.append(_FixedLayer(keys, values, self._slot))
        self._cache = DynamicCache()
        self._cache.layers.extend(self._layers)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        if device.type == "cuda":
            self._record()

    def bind(self, reading: "Reading") -> None:
        """Takes a reading's keys and values over; whoever was bound gets its own back."""
        if self.reading is not None:
            self.reading.release()
        rows, length = len(reading.mask), reading.cache.layers[0].keys.shape[2]
        self._mask.zero_()
        self._mask[:rows, 0, 0, :length] = reading.mask[:, :length].bool()
        for own, layer in zip(self._layers, reading.cache.layers, strict=True):
            for buffer, states in ((own.keys, layer.keys), (own.values, layer.values)):
                assert buffer is not None
                buffer[:rows, :, :length] = states
        self.reading, self.num_filled = reading, length
        reading.bound = self

    def give_back(self) -> None:
        """Copies what is filled back into the bound reading's own cache."""
        reading = self.reading
        assert reading is not None
        rows, length = len(reading.mask), self.num_filled
        layers: list[RoomyLayer] = reading.cache.layers
        for own, layer in zip(self._layers, layers, strict=True):
            assert own.keys is not None and own.values is not None
            layer.put(own.keys[:rows, :, :length].clone(), own.values[:rows, :, :length].clone())
        self.reading = reading.bound = None

    def run(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, V) float32 after the tokens (B,), at the last position of the mask (B, L)."""
        rows, place = len(token_ids), mask.shape[1] - 1
        self.num_filled = place + 1
        self._token_ids[:rows, 0] = token_ids
        self._positions[:rows, 0] = mask.sum(dim=1) - 1
        self._slot.fill_(place)
        self._mask.index_fill_(3, self._slot, True)
        if self._graph is None:
            return self._forward()[:rows]
        assert self._logits is not None
        self._graph.replay()
        return self._logits[:rows].clone()

    def _forward(self) -> Tensor:
        return (
            self._model(
                input_ids=self._token_ids,
                position_ids=self._positions,
                attention_mask=self._mask,
                past_key_values=self._cache,
                use_cache=True,
                return_dict=True,
            )
            .logits[:, -1]
            .float()
        )

    def _record(self) -> None:
        self._mask[..., 0] = True
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries choose their kernels before anything is recorded
                self._forward()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._forward()


class Replay:
    """The recorded steps of one LLM."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._steps: dict[tuple[int, int], FixedStep] = {}

    @staticmethod
    def can_take(model: Any, *, takes_positions: bool) -> bool:
        """Whether a model's step can have a fixed shape: one attention that takes a ready mask, positions as given."""
        config = model.config.get_text_config()
        return takes_positions and config._attn_implementation == "sdpa" and not hasattr(model, "hf_device_map")

    def takes(self, reading: "Reading") -> bool:
        """Whether this reading's next step can be replayed."""
        return reading.encoded is None and is_roomy(reading.cache) and len(reading.mask) <= MOST_ROWS

    def logits(self, reading: "Reading", token_ids: Tensor) -> Tensor:
        """Logits (B, V) float32 after the tokens (B,); the reading's mask counts them already."""
        length = reading.mask.shape[1]
        step = reading.bound
        if step is None or step.length < length:
            reading.release()
            step = self._step(reading, length)
            step.bind(reading)
        return step.run(token_ids, reading.mask)

    def _step(self, reading: "Reading", length: int) -> FixedStep:
        rows = 1 << (len(reading.mask) - 1).bit_length()
        size = (rows, -(-length // LENGTHS) * LENGTHS)
        if size not in self._steps:
            self._steps[size] = FixedStep(self._model, reading.cache, *size)
        return self._steps[size]
