"""The page that `blip2 demo` writes: one HTML file with pictures, captions, questions and answers, nothing to fetch."""

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blip2.cli.demo import Shown

LONGEST_SIDE = 512  # pixels of an embedded picture

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>What {model} sees</title>
<style>
:root {{ color-scheme: light dark; --ground: light-dark(#f4f3f0, #17181a); --card: light-dark(#fff, #222427);
  --ink: light-dark(#1d1d1b, #ecebe8); --soft: light-dark(#63625e, #a3a29d); --line: light-dark(#dddbd5, #3a3c40); }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 76rem; padding: 2.5rem 1.25rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.5rem; margin: 0 0 .25rem; }}
header p {{ color: var(--soft); margin: 0 0 2rem; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1.25rem; }}
article {{ background: var(--card); border: 1px solid var(--line); border-radius: .6rem; overflow: hidden; }}
img {{ display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #fff; }}
.said {{ padding: .9rem 1rem 1rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.05rem; margin: 0; }}
dl {{ margin: .75rem 0 0; }}
dt {{ color: var(--soft); }}
dd {{ margin: 0 0 .5rem; }}
footer {{ color: var(--soft); font-size: .8rem; margin-top: .75rem; }}
</style>
</head>
<body>
<header><h1>What {model} sees</h1>
<p>{count} pictures. The bold line is the model's caption; below it are questions with its answers.</p></header>
<main>
{cards}
</main>
</body>
</html>
"""

CARD = """<article><img src="{data}" alt="{caption}">
<div class="said"><h2>{caption}</h2>
<dl>{turns}</dl>
<footer>{file} · {source} · {licence}</footer></div></article>"""


def demo_page(shown: Sequence["Shown"], model: str) -> str:
    """The page as HTML. Every text is escaped; the pictures are data URIs."""
    cards = "\n".join(_card(one) for one in shown)
    return PAGE.format(model=escape(model), count=len(shown), cards=cards)


def _card(shown: "Shown") -> str:
    turns = "".join(
        f"<dt>{escape(question)}</dt><dd>{escape(answer)}</dd>"
        for question, answer in zip(shown.picture.questions, shown.answers, strict=True)
    )
    return CARD.format(
        data=data_uri(shown.image),
        caption=escape(shown.caption),
        turns=turns,
        file=escape(shown.picture.path.name),
        source=escape(shown.picture.source),
        licence=escape(shown.picture.licence),
    )


def data_uri(image: Any) -> str:
    """A PIL image as a WebP data URI, its longer side at most LONGEST_SIDE."""
    small = image.copy()
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
