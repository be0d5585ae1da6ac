"""Frozen LLMs behind one small interface: text after (decoder) or encoded with (encoder-decoder) a soft visual prompt.

    DecoderLM          [visual prompt | prompt | target]                      OPT, Llama, Qwen, Gemma, GPT-2, SmolLM
    EncoderDecoderLM   encoder [visual prompt | prompt], decoder [target]     FlanT5, BART

Prompts stand left of the target. In training, text is padded on the right and the loss runs over the target; logits
are computed only there. Generation pads prompts between the visual prompt and the text, closed by the mask.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from blip2.model.drafting import Drafter
from blip2.model.key_values import is_roomy, make_cache
from blip2.model.reading import Encoded, Prefix, Reading, states_of
from blip2.model.recorded import Recorded
from blip2.model.replay import Replay
from blip2.model.row_step import RowStep

MOST_PROMPTS = 16  # one gains much when recorded and 64 nothing; between them was not measured


def _in_one_piece(head: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The last positions of a prompt lie apart in memory. Of such an input PyTorch makes a batched product, which in
    bfloat16 on a CPU copies the whole matrix of the vocabulary for every row: 7 GB and 18 s for 128 rows of SmolLM2."""
    return (arguments[0].contiguous(), *arguments[1:])


class Steps(Protocol):
    """Reads the next token of rows in the place of an LLM: `Replay`, or `graphs.words.Words`."""

    def takes(self, reading: Reading) -> bool:
        """Whether it can go on from there."""
        ...

    def logits(self, reading: Reading, token_ids: Tensor) -> Tensor:
        """Logits (B, V) float32 after the tokens (B,); the reading's mask counts them already."""
        ...


class Prompts(Protocol):
    """Reads the prompt of a single row in the place of an LLM: `graphs.prompts.Prompts`."""

    def takes(self, embeds: Tensor, mask: Tensor) -> bool:
        """Whether it reads embeddings (B, T, D), 0 in the mask (B, T) where there is padding."""
        ...

    def logits(self, embeds: Tensor, cache: Any) -> Tensor:
        """Logits (1, V) float32 after embeddings (1, T, D), which an empty cache has then."""
        ...


