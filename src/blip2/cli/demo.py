"""blip2 demo: the model captions and answers about the example pictures, with a contact sheet and a page to look at.

The folder of pictures holds pictures.json:

    {"pictures": [{"file": "scene.png", "licence": "CC0-1.0", "source": "composed", "questions": ["what is red?"]}]}
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from blip2.cli import options
from blip2.cli.models import captioning_parts, open_model
from blip2.cli.output import note, printable
from blip2.errors import BadData, MissingFile

REPOSITORY_PICTURES = Path(__file__).parents[3] / "examples" / "pictures"


@dataclass(frozen=True)
class Picture:
    """An example picture and what to ask about it.

    Attributes:
        path: the file.
        licence: of the picture.
        source: where it comes from.
        questions: asked one by one.
    """

    path: Path
    licence: str
    source: str
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Shown:
    """What the model said of a picture.

    Attributes:
        picture: the example.
        image: its pixels, PIL.
        caption: the model's.
        answers: one for each question.
    """

    picture: Picture
    image: Any
    caption: str
    answers: tuple[str, ...]


def demo(
    pictures: Annotated[
        Path, typer.Option(help="A folder with pictures.json.", show_default="the repository's examples")
    ] = REPOSITORY_PICTURES,
    out: Annotated[Path, typer.Option("--out", help="The folder for the contact sheet and the page.")] = Path(
        "demo-output"
    ),
    model: options.Model = "mini",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Caption and question the example pictures; write a contact sheet and an HTML page.

    The answers are printed; contact-sheet.png and index.html in the folder of --out show them with the pictures.
    """
    from blip2.cli.contact_sheet import contact_sheet
    from blip2.cli.demo_page import demo_page

    examples = read_pictures(pictures)
    opened = open_model(model, *captioning_parts(model), device=device, dtype=dtype, quiet=quiet)
    shown = []
    for example in examples:
        shown.append(look(opened, example))
        print(_as_text(shown[-1]), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    contact_sheet(shown).save(out / "contact-sheet.png", optimize=True)
    (out / "index.html").write_text(demo_page(shown, opened.settings.name), encoding="utf-8")
    note(f"See {out / 'index.html'} and {out / 'contact-sheet.png'}.", quiet=quiet)


def read_pictures(folder: Path) -> list[Picture]:
    """The examples that pictures.json in `folder` lists.

    Raises:
        MissingFile: there is no pictures.json.
        BadData: it is broken, lists nothing, or lists a file outside the folder.
    """
    path = folder / "pictures.json"
    if not path.is_file():
        raise MissingFile(f"{folder} has no pictures.json. Run from a checkout of the repository, or give --pictures.")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["pictures"]
        found = [Picture(folder / row["file"], row["licence"], row["source"], tuple(row["questions"])) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise BadData(f"{path} is broken: {error!r}. Each picture has file, licence, source and questions.") from None
    if not found:
        raise BadData(f"{path} lists no picture.")
    for picture in found:
        if picture.path.parent != folder:
            raise BadData(f"{path} lists {picture.path}, which is not in its folder.")
    return found


def look(model: Any, picture: Picture) -> Shown:
    """The model's caption of a picture and its answers."""
    from blip2.preprocessing.images import load_image

    image = load_image(picture.path)
    caption = model.caption(image)
    count = len(picture.questions)
    answers = model.ask([image] * count, picture.questions) if count else []
    return Shown(picture, image, caption, tuple(answers))


def _as_text(shown: Shown) -> str:
    turns = zip(shown.picture.questions, shown.answers, strict=True)
    lines = [f"  {question} {printable(answer)}" for question, answer in turns]
    return "\n".join([f"{shown.picture.path.name}: {printable(shown.caption)}", *lines])
