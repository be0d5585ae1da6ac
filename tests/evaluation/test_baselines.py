"""The simple methods on made-up features where the right result is known."""

import numpy as np
import pytest

from blip2.evaluation.baselines import concept_scores, ridge, ridge_scores, whitening


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_a_label_scores_as_its_nearest_picture():
    gallery = np.array([[2.0, 0.0], [0.0, 2.0], [-2.0, 0.0], [0.0, -2.0]])  # mean 0
    pictures = np.array([[1.0, 0.0], [0.0, -3.0]])
    scores = concept_scores(pictures, gallery, ["east", "north", "west", "east"], ["west", "east", "unknown"])
    assert scores.tolist() == [[-1.0, 1.0, -np.inf], [0.0, 1.0, -np.inf]]


def test_the_gallerys_mean_is_taken_off():
    gallery = np.array([[12.0, 5.0], [10.0, 7.0], [8.0, 5.0], [10.0, 3.0]])
    moved = concept_scores(np.array([[11.0, 5.0]]), gallery, ["e", "n", "w", "s"], ["w", "e"])
    assert moved.tolist() == [[-1.0, 1.0]]


def test_whitening_makes_pictures_of_one_concept_scatter_alike(rng):
    concepts = np.repeat(np.arange(400), 3)
    style = rng.normal(size=(1200, 4)) * [10.0, 1.0, 1.0, 0.5]
    features = rng.normal(size=(400, 4))[concepts] + style
    white = features @ whitening(features, [str(concept) for concept in concepts])
    inside = white - np.stack([white[concepts == c].mean(axis=0) for c in range(400)])[concepts]
    spread = np.linalg.eigvalsh(inside.T @ inside / len(inside))
    assert spread.max() / spread.min() < 15  # 400 before; what is left is the shrinkage
    assert spread.max() < 1.2


def test_whitening_finds_concepts_where_style_drowns_them(rng):
    shapes = rng.normal(size=(60, 16))
    drowning = np.array([6.0, 6.0] + [0.1] * 14)

    def draw():
        return shapes + rng.normal(size=shapes.shape) * drowning

    labels = [str(i) for i in range(60)]
    gallery, queries = np.concatenate([draw(), draw(), draw()]), draw()
    plain = concept_scores(queries, gallery, labels * 3, labels).argmax(axis=1)
    matrix = whitening(gallery, labels * 3)
    white = concept_scores(queries @ matrix, gallery @ matrix, labels * 3, labels).argmax(axis=1)
    assert (plain == np.arange(60)).mean() < 0.6
    assert (white == np.arange(60)).mean() > 0.9


def test_ridge_finds_a_linear_law(rng):
    inputs, law = rng.normal(size=(300, 5)) * [1, 100, 1, 1, 1] + 7, rng.normal(size=(5, 3))
    predict = ridge(inputs, inputs @ law + 2)
    fresh = rng.normal(size=(10, 5)) * [1, 100, 1, 1, 1] + 7
    assert np.abs(predict(fresh) - (fresh @ law + 2)).max() < 0.3  # of values of about 150


def test_ridge_equals_the_normal_equations(rng):
    inputs, targets = rng.normal(size=(200, 10)), rng.normal(size=(200, 2))
    predict = ridge(inputs, targets, [30.0])
    standard = (inputs - inputs.mean(axis=0)) / (inputs.std(axis=0) + 1e-8)
    normal = standard.T @ standard + 30 * np.eye(10)
    weights = np.linalg.solve(normal, standard.T @ (targets - targets.mean(axis=0)))
    assert np.allclose(predict(inputs), standard @ weights + targets.mean(axis=0))


def test_scores_of_ridge_are_cosines_from_the_centre():
    scores = ridge_scores(np.array([[2.0, 1.0]]), np.array([[3.0, 1.0], [1.0, 5.0]]), np.array([1.0, 1.0]))
    assert scores.tolist() == [[1.0, 0.0]]
