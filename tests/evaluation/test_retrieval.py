"""Recall, chance and re-ranking, worked by hand."""

import math

import pytest
import torch

from blip2.evaluation.retrieval import (
    best_candidates,
    best_ranks,
    chance_recall,
    correct_pairs,
    recall_at,
    recalls,
    rerank,
    same_text,
)

SIMILARITY = torch.tensor([[0.9, 0.5, 0.1], [0.4, 0.3, 0.2], [0.6, 0.7, 0.1]])
OWN = torch.eye(3, dtype=torch.bool)


def test_the_rank_is_that_of_the_best_correct_candidate():
    assert best_ranks(SIMILARITY, OWN).tolist() == [1, 2, 3]
    several = torch.tensor([[False, True, True], [True, False, True], [True, False, False]])
    assert best_ranks(SIMILARITY, several).tolist() == [2, 1, 2]


def test_recall_counts_ranks_up_to_k():
    ranks = torch.tensor([1, 2, 3, 11])
    assert [recall_at(ranks, k) for k in (1, 2, 10, 11)] == [0.25, 0.5, 0.75, 1.0]
    assert recalls(SIMILARITY, OWN) == {"r1": pytest.approx(1 / 3), "r5": 1.0, "r10": 1.0}


def test_equal_scores_find_nothing():
    assert best_ranks(torch.zeros(2, 5), torch.eye(5, dtype=torch.bool)[:2]).tolist() == [5, 5]


def test_a_label_that_nothing_speaks_for_comes_last():
    scores = torch.tensor([[0.1, -math.inf, -0.5]])
    assert best_ranks(scores, torch.tensor([[False, True, False]])).tolist() == [3]


@pytest.mark.parametrize(
    ("first", "second", "is_same"),
    [
        ("A cat.", "cat", True),
        ("the Moon", "moon", True),
        ("“Toilets”", "toilets", True),
        ("cat", "cats", False),
        ("keycap: *", "keycap: #", False),
        ("a", "a", True),
    ],
)
def test_texts_no_picture_could_tell_apart_are_one(first, second, is_same):
    assert (same_text(first) == same_text(second)) == is_same


def test_equal_captions_of_other_pictures_are_correct_too():
    correct = correct_pairs([("a stopwatch",), ("stopwatch",), ("dog", "a hound")], ["a stopwatch", "dog", "Stopwatch"])
    assert correct.tolist() == [[True, False, True], [True, False, True], [False, True, False]]


def test_chance_is_what_a_random_order_finds():
    correct = torch.tensor([[True, False, False, False], [True, True, False, False]])
    assert chance_recall(correct, 1) == pytest.approx((1 / 4 + 2 / 4) / 2)
    assert chance_recall(correct, 3) == pytest.approx((3 / 4 + 1) / 2)


def test_chance_agrees_with_drawing_orders():
    torch.manual_seed(0)
    correct = torch.rand(20, 12) < 0.2
    correct[:, 0] = True
    drawn = [recall_at(best_ranks(torch.rand(20, 12), correct), 5) for _ in range(400)]
    assert sum(drawn) / len(drawn) == pytest.approx(chance_recall(correct, 5), abs=0.02)  # 4 standard errors


def test_reranking_adds_the_match_score_to_the_similarity_of_the_candidates():
    candidates = best_candidates(SIMILARITY, 2)
    pairs = candidates.pairs.tolist()
    # best two texts of each image: (0: 0, 1), (1: 0, 1), (2: 1, 0); of each text: (0: 0, 2), (1: 2, 0), (2: 1, 0)
    assert pairs == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1]]
    scores = torch.tensor([5.0 if image == text else -1.0 for image, text in pairs])
    reranked = rerank(SIMILARITY, candidates, scores)
    assert reranked.image_to_text[1, :2].tolist() == pytest.approx([0.4 - 1, 0.3 + 5])
    assert best_ranks(reranked.image_to_text, OWN).tolist() == [1, 1, 3]  # image 2's text is no candidate
    assert best_ranks(reranked.text_to_image, OWN).tolist() == [1, 3, 3]


def test_what_is_no_candidate_keeps_the_order_of_its_cosine_below_all_candidates():
    candidates = best_candidates(SIMILARITY, 1)
    scores = rerank(SIMILARITY, candidates, torch.full((len(candidates.pairs),), -50.0)).image_to_text
    assert scores.argsort(dim=1, descending=True).tolist() == [[0, 1, 2], [0, 1, 2], [1, 0, 2]]


def test_reranking_all_candidates_is_scoring_all_pairs():
    torch.manual_seed(0)
    similarity, scores = torch.rand(6, 9), torch.randn(6, 9)
    candidates = best_candidates(similarity, 9)
    reranked = rerank(similarity, candidates, scores[tuple(candidates.pairs.T)])
    assert torch.equal(reranked.image_to_text, similarity + scores)
    assert torch.equal(reranked.text_to_image, (similarity + scores).T)


def test_searching_one_way_matches_only_its_candidates():
    candidates = best_candidates(SIMILARITY, 1, both_ways=False)
    assert candidates.pairs.tolist() == [[0, 0], [1, 0], [2, 1]]
    assert rerank(SIMILARITY, candidates, torch.zeros(3)).text_to_image is None


def test_odds_learnt_against_the_negatives_of_contrast_recover_the_true_order():
    """An ideal ITM, whose negatives come from ITC's softmax, added to a wrong ITC gives the true probabilities."""
    torch.manual_seed(0)
    truth = torch.randn(5, 7).log_softmax(dim=1)
    similarity, temperature = torch.rand(5, 7), 0.1
    drawn = (similarity / temperature).log_softmax(dim=1)  # how often a text is drawn as a negative
    candidates = best_candidates(similarity, 7, both_ways=False)
    ideal_odds = (truth - drawn)[tuple(candidates.pairs.T)]
    scores = rerank(similarity / temperature, candidates, ideal_odds).image_to_text
    assert torch.allclose(scores.log_softmax(dim=1), truth, atol=1e-5)
