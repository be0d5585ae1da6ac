"""BLEU, ROUGE-L and CIDEr-D, worked by hand; the noun rule on real labels."""

import math

import pytest

from blip2.evaluation.captions import bleu, cider_d, rouge_l, words
from blip2.evaluation.nouns import head_noun, names, says_exactly


def test_words_are_lower_case_without_punctuation():
    assert words("A man’s hat: two-tone, 3.5 cm!") == ["a", "man's", "hat", "two-tone", "3.5", "cm"]


def test_bleu_of_the_textbook_example():
    # "the" occurs twice in the reference, so two of seven count; no bigram does
    scores = bleu(["the the the the the the the"], [["the cat is on the mat"]])
    assert scores == [pytest.approx(2 / 7), 0.0, 0.0, 0.0]


def test_bleu_takes_the_geometric_mean_and_punishes_brevity():
    # 3 of 3 words, 1 of 2 bigrams ("on the"), closest reference has 5 words
    brevity = math.exp(1 - 5 / 3)
    scores = bleu(["cat on the"], [["cat sat on the mat", "there is a cat that sits on the mat"]])
    assert scores[:2] == [pytest.approx(brevity), pytest.approx(brevity * math.sqrt(1 / 2))]


def test_bleu_sums_over_the_corpus_before_it_divides():
    scores = bleu(["a cat", "dog dog dog dog"], [["a cat"], ["a dog ran off"]])
    assert scores[0] == pytest.approx(3 / 6)


def test_rouge_l_weighs_the_longest_common_subsequence():
    # "police kill the gunman": common subsequence "police the gunman" = 3 of 4 and 3 of 4
    assert rouge_l(["police kill the gunman"], [["police killed the gunman"]]) == pytest.approx(3 / 4)
    precision, recall = 1 / 1, 1 / 3
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert rouge_l(["cat"], [["a black cat"]]) == pytest.approx(expected)
    assert rouge_l([""], [["a cat"]]) == 0.0


def test_cider_d_of_perfect_two_word_captions_is_five():
    # unigrams and bigrams match, three and four words do not exist: 10 * (1 + 1 + 0 + 0) / 4
    assert cider_d(["a cat", "a dog"], [["a cat"], ["a dog"]]) == pytest.approx(5.0)


def test_cider_d_weighs_words_by_how_rare_they_are_and_punishes_length():
    # picture 1: candidate "cat", reference "a cat" ("a" is in both pictures, so it weighs log(2/2) = 0)
    #   unigrams: cosine 1; bigrams: the candidate has none; length differs by one: exp(-1 / 72)
    # picture 2: candidate "a cat", reference "a dog": no weighty word in common
    score = cider_d(["cat", "a cat"], [["a cat"], ["a dog"]])
    assert score == pytest.approx((10 * 1 / 4 * math.exp(-1 / 72) + 0) / 2)


def test_cider_d_clips_what_is_repeated():
    # weights log 2 = w for cat; candidate 3w clipped to w: w * w / (3w * w); length differs by two
    score = cider_d(["cat cat cat", "dog"], [["cat"], ["dog"]])
    assert score == pytest.approx((10 / 4 * (1 / 3) * math.exp(-4 / 72) + 10 / 4) / 2)


def test_cider_d_averages_over_references():
    one = cider_d(["red cat", "dog"], [["red cat"], ["dog"]])
    two = cider_d(["red cat", "dog"], [["red cat", "bird"], ["dog"]])
    assert two < one


@pytest.mark.parametrize(
    ("label", "head"),
    [
        ("a red apple", "apple"),
        ("grinning face with big eyes", "face"),
        ("person playing handball", "person"),
        ("woman in steamy room", "woman"),
        ("building construction", "construction"),
        ("wedding ring", "ring"),
        ("mending heart", "heart"),
        ("flag: greenland", "greenland"),
        ("flag: myanmar (burma)", "myanmar"),
        ("flag: st. pierre & miquelon", "st pierre miquelon"),
        ("family: woman, woman, girl", "woman woman girl"),
        ("keycap: *", "keycap"),
        ("keycap: 4", "4"),
        ("woman’s sandal", "sandal"),
        ("bow and arrow", "bow"),
        ("no smoking", "smoking"),
        ("two-thirty", "two-thirty"),
        ("cat", "cat"),
    ],
)
def test_the_head_noun_of_a_label(label, head):
    assert " ".join(head_noun(label)) == head


@pytest.mark.parametrize(
    ("caption", "label", "is_named"),
    [
        ("a red apple", "green apple", True),
        ("two apples on a table", "green apple", True),
        ("a pineapple", "green apple", False),
        ("flag of Greenland", "flag: greenland", True),
        ("flag: france", "flag: greenland", False),
        ("keycap four", "keycap: 4", True),
        ("three women and a knife", "woman", True),
        ("three knives", "kitchen knife", True),
        ("pink cookies and cherry", "cookie", True),
        ("cherries", "cherry", True),
        ("a bus", "bus", True),
        ("buses", "bus", True),
        ("bow and arrow", "bow and arrow", True),
        ("an arrow", "bow and arrow", False),
        ("", "cat", False),
    ],
)
def test_a_caption_names_what_is_shown(caption, label, is_named):
    assert names(caption, label) == is_named


def test_exact_captions_may_differ_in_article_and_punctuation():
    assert says_exactly("A cat.", "cat") and says_exactly("flag france", "flag: france")
    assert not says_exactly("cats", "cat") and not says_exactly("a black cat", "cat")
