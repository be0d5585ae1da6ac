"""Prefix language modelling: where captions are split."""

from collections import Counter

from blip2.objectives.language_modeling import split_caption


def test_prefix_and_suffix_are_the_caption():
    caption = "a red fox jumps over a lazy dog today"
    for step in range(100):
        prefix, suffix = split_caption(caption, step / 100)
        assert f"{prefix} {suffix}" == caption
        assert 1 <= len(prefix.split()) <= 4


def test_every_place_up_to_the_middle_is_as_likely():
    counts = Counter(len(split_caption("one two three four five six", step / 300)[0].split()) for step in range(300))
    assert counts == {1: 100, 2: 100, 3: 100}


def test_a_caption_too_short_to_split_is_all_suffix():
    assert split_caption("fox", 0.99) == ("", "fox")
    assert split_caption("", 0.5) == ("", "")
    assert split_caption("red fox", 0.99) == ("red", "fox")
