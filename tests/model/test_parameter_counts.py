"""The published sizes, to the unit, counted from shapes alone (no memory is spent on the meta device)."""

import pytest
import torch

from blip2.model.config import QFormerConfig
from blip2.model.stage1 import Blip2Stage1
from blip2.model.stage2 import Blip2Stage2

VIT_G, VIT_L = 1408, 1024
OPT_2_7B, OPT_6_7B, FLAN_T5_XXL, FLAN_T5_XL = 2560, 4096, 4096, 2048


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("vision_width", "expected"), [(VIT_G, 186_705_470), (VIT_L, 183_165_758)])
def test_stage_1_trains_as_many_parameters_as_the_original(vision_width: int, expected: int) -> None:
    with torch.device("meta"):
        assert count(Blip2Stage1(None, QFormerConfig(encoder_hidden_size=vision_width))) == expected


def test_the_q_former_with_its_language_head_and_queries_is_the_papers_188_million() -> None:
    with torch.device("meta"):
        model = Blip2Stage1(None, QFormerConfig())
    parts = (model.qformer, model.embeddings, model.lm_head)
    assert sum(count(part) for part in parts) + model.query_tokens.numel() == 186_307_387


@pytest.mark.parametrize(
    ("vision_width", "language_width", "expected"),
    [
        (VIT_G, OPT_2_7B, 107_133_696),
        (VIT_G, OPT_6_7B, 108_314_880),
        (VIT_G, FLAN_T5_XXL, 108_314_880),
        (VIT_G, FLAN_T5_XL, 106_739_968),
        (VIT_L, OPT_2_7B, 103_593_984),
        (VIT_L, FLAN_T5_XL, 103_200_256),
    ],
)
def test_stage_2_trains_as_many_parameters_as_the_original(
    vision_width: int, language_width: int, expected: int
) -> None:
    with torch.device("meta"):
        config = QFormerConfig(encoder_hidden_size=vision_width)
        assert count(Blip2Stage2(None, config, None, language_width=language_width)) == expected
