"""Text from pictures: the stage-2 model put to use.

image_features ─ Q-Former (reads the instruction, if it is aware of one) ─ visual prompt ─┐
                                                                    prompt ─ tokens ──────┴─ language model ─ text
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from blip2.inference.answers import score_answers
from blip2.inference.streaming import TokenStream
from blip2.model.language import Decoding, LanguageModel
from blip2.model.stage1 import Text
from blip2.model.stage2 import Blip2Stage2
from blip2.preprocessing.text import LanguageTokenizer, QFormerTokenizer


class Generator:
    """The generating part: image features and prompts in, text out.

    Attributes:
        model: the stage-2 model with its language model, without its image encoder.
        tokenizer: the language model's.
        instruction_tokenizer: the Q-Former's; None where the Q-Former reads no instruction.
        max_text_tokens: how much of an instruction is read.
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

    @property
    def language_model(self) -> LanguageModel:
        """The frozen LLM."""
        assert self.model.language_model is not None
        return self.model.language_model

    @property
    def reads_instructions(self) -> bool:
        """Whether the Q-Former is told what is asked."""
        return self.instruction_tokenizer is not None

    @torch.inference_mode()
    def visual_prompt(self, image_features: Tensor, instructions: Sequence[str]) -> Tensor:
        """Soft visual prompts (B, Q, Dl) of image features (B, N, Dv); B instructions, unread if it is not aware."""
        image_features = image_features.to(self.model.query_tokens.dtype)
        if self.instruction_tokenizer is None:
            return self.model.visual_prompt(image_features)
        batch = self.instruction_tokenizer.encode(instructions, self.max_text_tokens).to(image_features.device)
        return self.model.visual_prompt(image_features, Text(batch.input_ids, batch.attention_mask))

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
        new_ids = self.language_model.generate(
            self.visual_prompt(image_features, instructions), prompt.input_ids, prompt.attention_mask, decoding
        )  # (B, T)
        return self.tokenizer.decode(new_ids)

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
        """The text after one picture (1, N, Dv) and prompt, in pieces as they are made."""
        stream = TokenStream(self.tokenizer.decode)

        @torch.inference_mode()
        def generate() -> None:
            encoded = self.tokenizer.encode_prompts([prompt]).to(image_features.device)
            self.language_model.generate(
                self.visual_prompt(image_features, [instruction]),
                encoded.input_ids,
                encoded.attention_mask,
                decoding,
                streamer=stream,
                stop=stream.stop,
            )

        return stream.read(generate)

    def score(
        self, image_features: Tensor, prompts: Sequence[str], instructions: Sequence[str], answers: Sequence[str]
    ) -> Tensor:
        """Log-probability (B, A) of each of A answers after each picture and prompt; arguments as in `speak`."""
        visual_prompt = self.visual_prompt(image_features, instructions)
        return score_answers(self.language_model, self.tokenizer, visual_prompt, prompts, answers)
