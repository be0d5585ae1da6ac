"""How the originals make texts, by name: `paper` as the paper says, `lavis` as the original code does today.

They differ in four places: LAVIS asks OPT for a "Short answer:" too and favours no length there (the paper: short ones,
-1), and since December 2023 it captions with a repetition penalty and without a bonus for length.
"""

from dataclasses import dataclass
from typing import Literal

from blip2.errors import UserError
from blip2.inference.decoding import DecodingOptions

Preset = Literal["paper", "lavis"]
Task = Literal["caption", "question"]
_ANSWER, _SHORT_ANSWER = "Question: {} Answer:", "Question: {} Short answer:"


@dataclass(frozen=True)
class Manner:
    """What the language model reads and how its words are drawn.

    Attributes:
        prompt: of captions; of questions with {} for the question.
        options: of decoding.
    """

    prompt: str
    options: DecodingOptions


def manner(preset: str, task: Task, *, is_encoder_decoder: bool) -> Manner:
    """The manner of a preset for one task and kind of language model.

    Raises:
        UserError: there is no such preset.
    """
    if preset not in ("paper", "lavis"):
        raise UserError(f"There is no preset {preset!r}. Give paper or lavis.")
    is_paper = preset == "paper"
    if task == "caption":
        options: DecodingOptions = {"num_beams": 5, "max_new_tokens": 30}
        if not is_paper:
            options |= {"min_new_tokens": 8, "repetition_penalty": 1.15, "length_penalty": 0.0}
        else:
            options |= {"min_new_tokens": 1, "length_penalty": 1.0}
        return Manner("a photo of", options)
    short = is_encoder_decoder or not is_paper
    penalty = -1.0 if is_encoder_decoder or is_paper else 0.0
    return Manner(
        _SHORT_ANSWER if short else _ANSWER,
        {"num_beams": 5, "max_new_tokens": 10, "min_new_tokens": 1, "length_penalty": penalty},
    )
