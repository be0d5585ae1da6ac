"""blip2 caption: what pictures show."""

from functools import cache
from typing import Annotated, Any

import typer

from blip2.cli import inputs as pictures
from blip2.cli import options
from blip2.cli.models import captioning_parts, open_model
from blip2.cli.output import ResultWriter, answer_all, is_bare


def caption(
    inputs: options.Inputs,
    model: options.Model = "mini",
    prompt: Annotated[
        str | None, typer.Option(help='What the caption continues, such as "a photo of"; by default the model\'s own.')
    ] = None,
    best_of: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=64,
            help="Make so many captions and give the one most similar to the picture; by default as the model says.",
        ),
    ] = None,
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
    """Say what pictures show.

    One file gives the bare caption; several give path<TAB>caption, in the order named.
    """
    chosen = options.decoding_options(beams, sample, top_p, temperature, max_new_tokens)
    found = pictures.expand(inputs)

    @cache  # opened once there is a picture to caption
    def opened() -> Any:
        return open_model(
            model,
            *captioning_parts(model, best_of, [*chosen, *(["num_beams"] if preset else [])]),
            device=device,
            dtype=dtype,
            quantize=quantize,
            quiet=quiet,
        )

    def answer(images: list[Any]) -> list[dict[str, Any]]:
        return [
            {"caption": text} for text in opened().caption(images, prompt, best_of=best_of, preset=preset, **chosen)
        ]

    writer = ResultWriter("caption", as_json=json, is_bare=is_bare(found))
    raise typer.Exit(answer_all(found, answer, writer, batch_size=batch_size, quiet=quiet))
