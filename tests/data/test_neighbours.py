"""Neighbours are near, other than the sample they are drawn for, and every near one comes up."""

import numpy as np

from blip2.data.neighbours import Neighbours

DISTINCT = ["black cat", "car", "cat", "lorry", "white cat"]
EMBEDS = np.array([[1, 0.1], [0.1, 1], [1, 0], [0, 1], [1, -0.1]]) / np.sqrt([[1.01], [1.01], [1], [1], [1.01]])
NAMES = ["cat", "car", "black cat", "cat", "white cat", "lorry"]


def drawn(index, nearest, times=60):
    rng = np.random.default_rng(0)
    neighbours = Neighbours(NAMES, DISTINCT, EMBEDS, nearest)
    return {neighbours.draw(index, rng) for _ in range(times)}


def test_all_samples_of_the_nearest_texts_come_up_and_no_others():
    assert drawn(0, 2) == {2, 4}  # a cat's own other picture is no neighbour
    assert drawn(2, 1) == {0, 3}  # both pictures of the text "cat"
    assert drawn(1, 1) == {5}


def test_no_text_has_more_neighbours_than_there_are_others():
    assert drawn(5, 99) == {0, 1, 2, 3, 4}


def test_a_lone_text_has_itself():
    alone = Neighbours(["cat", "cat"], ["cat"], np.array([[1.0, 0.0]]))
    assert alone.draw(1, np.random.default_rng(0)) == 1


def test_the_nearest_are_those_of_a_full_sort():
    rng = np.random.default_rng(1)
    embeds = rng.normal(size=(2100, 5))  # more than are compared at once
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    names = [str(i) for i in range(2100)]
    neighbours = Neighbours(names, names, embeds, 3)
    for index in (0, 1023, 1024, 2099):
        similarity = embeds @ embeds[index]
        similarity[index] = -2
        expected = set(np.argsort(-similarity)[:3].tolist())
        assert {neighbours.draw(index, rng) for _ in range(100)} == expected
