"""How people ask for text to be drawn, checked and handed to the language model.

greedy (default)   num_beams=5   sample=True, top_p=0.9, temperature=0.7
"""

from collections.abc import Collection
from dataclasses import replace
from typing import TypedDict

from blip2.errors import UserError
from blip2.model.writing import Decoding


class DecodingOptions(TypedDict, total=False):
    """Keyword arguments of `Blip2.caption`, `ask`, `generate` and `stream`; all may be left out.

    num_beams: beams of beam search; 1 = greedy (the paper: 5).
    sample: draw words by chance instead, from the most likely ones that together have probability `top_p`.
    temperature: with `sample`; below 1 keeps closer to the likely.
    max_new_tokens, min_new_tokens: bounds of the length.
    repetition_penalty: above 1 discourages words that were said.
    length_penalty: with beams; above 0 favours longer texts, below 0 shorter ones (the paper's VQA: -1).
    """

    num_beams: int
    sample: bool
    top_p: float
    temperature: float
    max_new_tokens: int
    min_new_tokens: int
    repetition_penalty: float
    length_penalty: float


def make_decoding(options: DecodingOptions) -> Decoding:
    """The decoding that `options` ask for.

    Raises:
        UserError: a value out of range, or one that has no effect beside the others.
    """
    sample, num_beams = options.get("sample", False), options.get("num_beams", 1)
    unknown = options.keys() - DecodingOptions.__annotations__.keys()
    if unknown:
        known = ", ".join(DecodingOptions.__annotations__)
        raise UserError(f"No option of decoding is called {', '.join(sorted(unknown))}. These are: {known}.")
    for name in ("top_p", "temperature"):
        if name in options and not sample:
            raise UserError(f"{name} has no effect without sampling. Add sample (--sample), or leave it out.")
    if "length_penalty" in options and num_beams == 1:
        raise UserError("length_penalty has no effect without beams. Add num_beams (--beams), or leave it out.")
    _check_range("num_beams", num_beams, 1, 64)
    _check_range("max_new_tokens", options.get("max_new_tokens", 30), 1, 4096)
    _check_range("top_p", options.get("top_p", 0.9), 1e-6, 1.0)
    _check_range("temperature", options.get("temperature", 1.0), 1e-3, 100.0)
    _check_range("repetition_penalty", options.get("repetition_penalty", 1.0), 1e-3, 100.0)
    drawn = {name: value for name, value in options.items() if name != "sample"}
    decoding = Decoding(do_sample=sample, **drawn)  # pyright: ignore[reportArgumentType]
    _check_range("min_new_tokens", decoding.min_new_tokens, 0, decoding.max_new_tokens)
    return decoding


def default_best_of(own: int, chosen: Collection[str]) -> int:
    """How many captions are made where the caller does not say: a model's own number, but 1 where `num_beams` or
    `sample` is among the options chosen, which are ways of their own."""
    return own if {"num_beams", "sample"}.isdisjoint(chosen) else 1


def make_candidates(options: DecodingOptions, count: int) -> Decoding:
    """The decoding of `count` texts instead of one: as many beams at least or, with `sample`, as many draws.

    Without a `length_penalty` the beams are those of the greatest probability, not of the greatest per token.

    Raises:
        UserError: as `make_decoding`, or a count out of range.
    """
    _check_range("best_of", count, 1, 64)
    decoding = make_decoding(options)
    if count == 1 or decoding.do_sample:
        return replace(decoding, num_return_sequences=count)
    return replace(
        decoding,
        num_return_sequences=count,
        num_beams=max(count, decoding.num_beams),
        length_penalty=options.get("length_penalty", 0.0),
    )


def make_streamable(options: DecodingOptions) -> Decoding:
    """As `make_decoding`; raises UserError for beams, which settle their words only at the end."""
    decoding = make_decoding(options)
    if decoding.num_beams > 1:
        raise UserError("Beam search settles its words only at the end, so it cannot be streamed. Leave num_beams out.")
    return decoding


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UserError(f"{name} is {value:g}; it must lie between {low:g} and {high:g}.")
