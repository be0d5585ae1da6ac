"""One token of a decoder LLM as work of one fixed shape, so that a GPU can record it once and replay it.

A step at batch 1 is some thousand kernels of microseconds each, and launching them takes longer than running them.
Here keys and values lie in buffers of a fixed length, the new token's place is a number on the device, the mask says
what is filled: nothing changes shape between two tokens, so the whole step becomes a CUDA graph, one launch. Rows and
lengths are rounded up to sizes of which each is recorded once, at its first use. The graph counts places and opens the
mask itself, so that between two tokens nothing is sent to the GPU but the token.

    Reading.cache ── bind ──▶ a recorded step's buffers ── replayed for each token ── release ──▶ Reading.cache
                              (rows join, leave or change places: released, then bound again)
"""

import logging
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from blip2.model.key_values import RoomyLayer, is_roomy
from blip2.model.recorded import Tape, record, replaying
from blip2.model.row_step import RowStep

if TYPE_CHECKING:
    from blip2.model.reading import Reading

LENGTHS = 64  # buffers are a multiple of this long
MOST_BYTES = 4 << 30  # of the buffers of all steps; those not asked for longest are forgotten
MOST_ROWS = 256  # more are not replayed: launching is no longer what takes the time

_logger = logging.getLogger(__name__)


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
        num_filled: how many positions of the bound reading are read.
        row_step: what reads a token in the model's place, if anything does.
    """

    def __init__(
        self, model: Any, cache: DynamicCache, rows: int, length: int, row_step: RowStep | None = None
    ) -> None:
        """Buffers shaped as `cache`'s layers, which is not changed; records the step.

        Args:
            model: the LLM.
            cache: of a reading that is to be bound.
            rows, length: how large the buffers are.
            row_step: what reads a token of a single row in the model's place.
        """
        layers: list[Any] = cache.layers
        device = layers[0].keys.device
        self.rows, self.length = rows, length
        self.num_filled = 0
        self._model = model
        self.row_step = row_step if rows == 1 else None
        self._reading: weakref.ref[Reading] | None = None
        self._tape: Tape | None = None
        self._logits: Tensor | None = None
        with torch.inference_mode(False), torch.no_grad():  # tensors that any mode may write to
            self._token_ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
            self._positions = torch.zeros(rows, 1, dtype=torch.long, device=device)
            self._slot = torch.zeros(1, dtype=torch.long, device=device)
            self._hidden = torch.finfo(model.dtype).min
            self._mask = torch.full((rows, 1, 1, length), self._hidden, dtype=model.dtype, device=device)
            self._layers: list[_FixedLayer] = []
            for layer in layers:
                shape = (rows, layer.keys.shape[1], length)
                keys, values = (states.new_zeros(*shape, states.shape[3]) for states in (layer.keys, layer.values))
                self._layers.append(_FixedLayer(keys, values, self._slot))
            self._cache = DynamicCache()
            self._cache.layers.extend(self._layers)
            if device.type == "cuda":
                self._record()

    def _record(self) -> None:
        if self.row_step is not None:
            try:
                self._tape, self._logits = record(self._forward, self._mask.device)
                return
            except Exception as error:  # of a compiler that is not there, or of one that is
                _logger.warning("The kernels of a single row cannot be built here: %s", error)
                self.row_step = None
        try:
            self._tape, self._logits = record(self._forward, self._mask.device)
        except RuntimeError as error:
            _logger.warning("A token's step cannot be recorded on this GPU and runs as it is: %s", error)

    @property
    def reading(self) -> "Reading | None":
        """The reading that is bound to it; None also where nobody has that any more."""
        return self._reading() if self._reading is not None else None

    def bind(self, reading: "Reading") -> None:
        """Takes a reading's keys and values over; whoever was bound gets its own back."""
        if (bound := self.reading) is not None:
            bound.release()
        layers: list[RoomyLayer] = reading.cache.layers
        rows, length = len(reading.mask), layers[0].keys.shape[2]
        seen = reading.mask[:, :length]
        self._mask.fill_(self._hidden)
        self._positions.zero_()  # also of rows that nobody reads: they count as well
        self._mask[:rows, 0, 0, :length] = torch.where(seen.bool(), 0.0, self._hidden).to(self._mask.dtype)
        self._positions[:rows, 0] = seen.sum(dim=1) - 1
        self._slot.fill_(length - 1)
        for own, layer in zip(self._layers, layers, strict=True):
            for buffer, states in ((own.keys, layer.keys), (own.values, layer.values)):
                assert buffer is not None
                buffer[:rows, :, :length] = states
                if buffer.dtype == torch.float16:  # of what was there before no weight is nan, though it is 0
                    buffer[:, :, length:] = 0
            layer.put(layer.keys.new_empty(0), layer.values.new_empty(0))  # no second copy
        self._reading, self.num_filled = weakref.ref(reading), length
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
        self._reading = reading.bound = None

    def run(self, token_ids: Tensor) -> Tensor:
        """Logits (B, V) float32 after the tokens (B,), which are one position after what was read before."""
        rows = len(token_ids)
        self._token_ids[:rows, 0] = token_ids
        self.num_filled += 1
        if self._tape is None:
            return self._forward()[:rows]
        assert self._logits is not None
        with replaying:
            self._tape.replay()
            return self._logits[:rows].clone()

    @property
    def num_bytes(self) -> int:
        """Of its keys and values."""
        return sum(2 * layer.keys.nbytes for layer in self._layers if layer.keys is not None)

    def _forward(self) -> Tensor:
        self._slot.add_(1)
        self._positions.add_(1)
        self._mask.index_fill_(3, self._slot, 0.0)
        if self.row_step is not None:
            states: list[Any] = [(layer.keys, layer.values) for layer in self._layers]
            return self.row_step(self._token_ids, self._positions, self._slot, self._mask.flatten(), states)
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


class Replay:
    """The recorded steps of one LLM.

    Args:
        model: one that `can_take` says yes to.
        row_step: what reads a token of a single row in its place.
    """

    def __init__(self, model: Any, row_step: RowStep | None = None) -> None:
        self._model = model
        self._row_step = row_step
        self._steps: OrderedDict[tuple[int, int], FixedStep] = OrderedDict()

    @staticmethod
    def can_take(model: Any, *, takes_positions: bool) -> bool:
        """Whether a model's step can have a fixed shape: one attention that takes a ready mask, positions as given, and
        nothing that the host must know of them."""
        config = model.config.get_text_config()
        turns = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        return (
            takes_positions
            and config._attn_implementation == "sdpa"
            and turns not in ("dynamic", "longrope")
            and not hasattr(model, "hf_device_map")
        )

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
        return step.run(token_ids)

    def _step(self, reading: "Reading", length: int) -> FixedStep:
        rows = 1 << (len(reading.mask) - 1).bit_length()
        size = (rows, -(-length // LENGTHS) * LENGTHS)
        if size not in self._steps:
            step = self._steps[size] = FixedStep(self._model, reading.cache, *size, self._row_step)
            if rows == 1:
                self._row_step = step.row_step  # None where the kernels could not be built
            while len(self._steps) > 1 and sum(one.num_bytes for one in self._steps.values()) > MOST_BYTES:
                self._steps.popitem(last=False)
        self._steps.move_to_end(size)
        return self._steps[size]
