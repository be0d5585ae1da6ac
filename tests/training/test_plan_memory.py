"""The bytes that a plan says a step keeps are those that autograd keeps, counted in real steps."""

import pytest
import torch
from torch import nn

from blip2.inference.stage1_losses import Stage1Batch
from blip2.model.config import QFormerConfig
from blip2.model.stage1 import Blip2Stage1, Text
from blip2.training import step_cost
from blip2.training.frozen_cost import ImageFeatures, PartCost
from blip2.training.plan import Options, make_plan
from blip2.training.qformer_cost import Arithmetic, Pass, pass_bytes
from blip2.training.recipe import recipe_from_settings
from blip2.training.stage1 import Stage1Step
from blip2.training.stage2 import Stage2Batch

from .tiny_blip2 import build_in, make_parts, tiny_recipe

ROWS, TEXT, IMAGE_TOKENS, WIDTH = 6, 12, 40, 96
LOG_SOFTMAX = 4 / step_cost.LOGITS_BYTES  # what the forward pass keeps of what the logits take at their worst


def kept_bytes(module, batch, *, autocast=False):
    """What the forward pass keeps for the backward pass, weights left out, each tensor's memory once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in module.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    module.train()
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        loss = module(batch)["loss"]
    loss.backward()
    return sum(kept.values())


def small(dropout, attention_dropout, **training):
    """A stage-1 model of some size, and the parts and recipe of its plan."""
    config = QFormerConfig(
        vocab_size=500,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        intermediate_size=768,
        encoder_hidden_size=WIDTH,
        num_query_tokens=16,
        embed_dim=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=attention_dropout,
    )
    recipe = recipe_from_settings(
        {
            "stage": "stage1",
            "name": "small",
            "model": {"num_query_tokens": 16, "language": None},
            "data": {"mixture": [{"split": "train"}]},
            "training": {"steps": 1, "batch_size": ROWS, **training},
        },
        "small",
    )
    model = Blip2Stage1(None, config)
    parts = step_cost.StepParts(nn.Identity(), ImageFeatures(IMAGE_TOKENS, WIDTH), 32, config, model, None)
    return recipe, parts, model


def texts(rows, tokens):
    return Text(torch.randint(5, 60, (rows, tokens)), torch.ones(rows, tokens, dtype=torch.long))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("dropout", "attention_dropout"), [(0.0, 0.0), (0.1, 0.0), (0.1, 0.1)])
@pytest.mark.parametrize("training", [{}, {"matched_share": 0.5}, {"itm_weight": 0, "itg_weight": 0}])
def test_stage_1_keeps_what_is_foretold(precision, dropout, attention_dropout, training):
    recipe, parts, model = small(dropout, attention_dropout, **training)
    settings = step_cost.StepSettings(text_tokens=TEXT)
    found = step_cost.PartCosts(PartCost(0), None)
    arithmetic = Arithmetic.of(precision, is_gpu=False)
    kept = step_cost.kept(recipe, parts, step_cost.Lengths(TEXT), settings, found, arithmetic, own=ROWS, world=ROWS)
    weights = (recipe.training.itc_weight, recipe.training.itm_weight, recipe.training.itg_weight)
    step = Stage1Step(model, bos_id=499, weights=weights, matched_share=recipe.training.matched_share)
    batch = Stage1Batch(torch.randn(ROWS, IMAGE_TOKENS, WIDTH), texts(ROWS, TEXT), torch.arange(ROWS))
    real = kept_bytes(step, batch, autocast=precision == "bfloat16")
    foretold = ROWS * (kept.activations + kept.logits * LOG_SOFTMAX) + kept.weight_copies
    assert foretold == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("stage", ["stage2", "instruct"])
@pytest.mark.parametrize("decoder_only", [True, False])
def test_stage_2_keeps_what_is_foretold(tmp_path, stage, decoder_only):
    make_parts(tmp_path, decoder_only=decoder_only)
    recipe = tiny_recipe(tmp_path, stage)
    settings = step_cost.StepSettings(text_tokens=TEXT)
    parts = step_cost.step_parts(recipe, settings, "float32")
    length = step_cost.lengths(recipe, settings, parts.language)
    found = step_cost.part_costs(parts, length, settings)
    arithmetic = Arithmetic.of("float32", is_gpu=False)
    rows = recipe.training.batch_size
    kept = step_cost.kept(recipe, parts, length, settings, found, arithmetic, own=rows, world=rows)
    batch = Stage2Batch(
        torch.randn(rows, parts.image.num_tokens, parts.image.width),
        texts(rows, length.prompt),
        texts(rows, length.target),
        texts(rows, TEXT) if stage == "instruct" else None,
    )
    real = kept_bytes(build_in(tmp_path, recipe, tmp_path / "run").module, batch)
    # a T5 of two layers computes its own loss beside, and its masks weigh something beside so narrow layers
    assert rows * (kept.activations + kept.logits * LOG_SOFTMAX) == pytest.approx(
        real, rel=0.1 if decoder_only else 0.2
    )


@pytest.mark.parametrize("attention_dropout", [0.0, 0.1])
def test_rows_that_see_their_own_images_keep_as_much_each(attention_dropout):
    """As those do whose answers are classified: two and two thirds beside each that the LLM answers."""
    _, parts, _ = small(0.1, attention_dropout)
    arithmetic = Arithmetic.of("float32", is_gpu=False)
    one, more = (
        pass_bytes(Pass("answers", rows, queries=16, text=TEXT), parts.config, IMAGE_TOKENS, arithmetic)
        for rows in (1, 8 / 3)
    )
    assert more == pytest.approx(8 / 3 * one)


def test_recomputing_layers_keeps_a_fraction():
    recipe = recipe_from_settings(
        {
            "stage": "stage2",
            "name": "trial",
            "model": {"vision": "openai/clip-vit-large-patch14", "language": "facebook/opt-2.7b"}
            | {"text_init": "bert-base-uncased"},
            "data": {"mixture": [{"split": "train"}]},
            "training": {"steps": 1, "batch_size": 32},
        },
        "trial",
    )
    plain, again = (
        {part.name: part.bytes for part in make_plan(recipe, Options(activation_checkpointing=wanted)).memory}
        for wanted in (False, True)
    )
    assert again["activations"] < plain["activations"] / 5
    assert {name for name in plain if plain[name] != again[name]} == {"activations", "gaps between blocks"}
