"""A dialogue about one picture: every question is asked with the turns before it, as the paper's figure 4 does.

Question: q1 Answer: a1. Question: q2 Answer:
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Unpack

from torch import Tensor

from blip2.errors import UserError
from blip2.inference.decoding import DecodingOptions, make_decoding, make_streamable
from blip2.inference.generation import Generator
from blip2.model.writing import Decoding
from blip2.preprocessing.prompts import dialogue

Turns = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Asked:
    """A question with as much of what was said before as the language model can read.

    Attributes:
        prompt: what the language model continues.
        num_tokens: of the prompt and the visual prompt before it.
        num_left_out: how many of the oldest turns had to be left out.
        stop: what ends the answer besides the model's own end; "" for nothing.
    """

    prompt: str
    num_tokens: int
    num_left_out: int
    stop: str


def fit_dialogue(
    generator: Generator, history: Turns, question: str, template: str, *, max_new_tokens: int, system: str = ""
) -> Asked:
    """The prompt that asks `question`, with the history cut at whole turns where it would not fit.

    Args:
        generator: whose language model reads it.
        history: questions and answers, oldest first.
        question: what is asked now.
        template: the question prompt, {} stands for the question.
        max_new_tokens: room for the answer.
        system: a line before everything, never cut.

    Raises:
        UserError: the question is empty, or does not fit alone.
    """
    if not question.strip():
        raise UserError("The question is empty.")
    room, num_tokens = generator.prompt_room(max_new_tokens), 0
    for num_left_out in range(len(history) + 1):
        prompt = dialogue(history[num_left_out:], question, template)
        if system.strip():
            prompt = f"{system.strip()} {prompt}"
        num_tokens = generator.tokenizer.encode_prompts([prompt]).input_ids.shape[1]
        if room is None or num_tokens <= room:
            num_tokens += generator.model.config.num_query_tokens
            return Asked(prompt, num_tokens, num_left_out, _stop(history[num_left_out:], template))
    raise UserError(
        f"The question is {num_tokens} tokens long; beside an answer of {max_new_tokens} there is room for "
        f"{max(0, room or 0)}. Shorten it, or ask for a shorter answer."
    )


def _stop(history: Turns, template: str) -> str:
    """A dialogue's turns stand on one line, so a new line is past the answer; the original ends OPT's answers so.

    A first question is asked as `Blip2.ask` asks it. Bare instructions ("{}") may be answered in several lines.
    """
    return "\n" if history and template.strip() != "{}" else ""


class Conversation:
    """Turns about one picture, whose features were computed once.

    Attributes:
        history: questions and answers, oldest first.
        num_left_out: how many of the oldest the last question was asked without, for want of room.
    """

    def __init__(self, generator: Generator, image_features: Tensor, template: str) -> None:
        """Made by `Blip2.chat`.

        Args:
            generator: what speaks.
            image_features: (1, N, Dv).
            template: the question prompt, {} stands for the question.
        """
        self.history: list[tuple[str, str]] = []
        self.num_left_out = 0
        self._generator = generator
        self._image_features = image_features
        self._template = template

    def ask(self, question: str, **options: Unpack[DecodingOptions]) -> str:
        """The answer to `question`, given what was said before; it joins the history."""
        decoding = make_decoding(options)
        asked = self._fit(question, decoding)
        (answer,) = self._generator.speak(self._image_features, [asked.prompt], [question], decoding)
        if asked.stop:
            answer = answer.split(asked.stop)[0].rstrip()
        self.history.append((question, answer))
        return answer

    def stream(self, question: str, **options: Unpack[DecodingOptions]) -> Iterator[str]:
        """The same answer piece by piece; it joins the history once it is whole."""
        pieces = []
        decoding = make_streamable(options)
        asked = self._fit(question, decoding)
        for piece in self._generator.stream(self._image_features, asked.prompt, question, decoding):
            told = piece.split(asked.stop)[0] if asked.stop else piece
            pieces.append(told if told == piece else told.rstrip())
            yield pieces[-1]
            if told != piece:
                break
        self.history.append((question, "".join(pieces)))

    def reset(self) -> None:
        """Forget all turns; the picture stays."""
        self.history.clear()

    def _fit(self, question: str, decoding: Decoding) -> Asked:
        room = decoding.max_new_tokens
        asked = fit_dialogue(self._generator, self.history, question, self._template, max_new_tokens=room)
        self.num_left_out = asked.num_left_out
        return asked
