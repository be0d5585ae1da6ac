"""The rows of the open set's table: what is measured, what is wanted, and what stands beside it."""

from blip2.evaluation.report import Bars, Row

_STYLE, _CONCEPTS = "retrieval/held_out_style", "retrieval/held_out_concepts"
_NEAREST, _WHITENED = (
    "baselines/nearest_neighbour/held_out_style",
    "baselines/nearest_neighbour_whitened/held_out_style",
)
_RIDGE_STYLE, _RIDGE = "baselines/ridge/held_out_style", "baselines/ridge/held_out_concepts"
_SCENES = "retrieval/new_scenes"
_NOUNS, _RIDGE_NOUNS = "retrieval/held_out_nouns", "baselines/ridge/held_out_nouns"


def _retrieval(
    title: str, prefix: str, name: str, peers: dict[str, str], wanted: float | None = None, goal: float | None = None
) -> Row:
    direction, _, recall = name.rpartition("_r")
    beside = {label: f"{key}/{name}" for label, key in peers.items()}
    return Row(f"{title}, {direction.replace('_', ' ')} R@{recall}", f"{prefix}/{name}", beside, wanted, goal)


_STYLE_PEERS = {"nearest neighbour": _NEAREST, "whitened": _WHITENED, "ridge": _RIDGE_STYLE}
_CONCEPT_PEERS = {"ridge": _RIDGE}

ROWS = (
    _retrieval("new style", _STYLE, "image_to_text_r1", _STYLE_PEERS, wanted=0.45, goal=0.60),
    _retrieval("new style", _STYLE, "image_to_text_r5", _STYLE_PEERS),
    _retrieval("new style", _STYLE, "image_to_text_r10", _STYLE_PEERS),
    Row(
        "new style, image to text, re-ranked R@1",
        f"{_STYLE}/image_to_text_reranked_r1",
        {
            "not re-ranked": f"{_STYLE}/image_to_text_r1",
            "by unweighted log-odds": f"{_STYLE}/image_to_text_reranked_unweighted_r1",
            "by the original's sum": f"{_STYLE}/image_to_text_reranked_as_original_r1",
            "chance": f"{_STYLE}/chance",
        },
    ),
    _retrieval("new style", _STYLE, "text_to_image_r1", _STYLE_PEERS),
    Row(
        "new style, text to image, re-ranked R@1",
        f"{_STYLE}/text_to_image_reranked_r1",
        {
            "not re-ranked": f"{_STYLE}/text_to_image_r1",
            "by unweighted log-odds": f"{_STYLE}/text_to_image_reranked_unweighted_r1",
            "by the original's sum": f"{_STYLE}/text_to_image_reranked_as_original_r1",
        },
    ),
    _retrieval("new concepts", _CONCEPTS, "image_to_text_r1", _CONCEPT_PEERS, wanted=0.35, goal=0.45),
    _retrieval("new concepts", _CONCEPTS, "image_to_text_r5", _CONCEPT_PEERS),
    _retrieval("new concepts", _CONCEPTS, "image_to_text_r10", _CONCEPT_PEERS, wanted=0.65, goal=0.75),
    Row(
        "new concepts, image to text, re-ranked R@1",
        f"{_CONCEPTS}/image_to_text_reranked_r1",
        {
            "not re-ranked": f"{_CONCEPTS}/image_to_text_r1",
            "by unweighted log-odds": f"{_CONCEPTS}/image_to_text_reranked_unweighted_r1",
            "by the original's sum": f"{_CONCEPTS}/image_to_text_reranked_as_original_r1",
            "chance": f"{_CONCEPTS}/chance",
        },
    ),
    _retrieval("new concepts", _CONCEPTS, "text_to_image_r1", _CONCEPT_PEERS),
    _retrieval("new nouns", _NOUNS, "image_to_text_r1", {"ridge": _RIDGE_NOUNS}),
    _retrieval("new nouns", _NOUNS, "image_to_text_r10", {"ridge": _RIDGE_NOUNS}),
    _retrieval("new scenes", _SCENES, "image_to_text_r1", {}),
    Row(
        "new scenes, image to text, re-ranked R@1",
        f"{_SCENES}/image_to_text_reranked_r1",
        {
            "not re-ranked": f"{_SCENES}/image_to_text_r1",
            "by unweighted log-odds": f"{_SCENES}/image_to_text_reranked_unweighted_r1",
            "by the original's sum": f"{_SCENES}/image_to_text_reranked_as_original_r1",
            "chance": f"{_SCENES}/chance",
        },
    ),
    _retrieval("new scenes", _SCENES, "text_to_image_r1", {}),
    Row(
        "new scenes, text to image, re-ranked R@1",
        f"{_SCENES}/text_to_image_reranked_r1",
        {
            "not re-ranked": f"{_SCENES}/text_to_image_r1",
            "by unweighted log-odds": f"{_SCENES}/text_to_image_reranked_unweighted_r1",
            "by the original's sum": f"{_SCENES}/text_to_image_reranked_as_original_r1",
        },
    ),
    Row(
        "new scenes, questions",
        "vqa/new_scenes/accuracy",
        {
            "question prior": "vqa/new_scenes/question_prior",
            "shuffled pictures": "vqa/shuffled/accuracy",
            "majority": "vqa/new_scenes/majority",
        },
        wanted=0.80,
        goal=0.90,
    ),
    Row(
        "new scenes, questions, blind",
        "vqa/blind/accuracy",
        {"seeing": "vqa/new_scenes/accuracy"},
        at_most_below=("vqa/new_scenes/accuracy", 0.25),
    ),
    Row(
        "new pairs of nouns, questions",
        "vqa/new_noun_pairs/accuracy",
        {"question prior": "vqa/new_noun_pairs/question_prior", "majority": "vqa/new_noun_pairs/majority"},
        wanted=0.70,
        goal=0.80,
    ),
    Row(
        "easy-VQA test",
        "easy_vqa/test/accuracy",
        {
            "question prior": "easy_vqa/test/question_prior",
            "blind": "easy_vqa/blind/accuracy",
            "majority": "easy_vqa/test/majority",
        },
        wanted=0.90,
    ),
    Row(
        "new style, captions name the noun",
        "captions/held_out_style/noun_accuracy",
        {
            "greedy": "captions/held_out_style/greedy_noun_accuracy",
            "nearest neighbour": f"{_NEAREST}/noun_accuracy",
            "commonest noun": "captions/held_out_style/most_common_noun",
        },
        wanted=0.45,
        goal=0.60,
    ),
    Row(
        "new style, captions are the label",
        "captions/held_out_style/exact",
        {"greedy": "captions/held_out_style/greedy_exact"},
    ),
    Row(
        "new style, captions, CIDEr-D (0 to 1000)",
        "captions/held_out_style/cider",
        {"greedy": "captions/held_out_style/greedy_cider"},
    ),
)

KINDS = ("what", "count", "colour", "exists", "relation", "left", "right", "above", "below")
PLOTS = {
    "retrieval.png": [
        Bars(
            title,
            ("image_to_text_r1", "image_to_text_r5", "image_to_text_r10", "text_to_image_r1"),
            {"this model": prefix} | peers,
        )
        for title, prefix, peers in (
            ("a style never trained on", _STYLE, _STYLE_PEERS),
            ("concepts never trained on", _CONCEPTS, _CONCEPT_PEERS),
        )
    ],
    "vqa.png": [
        Bars(
            "new scenes, by kind of question",
            ("accuracy", *KINDS),
            {"this model": "vqa/new_scenes", "shuffled pictures": "vqa/shuffled", "blind": "vqa/blind"},
        )
    ],
}