class _FrozenLM(nn.Module):
    """What both kinds share: frozen weights that stay in evaluation mode, embeddings and width.

    Attributes:
        reads_prefix_apart: whether a decoder reads the visual prompt of a single row by itself the first time too, as
            it does when it knows it already. Where inputs are rounded to eight bits, how many rows are read together
            changes what is said; so a question has one answer, whether the picture is new or not.
        attends_apart: layers that read both together to the same end (`graphs.decoders.Layers`), where there are any.
        replay: what reads a token in the model's place, where there is something that does.
        prompts: what reads a prompt in a decoder's place, likewise.
    """

    model: Any  # a Hugging Face model, whose methods are found at run time
    is_encoder_decoder: bool

    def __init__(self, model: nn.Module, *, stop_ids: list[int], pad_id: int) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.stop_ids = stop_ids
        self.pad_id = pad_id
        head = self.model.get_output_embeddings()
        if head is not None:
            head.register_forward_pre_hook(_in_one_piece)
        taken = inspect.signature(self.model.forward).parameters
        self._takes_positions = "position_ids" in taken
        self._takes_logits_to_keep = "logits_to_keep" in taken
        self.replay: Steps | None = None
        self.drafter: Drafter | None = None
        self._recorded: Recorded | None = None
        self.reads_prefix_apart = False
        self.attends_apart: Any = None
        self.prompts: Prompts | None = None

    def replay_steps(self) -> bool:
        """Has each token's step, and the reading of prompts, recorded and replayed from now on (model/replay.py).

        The weights stay where they are from now on.

        Returns:
            Whether steps can be; a GPU's work on an encoder-decoder's pictures and prompts is recorded in any case.
        """
        has_steps = not self.is_encoder_decoder and Replay.can_take(self.model, takes_positions=self._takes_positions)
        if has_steps:
            has_kernels = RowStep.runs_on(next(self.model.parameters()).device) and RowStep.can_take(self.model)
            self.replay = Replay(self.model, RowStep(self.model) if has_kernels else None)
        if self.is_encoder_decoder or (has_steps and is_roomy(make_cache(self.model.config))):
            model = self.model
            self._recorded = Recorded(self._read, weights=lambda: next(model.parameters()), most_rows=MOST_PROMPTS)
        return has_steps

    def _read(self, *inputs: Tensor) -> Any:
        """The part of `start` that can be recorded."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Dl, the embedding width."""
        return self.model.get_input_embeddings().weight.shape[1]

    def train(self, mode: bool = True) -> "_FrozenLM":
        super().train(mode)
        self.model.eval()
        return self

    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, Dl), scaled as the model scales its own inputs."""
        return self.model.get_input_embeddings()(input_ids)

    def _vocabulary_logits(self, hidden: Tensor) -> Tensor:
        logits = self.model.get_output_embeddings()(hidden).float()
        cap = getattr(self.model.config, "final_logit_softcapping", None)  # Gemma 2 and 3
        return logits if not cap else cap * torch.tanh(logits / cap)

    def _logits(self, reading: Reading, *, num_new: int = 1, **read: Any) -> Tensor:
        """Logits (B, V) float32 of the token after the newest position of all."""
        return self._all_logits(reading, num_new=num_new, num_wanted=1, **read)[:, -1].float()

    def _all_logits(self, reading: Reading, *, num_new: int, num_wanted: int, **read: Any) -> Tensor:
        """Logits (B, `num_wanted` or more, V) after each of the newest positions, of which `num_new` are read now."""
        written = reading.written
        if not read:
            read = {"next_sequence_length": num_new}
        if self._takes_positions:
            places = (reading.mask.cumsum(dim=1) - 1).clamp_(min=0)  # (B, L)
            read["position_ids"] = places[:, -num_new:]
        if self._takes_logits_to_keep:
            read["logits_to_keep"] = num_wanted
        if reading.encoded is not None:
            encoded: Any = reading.encoded.states
            read |= {"encoder_outputs": BaseModelOutput(encoded), "decoder_attention_mask": reading.mask}
        seen = reading.mask if reading.encoded is None else reading.encoded.mask
        arguments = self.model.prepare_inputs_for_generation(
            written, past_key_values=reading.cache, attention_mask=seen, use_cache=reading.cache is not None, **read
        )
        return self.model(**arguments, return_dict=True).logits

    def draft(self, reading: Reading, token_id: int, *, most: int, num_without_stop: int) -> list[int]:
        """Guesses of what follows a token that is not read yet, in a single row; none where nobody guesses.

        Arguments as of `Drafter.draft`.
        """
        if self.drafter is None or most < 1 or not reading.can_join:
            return []
        return self.drafter.draft(
            reading, token_id, most=most, stop_ids=self.stop_ids, num_without_stop=num_without_stop
        )

    @torch.no_grad()
    def step(self, reading: Reading, token_ids: Tensor) -> Tensor:
        """Reads one more token (B,) of every row.

        Returns:
            (B, V) float32, logits of the one after it.
        """
        newest = token_ids[:, None]
        reading.written = newest if reading.cache is not None else torch.cat([reading.written, newest], dim=1)
        reading.mask = F.pad(reading.mask, (0, 1), value=1)
        if self.replay is not None and self.replay.takes(reading):
            return self.replay.logits(reading, token_ids)
        reading.release()
        return self._logits(reading)

    @torch.no_grad()
    def step_through(self, reading: Reading, token_ids: Sequence[int]) -> Tensor:
        """Reads several tokens of a decoder's single row at once.

        Returns:
            (T, V) float32, logits of the one after each of them.
        """
        reading.release()
        reading.written = torch.tensor([token_ids], device=reading.mask.device)
        reading.mask = F.pad(reading.mask, (0, len(token_ids)), value=1)
        count = len(token_ids)
        return self._all_logits(reading, num_new=count, num_wanted=count)[0, -count:].float()


class DecoderLM(_FrozenLM):
    """A decoder-only LLM of Hugging Face (`AutoModelForCausalLM`).

    Args:
        model: the LLM; it is frozen here.
        stop_ids: tokens that end an answer.
        pad_id: the token that pads.
    """

    is_encoder_decoder = False

    def token_losses(
        self, visual_prompt: Tensor, prompt_ids: Tensor, prompt_mask: Tensor, target_ids: Tensor, target_mask: Tensor
    ) -> Tensor:
        """Cross-entropy of every target token, 0 at padding.

        Args:
            visual_prompt: (B, Q, Dl).
            prompt_ids, prompt_mask: (B, P), padded on the left; P may be 0.
            target_ids, target_mask: (B, T), padded on the right; the end token is part of the target.

        Returns:
            (B, T) float32.
        """
        visual = visual_prompt.to(self.model.dtype)
        text = _pack_left(prompt_ids, prompt_mask, target_ids, target_mask)
        embeds = torch.cat([visual, self.embed(text.input_ids)], dim=1)  # (B, Q+L, Dl), padded on the right alone
        hidden = self.model.get_decoder()(inputs_embeds=embeds, use_cache=False).last_hidden_state
        before = hidden[:, visual.shape[1] - 1 : -1]  # (B, L, Dl): each position predicts the next
        logits = self._vocabulary_logits(before[text.is_target])  # (M, V)
        chosen = F.cross_entropy(logits, text.input_ids[text.is_target], reduction="none")
        return chosen.new_zeros(target_ids.shape).masked_scatter(target_mask.bool(), chosen)

    @torch.no_grad()
    def start(
        self, visual_prompt: Tensor, prompt_ids: Tensor, prompt_mask: Tensor, *, prefix: Prefix | None = None
    ) -> tuple[Reading, Tensor]:
        """Reads [visual prompt | prompt], the prompt padded on the left.

        Args:
            visual_prompt: (B, Q, Dl).
            prompt_ids, prompt_mask: (B, P).
            prefix: with a single row: what it holds is not read again, and if it is empty it is filled.

        Returns:
            What was read, and (B, V) float32, the logits of the first new token.
        """
        visual = visual_prompt.to(self.model.dtype)
        reads_apart = self.reads_prefix_apart and is_roomy(make_cache(self.model.config))  # else in vain
        if prefix is not None and not prefix.keys_and_values and self.attends_apart is not None:
            with self.attends_apart.apart(visual.shape[1]):
                reading, logits = self._start(visual, prompt_ids, prompt_mask, ())
            _fill(prefix, reading, visual.shape[1])
            return reading, logits
        if prefix is not None and not prefix.keys_and_values and reads_apart:
            alone, _ = self._start(visual, prompt_ids[:, :0], prompt_mask[:, :0], ())
            _fill(prefix, alone, visual.shape[1])
        known = prefix.keys_and_values if prefix is not None else ()
        if self._recorded is None or len(visual) > MOST_PROMPTS:
            reading, logits = self._start(visual, prompt_ids, prompt_mask, known)
        else:
            logits, mask, *states = self._recorded(visual, prompt_ids, prompt_mask, *known)
            (states,) = states if len(states) == 1 else (states,)
            cache = make_cache(self.model.config)
            layers: list[Any] = cache.layers
            for layer, keys, values in zip(layers, states[::2], states[1::2], strict=True):
                layer.put(keys, values)
            reading = Reading(cache, mask, prompt_ids.new_empty(len(mask), 0))
        if prefix is not None and not known:
            _fill(prefix, reading, visual.shape[1])
        return reading, logits

    def _start(
        self, visual: Tensor, prompt_ids: Tensor, prompt_mask: Tensor, known: Sequence[Tensor]
    ) -> tuple[Reading, Tensor]:
        """As `start`, of a visual prompt in the LLM's dtype."""
        embeds, mask = _pad_left_of_all(visual, self.embed(prompt_ids), prompt_mask)
        cache = make_cache(self.model.config)
        num_known = min(known[0].shape[2], embeds.shape[1] - 1) if known else 0  # the last gives the logits
        for layer, (keys, values) in enumerate(zip(known[::2], known[1::2], strict=True)):
            cache.update(keys[:, :, :num_known], values[:, :, :num_known], layer)
        reading = Reading(cache, mask, prompt_ids.new_empty(len(embeds), 0))
        if not known and self.prompts is not None and self.prompts.takes(embeds, mask):
            return reading, self.prompts.logits(embeds, cache)
        new = embeds[:, num_known:]
        return reading, self._logits(reading, num_new=new.shape[1], inputs_embeds=new, is_first_iteration=True)

    def _read(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What `_start` gives, as tensors: logits (B, V), mask (B, L), each layer's keys and values in turn.

        Where these have one shape, they are one tensor (2 layers, B, H, L, Dh), which is copied at once.
        """
        visual, prompt_ids, prompt_mask, *known = inputs
        reading, logits = self._start(visual, prompt_ids, prompt_mask, known)
        states = states_of(reading.cache)
        if len({state.shape for state in states}) == 1:
            states = [torch.stack(states)]
        return logits, reading.mask, *states


class EncoderDecoderLM(_FrozenLM):
    """An encoder-decoder LLM of Hugging Face (`AutoModelForSeq2SeqLM`); arguments as in `DecoderLM`."""

    is_encoder_decoder = True

    @property
    def start_id(self) -> int:
        """The token that the decoder reads first."""
        told = [self.model.generation_config.decoder_start_token_id, self.model.config.decoder_start_token_id]
        found = [token for token in told if token is not None]
        return found[0] if found else self.model.config.bos_token_id

    def token_losses(
        self, visual_prompt: Tensor, prompt_ids: Tensor, prompt_mask: Tensor, target_ids: Tensor, target_mask: Tensor
    ) -> Tensor:
        """As `DecoderLM.token_losses`; the prompt (the prefix in prefix language modelling) goes to the encoder."""
        embeds, mask = self._encoder_input(visual_prompt, prompt_ids, prompt_mask)
        labels = target_ids.masked_fill(~target_mask.bool(), -100)
        logits = self.model(inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False).logits.float()
        return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # (B, T)

    @torch.no_grad()
    def start(self, visual_prompt: Tensor, prompt_ids: Tensor, prompt_mask: Tensor) -> tuple[Reading, Tensor]:
        """The encoder reads [visual prompt | prompt], the prompt padded on the right; the decoder its start token.

        Arguments and result as of `DecoderLM.start`; the start token counts as written.
        """
        embeds, mask = self._encoder_input(visual_prompt, prompt_ids, prompt_mask)
        states = (self._recorded or self._read)(embeds, mask)
        cache = None
        if not getattr(self.model, "reads_all_each_step", False):
            caches = make_cache(self.model.config), make_cache(self.model.config)
            cache = EncoderDecoderCache(*caches)
        start = prompt_ids.new_full((len(embeds), 1), self.start_id)
        reading = Reading(cache, torch.ones_like(start), start, Encoded(states, mask))
        return reading, self._logits(reading)

    def _read(self, *inputs: Tensor) -> Tensor:
        """The encoder's result (B, N, Dl), of its input and that one's mask (B, N)."""
        embeds, mask = inputs
        return self.model.get_encoder()(inputs_embeds=embeds, attention_mask=mask, return_dict=True).last_hidden_state

    def _encoder_input(self, visual_prompt: Tensor, prompt_ids: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Tensor]:
        visual = visual_prompt.to(self.model.dtype)
        seen = visual.new_ones(visual.shape[:2], dtype=torch.long)
        return torch.cat([visual, self.embed(prompt_ids)], dim=1), torch.cat([seen, prompt_mask], dim=1)


LanguageModel = DecoderLM | EncoderDecoderLM


def _fill(prefix: Prefix, reading: Reading, length: int) -> None:
    """Gives a prefix what was computed over the first positions of a single row."""
    if is_roomy(reading.cache):
        assert len(reading.mask) == 1, "a prefix is that of one row"
        prefix.keys_and_values = [state[:, :, :length] for state in states_of(reading.cache)]


@dataclass(frozen=True)
class _PackedText:
    """Prompts with their targets, adjacent: both (B, L)."""

    input_ids: Tensor
    is_target: Tensor


def _pack_left(prompt_ids: Tensor, prompt_mask: Tensor, target_ids: Tensor, target_mask: Tensor) -> _PackedText:
    """Each row's real tokens first, in their order: causal attention then never meets padding, so it needs no mask, and
    the batch is as long as its longest row, not as the longest prompt and the longest target together."""
    ids, real = torch.cat([prompt_ids, target_ids], dim=1), torch.cat([prompt_mask, target_mask], dim=1).bool()
    is_target = torch.cat([torch.zeros_like(prompt_mask), target_mask], dim=1).bool()
    length = int(real.sum(dim=1).max())
    order = (~real).long().argsort(dim=1, stable=True)[:, :length]  # (B, L)
    return _PackedText(ids.gather(1, order), is_target.gather(1, order))


def _pad_left_of_all(visual: Tensor, prompt: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Tensor]:
    """[pad | visual | prompt] from a visual prompt (B, Q, Dl) and a left-padded prompt (B, P, Dl), so that a row's
    tokens are adjacent and its result does not depend on how long its neighbours are. Returns embeds and mask."""
    length = visual.shape[1] + prompt.shape[1]
    num_padding = prompt.shape[1] - prompt_mask.sum(dim=1)  # (B,)
    joined = torch.cat([visual, prompt], dim=1)  # (B, Q+P, Dl), its padding in the middle
    place = torch.arange(length, device=visual.device)[None] - num_padding[:, None]  # (B, Q+P), negative = padding
    from_prompt = place >= visual.shape[1]
    source = torch.where(from_prompt, place + num_padding[:, None], place.clamp(min=0))
    embeds = joined.gather(1, source[..., None].expand(-1, -1, joined.shape[2]))
    return embeds, (place >= 0).long()
