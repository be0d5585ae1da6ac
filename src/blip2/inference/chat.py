"""A dialogue about one picture: every question is asked with the turns before it, as the paper's figure 4 does.

Question: q1 Answer: a1. Question: q2 Answer:
"""

from collections.abc import Iterator
from typing import Unpack

from torch import Tensor

from blip2.errors import UserError
from blip2.inference.decoding import DecodingOptions, make_decoding, make_streamable
from blip2.inference.generation import Generator
from blip2.preprocessing.prompts import dialogue

MAX_TURNS = 10  # the prompt repeats these many; older ones are forgotten, so that it stays within every LLM's length


class Conversation:
    """Turns about one picture, whose features were computed once.

    Attributes:
        history: questions and answers, oldest first.
    """

    def __init__(self, generator: Generator, image_features: Tensor, template: str) -> None:
        """Made by `Blip2.chat`.

        Args:
            generator: what speaks.
            image_features: (1, N, Dv).
            template: the question prompt, {} stands for the question.
        """
        self.history: list[tuple[str, str]] = []
        self._generator = generator
        self._image_features = image_features
        self._template = template

    def ask(self, question: str, **options: Unpack[DecodingOptions]) -> str:
        """The answer to `question`, given what was said before; it joins the history."""
        (answer,) = self._generator.speak(
            self._image_features, [self._prompt(question)], [question], make_decoding(options)
        )
        self.history.append((question, answer))
        return answer

    def stream(self, question: str, **options: Unpack[DecodingOptions]) -> Iterator[str]:
        """The same answer piece by piece; it joins the history once it is whole."""
        pieces = []
        decoding = make_streamable(options)
        for piece in self._generator.stream(self._image_features, self._prompt(question), question, decoding):
            pieces.append(piece)
            yield piece
        self.history.append((question, "".join(pieces)))

    def reset(self) -> None:
        """Forget all turns; the picture stays."""
        self.history.clear()

    def _prompt(self, question: str) -> str:
        if not question.strip():
            raise UserError("The question is empty.")
        return dialogue(self.history[-MAX_TURNS:], question, self._template)
