"""blip2 match: how well texts fit a picture."""

import json as json_format
from typing import Annotated

import typer

from blip2.cli import inputs as pictures
from blip2.cli import options
from blip2.cli.models import open_model
from blip2.cli.output import note
from blip2.errors import UserError


def match(
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="A picture; - reads it from standard input.")],
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="Texts to compare it with.")],
    model: options.Model = "mini",
    json: options.Json = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    quiet: options.Quiet = False,
) -> None:
    """Compare a picture with texts; the best comes first.

    Each line: the text, the cosine similarity of image-text contrast (-1 to 1), the probability of image-text
    matching (0 to 1), parted by tabs. With --json the texts keep their order.
    """
    if not all(text.strip() for text in texts):
        raise UserError("One of the texts is empty. Leave it out, or say something.")
    found = pictures.expand([file])
    if len(found) != 1:
        raise UserError(f"{file} names {len(found)} pictures; match takes one.")
    image = found[0].load()
    matches = open_model(model, "stage1", device=device, dtype=dtype, quantize=quantize, quiet=quiet).match(
        image, texts
    )
    if json:
        rows = [{"text": row.text, "itc": round(row.itc, 4), "itm": round(row.itm, 4)} for row in matches]
        print(json_format.dumps({"path": found[0].name, "matches": rows}, ensure_ascii=False))
        return
    note("text\tsimilarity\tmatch", quiet=quiet)
    for row in sorted(matches, key=lambda row: (row.itm, row.itc), reverse=True):
        print(f"{row.text}\t{row.itc:.3f}\t{row.itm:.3f}")
