"""Frozen LLMs behind one small interface: text after (decoder) or encoded with (encoder-decoder) a soft visual prompt.

    DecoderLM          [visual prompt | prompt | target]                      OPT, Llama, Qwen, Gemma, GPT-2, SmolLM
    EncoderDecoderLM   encoder [visual prompt | prompt], decoder [target]     FlanT5, BART

Prompts stand left of the target. In training, text is padded on the right and the loss runs over the target; logits
are computed only there. Generation pads prompts between the visual prompt and the text, closed by the mask.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache, DynamicLayer


@dataclass(frozen=True)
class Decoding:
    """How text is drawn from the LLM; the names are `transformers.GenerationConfig`'s."""

    num_beams: int = 1
    max_new_tokens: int = 30
    min_new_tokens: int = 0
    do_sample: bool = False
    top_p: float = 0.9
    temperature: float = 1.0
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    num_return_sequences: int = 1

    def arguments(self) -> dict[str, Any]:
        """Arguments of `generate`; those that only sampling or only beams use are left out otherwise."""
        chosen: dict[str, Any] = {
            "num_beams": self.num_beams,
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.do_sample,
            "repetition_penalty": self.repetition_penalty,
        }
        if self.min_new_tokens:
            chosen["min_new_tokens"] = self.min_new_tokens
        if self.do_sample:
            chosen |= {"top_p": self.top_p, "temperature": self.temperature, "top_k": 0}
        if self.num_beams > 1:
            chosen["length_penalty"] = self.length_penalty
        if self.num_return_sequences > 1:
            chosen["num_return_sequences"] = self.num_return_sequences
        return chosen


@dataclass
class Prefix:
    """What a decoder LLM has computed over a visual prompt, to go on from instead of reading it again.

    Attributes:
        keys_and_values: of every layer in turn, each (1, H, Q, Dh); empty where it has not read it yet. `generate`
            fills it then, unless the LLM keeps only a window of what it read.
    """

    keys_and_values: Sequence[Tensor] = ()


def _in_one_piece(head: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The last positions of a prompt lie apart in memory. Of such an input PyTorch makes a batched product, which in
    bfloat16 on a CPU copies the whole matrix of the vocabulary for every row: 7 GB and 18 s for 128 rows of SmolLM2."""
    return (arguments[0].contiguous(), *arguments[1:])


class _FrozenLM(nn.Module):
    """What both kinds share: frozen weights that stay in evaluation mode, embeddings and width."""

    model: Any  # a Hugging Face model, whose methods are found at run time

    def __init__(self, model: nn.Module, *, stop_ids: list[int], pad_id: int) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.stop_ids = stop_ids
        self.pad_id = pad_id
        head = self.model.get_output_embeddings()
        if head is not None:
            head.register_forward_pre_hook(_in_one_piece)

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

    def _generate(
        self,
        embeds: Tensor,
        mask: Tensor,
        decoding: Decoding,
        streamer: Any,
        stop: Callable | None,
        cache: DynamicCache | None = None,
    ) -> Tensor:
        extra: dict[str, Any] = {"streamer": streamer} if streamer is not None else {}
        if cache is not None:
            extra["past_key_values"] = cache
        if stop is not None:
            extra["stopping_criteria"] = [stop]
        with torch.no_grad():
            return self.model.generate(
                inputs_embeds=embeds,
                attention_mask=mask,
                eos_token_id=self.stop_ids,
                pad_token_id=self.pad_id,
                **decoding.arguments(),
                **extra,
            )


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

    def generate(
        self,
        visual_prompt: Tensor,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        decoding: Decoding,
        *,
        streamer: Any = None,
        stop: Callable | None = None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """New token ids (B, T'), padded on the right, after [visual prompt | prompt] (prompt padded on the left).

        With R = `decoding.num_return_sequences` above 1 there are B * R rows, those of a prompt side by side.
        With a single row a `prefix` may be given: what it holds is used, and if it is empty it is filled.
        """
        visual = visual_prompt.to(self.model.dtype)
        embeds, mask = _pad_left_of_all(visual, self.embed(prompt_ids), prompt_mask)
        if prefix is None:
            return self._generate(embeds, mask, decoding, streamer, stop)
        assert len(visual) == 1, "a prefix is that of one row"
        cache, read = DynamicCache(config=self.model.config), prefix.keys_and_values
        for layer, (keys, values) in enumerate(zip(read[::2], read[1::2], strict=True)):
            cache.update(keys, values, layer)
        if read:
            cache.batch_repeat_interleave(max(decoding.num_beams, decoding.num_return_sequences))
        new_ids = self._generate(embeds, mask, decoding, streamer, stop, cache)
        if not read and all(type(layer) is DynamicLayer for layer in cache.layers):
            layers: list[Any] = cache.layers
            kept = [states[:1, :, : visual.shape[1]] for layer in layers for states in (layer.keys, layer.values)]
            prefix.keys_and_values = [states.clone() for states in kept]
        return new_ids


class EncoderDecoderLM(_FrozenLM):
    """An encoder-decoder LLM of Hugging Face (`AutoModelForSeq2SeqLM`); arguments as in `DecoderLM`."""

    is_encoder_decoder = True

    def token_losses(
        self, visual_prompt: Tensor, prompt_ids: Tensor, prompt_mask: Tensor, target_ids: Tensor, target_mask: Tensor
    ) -> Tensor:
        """As `DecoderLM.token_losses`; the prompt (the prefix in prefix language modelling) goes to the encoder."""
        embeds, mask = self._encoder_input(visual_prompt, prompt_ids, prompt_mask)
        labels = target_ids.masked_fill(~target_mask.bool(), -100)
        logits = self.model(inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False).logits.float()
        return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # (B, T)

    def generate(
        self,
        visual_prompt: Tensor,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        decoding: Decoding,
        *,
        streamer: Any = None,
        stop: Callable | None = None,
    ) -> Tensor:
        """New token ids (B, T'), without the decoder's start token."""
        embeds, mask = self._encoder_input(visual_prompt, prompt_ids, prompt_mask)
        return self._generate(embeds, mask, decoding, streamer, stop)[:, 1:]

    def _encoder_input(self, visual_prompt: Tensor, prompt_ids: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Tensor]:
        visual = visual_prompt.to(self.model.dtype)
        seen = visual.new_ones(visual.shape[:2], dtype=torch.long)
        return torch.cat([visual, self.embed(prompt_ids)], dim=1), torch.cat([seen, prompt_mask], dim=1)


LanguageModel = DecoderLM | EncoderDecoderLM


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
