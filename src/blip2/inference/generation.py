"""Text from pictures: the stage-2 model put to use.

image_features ─ Q-Former (reads the instruction, if it is aware of one) ─ visual prompt ─┐
                                                                    prompt ─ tokens ──────┴─ language model ─ text
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from blip2.errors import UserError
from blip2.inference.answers import score_answers
from blip2.inference.image_cache import DEFAULT_ENTRIES, ImageCache, digests
from blip2.inference.streaming import TextPieces
from blip2.model.language import DecoderLM, LanguageModel
from blip2.model.reading import Prefix, Reading
from blip2.model.recorded import Recorded
from blip2.model.stage1 import Text
from blip2.model.stage2 import Blip2Stage2
from blip2.model.writing import Decoding, Writer, write
from blip2.preprocessing.text import LanguageTokenizer, QFormerTokenizer, TextBatch, checked

MOST_ROWS = 64  # more are no faster on a CPU
KEY_VALUE_BYTES = 10**9
POSITIONS = 100  # of a text with its prompts, about
KEPT_BYTES = 128 << 20  # of visual prompts and prefixes: six pictures with OPT-2.7B, which takes 21 MB for each


class Generator:
    """The generating part: image features and prompts in, text out.

    Attributes:
        model: the stage-2 model with its language model, without its image encoder.
        tokenizer: the language model's.
        instruction_tokenizer: the Q-Former's; None where the Q-Former reads no instruction.
        max_text_tokens: how much of an instruction is read.
        image_cache: visual prompts made last, and the LLM's keys and values over them.
    """

    def __init__(
        self,
        model: Blip2Stage2,
        tokenizer: LanguageTokenizer,
        instruction_tokenizer: QFormerTokenizer | None,
        max_text_tokens: int,
    ) -> None:
        assert model.language_model is not None, "text needs a language model"
        assert model.instruction_aware == (instruction_tokenizer is not None)
        self.model = model
        self.tokenizer = tokenizer
        self.instruction_tokenizer = instruction_tokenizer
        self.max_text_tokens = max_text_tokens
        self.image_cache = ImageCache(KEPT_BYTES, 2 * DEFAULT_ENTRIES)  # a picture has two, or more with instructions
        self._recorded = Recorded(self._see, weights=lambda: model.query_tokens, most_rows=MOST_ROWS)

    @property
    def language_model(self) -> LanguageModel:
        """The frozen LLM."""
        assert self.model.language_model is not None
        return self.model.language_model

    @property
    def reads_instructions(self) -> bool:
        """Whether the Q-Former is told what is asked."""
        return self.instruction_tokenizer is not None

    def prompt_room(self, max_new_tokens: int) -> int | None:
        """How many tokens a prompt may have beside the visual prompt and an answer; None where nothing bounds it."""
        config: Any = self.language_model.model.config.get_text_config()
        # T5 counts positions from each other, and names the length that it was trained at.
        length = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        if length is None:
            return None
        answer = 0 if self.language_model.is_encoder_decoder else max_new_tokens
        return length - self.model.config.num_query_tokens - answer

    def check_room(self, prompts: Sequence[str], max_new_tokens: int) -> None:
        """Raises UserError where a prompt is longer than the language model can read beside such an answer.

        T5 can read more than it was trained with, and so is not asked.
        """
        config: Any = self.language_model.model.config.get_text_config()
        room = self.prompt_room(max_new_tokens)
        if room is None or getattr(config, "max_position_embeddings", None) is None:
            return
        for prompt in prompts:
            if len(checked(prompt).encode()) < room // 2:  # a token is a byte at least
                continue
            num_tokens = self.tokenizer.encode_prompts([prompt]).input_ids.shape[1]
            if num_tokens > room:
                raise UserError(
                    f"The prompt is {num_tokens} tokens long; beside an answer of {max_new_tokens} there is room for "
                    f"{max(0, room)}. Shorten it, or ask for a shorter answer."
                )

    @property
    def rows_at_once(self) -> int:
        """How many texts may be written side by side: 64, or as many as keep their keys and values below a gigabyte."""
        config: Any = self.language_model.model.config.get_text_config()
        layers, heads = getattr(config, "num_hidden_layers", 0), getattr(config, "num_attention_heads", 1)
        width = getattr(config, "head_dim", None) or self.language_model.width // heads
        heads = getattr(config, "num_key_value_heads", None) or heads
        row_bytes = 2 * layers * heads * width * POSITIONS * self.language_model.model.dtype.itemsize
        return max(1, min(MOST_ROWS, KEY_VALUE_BYTES // max(1, row_bytes)))

    @torch.inference_mode()
    def visual_prompt(self, image_features: Tensor, instructions: Sequence[str]) -> Tensor:
        """Soft visual prompts (B, Q, Dl) of image features (B, N, Dv); B instructions, unread if it is not aware."""
        told = instructions if self.reads_instructions else [""] * len(image_features)
        keys = [("prompt", seen, text) for seen, text in zip(digests(image_features), told, strict=True)]
        kept = [self.image_cache.get(key) for key in keys]
        new = [row for row, found in enumerate(kept) if found is None]
        computed = iter(self._recorded(*self._told(image_features[new], [told[row] for row in new])) if new else ())
        prompts = [found[0] if found else next(computed) for found in kept]  # B of (Q, Dl)
        for row in new:
            self.image_cache.put(keys[row], [prompts[row]])
        return torch.stack(prompts)

    def compute_visual_prompt(self, image_features: Tensor, instructions: Sequence[str]) -> Tensor:
        """As `visual_prompt`, but nothing is looked up or kept, or replayed."""
        return self._see(*self._told(image_features, instructions))

    def _told(self, image_features: Tensor, instructions: Sequence[str]) -> tuple[Tensor, ...]:
        """What `_see` takes."""
        image_features = image_features.to(self.model.query_tokens.dtype)
        if self.instruction_tokenizer is None:
            return (image_features,)
        batch = self.instruction_tokenizer.encode(instructions, self.max_text_tokens).to(image_features.device)
        return image_features, batch.input_ids, batch.attention_mask

    def _see(self, image_features: Tensor, *instruction: Tensor) -> Tensor:
        return self.model.visual_prompt(image_features, Text(*instruction) if instruction else None)

    @torch.inference_mode()
    def read(self, visual_prompt: Tensor, prompt: TextBatch) -> tuple[Reading, Tensor]:
        """What the LLM's `start` gives; the visual prompt of a single row is read only if it was not read before."""
        given = (visual_prompt, prompt.input_ids, prompt.attention_mask)
        if not isinstance(self.language_model, DecoderLM) or len(visual_prompt) > 1:
            return self.language_model.start(*given)
        key = ("prefix", *digests(visual_prompt))
        prefix = Prefix(self.image_cache.get(key) or ())
        started = self.language_model.start(*given, prefix=prefix)
        if prefix.keys_and_values:
            self.image_cache.put(key, prefix.keys_and_values)
        return started

    @torch.inference_mode()
    def speak(
        self, image_features: Tensor, prompts: Sequence[str], instructions: Sequence[str], decoding: Decoding
    ) -> list[str]:
        """The text after each picture and prompt.

        Args:
            image_features: (B, N, Dv).
            prompts: B texts that the language model continues.
            instructions: B texts that an instruction-aware Q-Former reads.
            decoding: how words are drawn.
        """
        prompt = self.tokenizer.encode_prompts(prompts).to(image_features.device)
        visual_prompt = self.visual_prompt(image_features, instructions)
        return self.tokenizer.decode(write(self.language_model, *self.read(visual_prompt, prompt), decoding))

    def propose(
        self, image_features: Tensor, prompts: Sequence[str], instructions: Sequence[str], decoding: Decoding
    ) -> list[list[str]]:
        """Several texts after each picture and prompt; arguments as in `speak`.

        Returns:
            B lists of `decoding.num_return_sequences` texts, the likeliest first where they come of beam search.
        """
        count = decoding.num_return_sequences
        texts = self.speak(image_features, prompts, instructions, decoding)
        return [texts[i : i + count] for i in range(0, len(texts), count)]

    def stream(self, image_features: Tensor, prompt: str, instruction: str, decoding: Decoding) -> Iterator[str]:
        """The text after one picture (1, N, Dv) and prompt, in pieces as they are made; who stops reading stops it."""
        pieces = TextPieces(self.tokenizer.decode)
        with torch.inference_mode():
            encoded = self.tokenizer.encode_prompts([prompt]).to(image_features.device)
            started = self.read(self.visual_prompt(image_features, [instruction]), encoded)
            writer = Writer(self.language_model)
            (row,) = writer.add(*started, [decoding])
        while writer.rows:
            with torch.inference_mode():
                writer.step()
            if piece := pieces.after(row.token_ids, is_end=not writer.rows):
                yield piece

    def score(
        self, image_features: Tensor, prompts: Sequence[str], instructions: Sequence[str], answers: Sequence[str]
    ) -> Tensor:
        """Log-probability (B, A) of each of A answers after each picture and prompt; arguments as in `speak`."""
        visual_prompt = self.visual_prompt(image_features, instructions)
        return score_answers(self.language_model, self.tokenizer, visual_prompt, prompts, answers)
