"""blip2 ask: a question about pictures, answered in free words or from a list."""

from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from blip2.cli import inputs as pictures
from blip2.cli import options
from blip2.cli.inputs import PICTURE_SUFFIXES
from blip2.cli.models import open_model
from blip2.cli.output import ResultWriter, answer_all, check_folder, is_bare, whole_file
from blip2.errors import UserError


def ask(
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE|FOLDER|GLOB|-...", help="Pictures; - reads one, or paths, from standard input."),
    ] = None,
    question: Annotated[
        str, typer.Argument(metavar="QUESTION", help="What to ask about each picture; it comes last.")
    ] = "",
    answers: Annotated[
        str | None, typer.Option(metavar="A,B,C", help="Choose the most probable of these answers.")
    ] = None,
    attention: Annotated[
        Path | None, typer.Option(metavar="OUT.png", help="Draw where the model looked; of one picture only.")
    ] = None,
    model: options.Model = "mini",
    preset: options.Preset = None,
    beams: options.Beams = None,
    sample: options.Sample = False,
    top_p: options.TopP = None,
    temperature: options.Temperature = None,
    max_new_tokens: options.MaxNewTokens = None,
    batch_size: options.BatchSize = 16,
    json: options.Json = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    quiet: options.Quiet = False,
) -> None:
    """Answer a question about a picture.

    With --answers and --json, "ranking" lists all given answers with their log-probability and their share of 1.
    """
    chosen = options.decoding_options(beams, sample, top_p, temperature, max_new_tokens)
    given = _answer_list(answers, chosen | ({"preset": preset} if preset else {}))
    if not files:  # a lone argument is taken for the question
        raise UserError('Name a picture and ask something about it: blip2 ask FILE "What is this?"')
    if question.lower().endswith(PICTURE_SUFFIXES):
        raise UserError(f"The question comes last, and {question} names a picture. What shall be asked?")
    found = pictures.expand(files)
    if attention is not None and len(found) != 1:
        raise UserError(f"--attention draws over one picture, and there are {len(found)}. Give one.")
    if attention is not None:
        _check_drawable(attention)
    seen: list[Any] = []

    @cache  # opened once there is a picture to ask about
    def opened() -> Any:
        return open_model(model, "generation", device=device, dtype=dtype, quantize=quantize, quiet=quiet)

    def answer(images: list[Any]) -> list[dict[str, Any]]:
        if attention is not None:
            seen.extend(images)
        if given is None:
            return [
                {"question": question, "answer": text}
                for text in opened().ask(images, question, preset=preset, **chosen)
            ]
        return [_ranked(question, ranking) for ranking in opened().rank_answers(images, question, given)]

    writer = ResultWriter("answer", as_json=json, is_bare=is_bare(found))
    exit_code = answer_all(found, answer, writer, batch_size=batch_size, quiet=quiet)
    if attention is not None and seen:  # once the answer is there: it is not lost where the map cannot be written
        _draw_attention(opened(), seen[0], question, attention)
    raise typer.Exit(exit_code)


def _check_drawable(path: Path) -> None:
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise UserError(f"--attention {path} names no kind of picture. Name it .png, for example.")
    check_folder(path)


def _draw_attention(model: Any, image: Any, question: str, path: Path) -> None:
    """Saves the picture under the mean of its queries' attention."""
    from blip2.inference.attention_maps import attention_maps, draw
    from blip2.preprocessing.images import load_image

    maps = attention_maps(model, model.image_features(image), question)  # (Q, rows, columns)
    with whole_file(path) as beside:
        draw(load_image(image), maps.mean(dim=0)).save(beside)


def _answer_list(answers: str | None, chosen: dict[str, Any]) -> list[str] | None:
    if answers is None:
        return None
    if chosen:
        raise UserError("--answers chooses from a list, so options for free text have no effect. Leave them out.")
    return [answer.strip() for answer in answers.split(",")]


def _ranked(question: str, ranking: list[Any]) -> dict[str, Any]:
    rows = [
        {"answer": row.text, "log_probability": round(row.log_probability, 4), "share": round(row.share, 4)}
        for row in ranking
    ]
    return {"question": question, "answer": ranking[0].text, "ranking": rows}
