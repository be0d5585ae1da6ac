"""The example of a filter refuses what it lists, as it is written and otherwise, and nothing else."""

import pytest

from blip2.errors import MissingFile, UserError
from blip2.inference.safety import Filter, WordList, load_filter


@pytest.mark.parametrize(
    ("text", "is_refused"),
    [
        ("a bad thing", True),
        ("BAD", True),
        ("a very  Bad\nword here", True),
        ("ｂａｄ", True),
        ("cafe\u0301 au lait", True),
        ("café", True),
        ("badge", False),
        ("not-bad!", True),
        ("", False),
    ],
)
def test_whole_words_are_found_whatever_their_spelling(text, is_refused):
    words = WordList(["bad", "café", "very bad word"])
    assert words.refuses_reply(text) == is_refused
    assert (words.refuses_request(["fine", text], []) is not None) == is_refused


def test_a_refusal_does_not_tell_the_word():
    assert "bad" not in WordList(["bad"]).refuses_request(["bad"], [])


def test_a_list_is_read_from_a_file(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("# remark\nbad\n\nvery bad\n", encoding="utf-8")
    found = load_filter(f"words:{path}")
    assert isinstance(found, Filter) and found.refuses_reply("so bad") and not found.refuses_reply("remark")
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="no UTF-8 text"):
        load_filter(f"words:{path}")
    with pytest.raises(MissingFile):
        load_filter("words:nowhere")
    path.write_text("# only a remark\n", encoding="utf-8")
    with pytest.raises(UserError, match="is empty"):
        load_filter(f"words:{path}")


def test_a_deployments_own_filter_is_imported(tmp_path, monkeypatch):
    (tmp_path / "house_rules.py").write_text(
        "class Rules:\n"
        "    def refuses_request(self, texts, images):\n        return 'no' if images else None\n"
        "    def refuses_reply(self, text):\n        return False\n"
        "half = object()\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_filter("house_rules:Rules").refuses_request([], [None]) == "no"
    with pytest.raises(UserError, match="lacks refuses_request"):
        load_filter("house_rules:half")
    with pytest.raises(UserError, match="There is no filter"):
        load_filter("house_rules:nothing")
