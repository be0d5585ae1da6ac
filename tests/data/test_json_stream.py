"""Streamed JSON equals what the standard library reads, whatever the pieces, and refuses what is broken."""

import json

import pytest

from blip2.data import json_stream
from blip2.data.json_stream import elements
from blip2.errors import BadData, MissingFile

WORDS = ["a cat", "Katze\n", "猫", "🦁", '"quoted\\"', "\ud83d", ""]
LIST = [{"id": n, "words": WORDS[n % 7 :], "x": -1.5e3 * n} for n in range(40)]


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 3])
def test_pieces_of_any_size_give_the_same(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(json_stream, "_CHUNK", chunk)
    path = tmp_path / "a.json"
    value = {"info": {"year": 2014}, "images": LIST, "none": [], "n": 12, "last": None}
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=chunk == 2).replace("\ud83d", "?"), encoding="utf-8")
    expected = json.loads(path.read_text(encoding="utf-8"))
    flat = [("info", expected["info"]), *(("images", one) for one in expected["images"]), ("n", 12), ("last", None)]
    assert list(elements(str(path))) == flat
    path.write_text(json.dumps([1, 23, *LIST]))
    assert list(elements(str(path))) == [(None, one) for one in [1, 23, *LIST]]


@pytest.mark.parametrize("text", ["[]", "{}", " [ ] ", "\ufeff[]", '{"a": []}'])
def test_what_is_empty_has_no_elements(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    assert list(elements(str(tmp_path / "a.json"))) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "3",
        "[1,",
        "[1 2]",
        '{"a" 1}',
        '{"a": 1',
        "{3: 1}",
        "[1] x",
        '[{"a": 1}',
        "nonsense",
        "[" * 100_000,
        "[,]",
    ],
    ids=range(13),
)
def test_what_is_broken_or_cut_short_is_refused_by_name(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(BadData, match=r"a\.json is not JSON, or it is cut short or damaged"):
        list(elements(str(tmp_path / "a.json")))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MissingFile, match="There is no file"):
        list(elements(str(tmp_path / "a.json")))


def test_another_encoding_is_named(tmp_path):
    (tmp_path / "a.json").write_bytes('[{"caption": "café"}]'.encode("latin-1"))
    with pytest.raises(BadData, match=r"a\.json is not UTF-8"):
        list(elements(str(tmp_path / "a.json")))
    (tmp_path / "a.json").write_bytes('[{"caption": "猫'.encode()[:-1])
    with pytest.raises(BadData, match="cut short in the middle of a letter"):
        list(elements(str(tmp_path / "a.json")))
