"""Options that several commands share, so that they are called and explained alike everywhere."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

Model = Annotated[
    str, typer.Option("--model", "-m", help="A model's name, its folder, or FILE.pth,vision=NAME,llm=NAME.")
]
Device = Annotated[
    str,
    typer.Option(
        help="Where to compute: cpu, cuda, cuda:1; auto takes a GPU where there is one, all spreads the LLM over all."
    ),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Arithmetic of the frozen parts; auto: float32 on a CPU, bfloat16 on a GPU that has it."),
]
Quantize = Annotated[
    Literal["int8", "int4"] | None,
    typer.Option(help="Round the LLM's weights as they are loaded, the image encoder's to int8; see blip2 quantize."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes on standard error.")]
BatchSize = Annotated[int, typer.Option(min=1, max=1024, help="Pictures that go through the model at once.")]
Inputs = Annotated[
    list[str],
    typer.Argument(metavar="FILE|FOLDER|GLOB|-...", help="Pictures; - reads a picture, or paths, from standard input."),
]
Output = Annotated[Path, typer.Option("--out", help="Where to write.")]

Beams = Annotated[int | None, typer.Option("--beams", min=1, max=64, help="Beam search; the paper uses 5.")]
Sample = Annotated[bool, typer.Option("--sample", help="Draw words by chance instead of taking the likeliest.")]
TopP = Annotated[
    float | None, typer.Option("--top-p", help="With --sample: draw from the likeliest words of this sum.")
]
Temperature = Annotated[float | None, typer.Option(help="With --sample: below 1 keeps closer to the likeliest.")]
Preset = Annotated[
    Literal["paper", "lavis"] | None, typer.Option(help="Prompt and decoding of the paper, or of the original code.")
]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Longest text in tokens.")]


def decoding_options(
    beams: int | None, sample: bool, top_p: float | None, temperature: float | None, max_new_tokens: int | None
) -> dict[str, Any]:
    """The options of decoding that were given, as `Blip2.generate` takes them."""
    given = {
        "num_beams": beams,
        "sample": sample or None,
        "top_p": top_p,
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
    }
    return {name: value for name, value in given.items() if value is not None}
