"""`blip2 demo`: answers printed, a contact sheet and a page that stands alone."""

import json
import re

import pytest
from PIL import Image, ImageFont

from blip2.cli.contact_sheet import wrap

ROWS = [
    {"file": "a.png", "licence": "CC0-1.0", "source": "made <here>", "questions": ["what is this ?", "how many ?"]},
    {"file": "b.JPG", "licence": "CC0-1.0", "source": "made here", "questions": []},
]


@pytest.fixture
def pictures(folder):
    (folder / "pictures" / "pictures.json").write_text(json.dumps({"pictures": ROWS}))
    return folder / "pictures"


def test_the_demo_prints_answers_and_writes_a_sheet_and_a_page(run, pictures, tiny):
    result = run("demo", "--pictures", pictures, "--out", "shown", "--model", tiny)
    assert result.code == 0
    assert "a.png: " in result.out and "  what is this ? " in result.out
    with Image.open("shown/contact-sheet.png") as sheet:
        assert sheet.width > 600 and sheet.height > 300
    page = (pictures.parent / "shown" / "index.html").read_text(encoding="utf-8")
    assert page.count("<article>") == 2 and page.count("<dt>") == 2
    assert page.count("data:image/webp;base64,") == 2
    assert "made &lt;here&gt;" in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing to fetch


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no pictures.json"),
        ("{", "pictures.json is broken"),
        ('{"pictures": []}', "lists no picture"),
        ('{"pictures": [{"file": "a.png"}]}', "Each picture has file, licence, source and questions"),
        ('{"pictures": [{"file": "../x.png", "licence": "", "source": "", "questions": []}]}', "not in its folder"),
        ('{"pictures": [{"file": "no.png", "licence": "", "source": "", "questions": []}]}', "There is no file"),
    ],
)
def test_a_wrong_list_of_pictures_is_refused_and_nothing_is_written(run, folder, tiny, content, message):
    if content is not None:
        (folder / "pictures" / "pictures.json").write_text(content)
    result = run("demo", "--pictures", folder / "pictures", "--out", "shown", "--model", tiny)
    assert result.code == 2 and message in result.err
    assert not (folder / "shown").exists()


def test_lines_fit_their_width():
    font = ImageFont.load_default(16)
    for text in ("a short one", "many words that need more than one line to be said in full", "x" * 90, ""):
        lines = wrap(text, 120, font)
        assert lines and all(font.getlength(line) <= 120 for line in lines)
        assert "".join(lines).replace(" ", "") in (text.replace(" ", ""), "(nothing)")
