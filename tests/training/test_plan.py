"""A plan's parameters are the published ones, its operations those that torch counts, its days those of the paper."""

import json
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from blip2.cli import main
from blip2.errors import BadRecipe, UnknownModel
from blip2.inference.stage1_losses import Stage1Batch
from blip2.model import qformer
from blip2.model.stage1 import Text
from blip2.training import step_cost
from blip2.training.plan import Options, make_plan
from blip2.training.plan_report import as_text
from blip2.training.recipe import apply_overrides, read_recipe, recipe_from_settings
from blip2.training.stage2 import Stage2Batch

from .tiny_blip2 import build_in, make_parts, tiny_recipe

VIT_G, VIT_L = "Salesforce/blip2-opt-2.7b", "openai/clip-vit-large-patch14"
TEXT = 8  # tokens
SIXTEEN_A100 = {"gpu": "a100-40g", "gpus": 16}


def recipe_of(stage="stage1", *, vision=VIT_G, language=None, batch_size=64, **training):
    """A recipe of the paper's parts."""
    return recipe_from_settings(
        {
            "stage": stage,
            "name": "trial",
            "model": {"vision": vision, "language": language, "text_init": "bert-base-uncased"},
            "data": {"mixture": [{"split": "train"}]},
            "training": {"steps": 1000, "batch_size": batch_size, **training},
        },
        "trial",
    )


def counted(plan):
    """Parameters by part."""
    return {part.name: (part.frozen, part.trained) for part in plan.parameters}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A plan that opens a connection fails."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a plan opened a connection"))


# Parameters and operations, as published and as torch counts them


@pytest.mark.parametrize(("vision", "expected"), [(VIT_G, 186_705_470), (VIT_L, 183_165_758)])
def test_stage_1_trains_the_published_number_of_parameters(vision, expected):
    plan = make_plan(recipe_of(vision=vision), Options())
    assert sum(part.trained for part in plan.parameters) == expected


@pytest.mark.parametrize(
    ("vision", "language", "expected"),
    [
        (VIT_G, "facebook/opt-2.7b", 107_133_696),
        (VIT_G, "facebook/opt-6.7b", 108_314_880),
        (VIT_G, "google/flan-t5-xxl", 108_314_880),
        (VIT_L, "google/flan-t5-xl", 103_200_256),
    ],
)
def test_stage_2_trains_the_published_number_of_parameters(vision, language, expected):
    plan = make_plan(recipe_of("stage2", vision=vision, language=language), Options())
    assert sum(part.trained for part in plan.parameters) == expected


@pytest.mark.parametrize(
    ("language", "billions"),
    [("facebook/opt-2.7b", 2.65), ("google/flan-t5-xl", 2.85), ("lmsys/vicuna-7b-v1.1", 6.74)],
)
def test_a_frozen_llm_has_its_published_size(language, billions):
    frozen, trained = counted(make_plan(recipe_of("stage2", language=language), Options()))["language model"]
    assert (round(frozen / 1e9, 2), trained) == (billions, 0)


def test_the_image_encoders_have_their_published_sizes_less_the_last_layer():
    """Hugging Face adds a norm after the last layer, which is not used, and to the ViT-g's keys a bias of zeros."""
    vit_g, vit_l = (counted(make_plan(recipe_of(vision=name), Options()))["image encoder"] for name in (VIT_G, VIT_L))
    assert vit_g == (985_894_528 + 2 * 1408 + 39 * 1408, 0)
    assert vit_l == (290_581_504 + 2 * 1024, 0)


def test_what_the_mini_model_takes_and_trains_is_counted_by_part():
    parts = counted(make_plan(read_recipe("mini/stage1"), Options()))
    assert parts["Q-Former"][0] == 30_523 * 384  # the word embeddings stay MiniLM's
    assert parts["image encoder"][1] == 0 and "frozen sentence encoder" in parts


@pytest.mark.parametrize(("vision", "gflop"), [(VIT_G, 521), (VIT_L, 155)])
def test_a_picture_costs_an_encoder_what_the_formula_says(vision, gflop):
    """2 L [n (4 d^2 + 2 d m) + 2 n^2 d] and the patches."""
    recipe = recipe_of(vision=vision)
    parts = step_cost.step_parts(recipe, step_cost.StepSettings.of(recipe), "bfloat16")
    found = step_cost.part_costs(parts, step_cost.Lengths(32), step_cost.StepSettings.of(recipe))
    layers, n, d, m = (39, 257, 1408, 6144) if vision == VIT_G else (23, 257, 1024, 4096)
    formula = 2 * layers * (n * (4 * d * d + 2 * d * m) + 2 * n * n * d) + 2 * 256 * d * 3 * 14 * 14
    assert found.encoder.forward_flops == pytest.approx(formula, rel=1e-3)
    assert found.encoder.forward_flops == pytest.approx(gflop * 1e9, rel=0.005)


def test_a_stage_1_sample_costs_691_gflop():
    recipe = read_recipe("paper/stage1-vit-g")  # 759 where each pass projects the image anew, as the original does
    assert make_plan(recipe, Options()).flops_per_sample == pytest.approx(691e9, rel=0.005)


def text(rows, tokens):
    return Text(torch.full((rows, tokens), 6), torch.ones(rows, tokens, dtype=torch.long))


def counted_step(module, batch):
    """Operations of a real step, both ways, where nothing is computed again to save memory."""
    module.train()
    with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as counter:
        patch.setattr(qformer, "saves_memory", lambda _: False)
        module(batch)["loss"].backward()
    return counter.get_total_flops()


def test_the_operations_of_stage_1_are_those_that_torch_counts(tmp_path):
    make_parts(tmp_path)
    recipe = tiny_recipe(tmp_path, "stage1")
    plan = make_plan(recipe, Options(text_tokens=TEXT))
    rows, image_tokens, width = recipe.training.batch_size, 8, 32
    batch = Stage1Batch(torch.randn(rows, image_tokens, width), text(rows, TEXT), torch.arange(rows))
    found = counted_step(build_in(tmp_path, recipe, tmp_path / "run").module, batch)
    assert plan.flops_per_sample * rows == pytest.approx(found, rel=1e-3)


@pytest.mark.parametrize("stage", ["stage2", "instruct"])
@pytest.mark.parametrize("decoder_only", [True, False])
def test_the_operations_of_stage_2_are_those_that_torch_counts(tmp_path, stage, decoder_only):
    make_parts(tmp_path, decoder_only=decoder_only)
    recipe = tiny_recipe(tmp_path, stage)
    plan = make_plan(recipe, Options(text_tokens=TEXT))
    settings = step_cost.StepSettings.of(recipe)
    parts = step_cost.step_parts(recipe, settings, "float32")
    length = step_cost.lengths(recipe, step_cost.StepSettings(text_tokens=TEXT), parts.language)
    rows = recipe.training.batch_size
    instruction = text(rows, TEXT) if stage == "instruct" else None
    features = torch.randn(rows, 8, 32)
    batch = Stage2Batch(features, text(rows, length.prompt), text(rows, length.target), instruction)
    found = counted_step(build_in(tmp_path, recipe, tmp_path / "run").module, batch)
    # The decoder's first layer attends to embeddings that take no gradient: real sizes have 24 such layers, this has 2.
    assert plan.flops_per_sample * rows == pytest.approx(found, rel=1e-3 if decoder_only else 0.02)


def test_adapters_of_the_llm_are_counted(tmp_path):
    pytest.importorskip("peft")
    make_parts(tmp_path)
    recipe = apply_overrides(tiny_recipe(tmp_path, "stage2"), ["model.lora_rank=2"])
    plan = make_plan(recipe, Options(text_tokens=TEXT))
    module = build_in(tmp_path, recipe, tmp_path / "run").module
    adapters = sum(weight.numel() for name, weight in module.named_parameters() if ".lora_" in name)
    assert adapters > 0 and counted(plan)["language model"][1] == adapters
    plain = make_plan(tiny_recipe(tmp_path, "stage2"), Options(text_tokens=TEXT))
    assert plan.memory_bytes > plain.memory_bytes and plan.flops_per_sample > plain.flops_per_sample


def test_recomputing_layers_costs_another_forward_pass_of_them():
    recipe = recipe_of("stage2", language="facebook/opt-2.7b")
    plain = {part.name: part for part in make_plan(recipe, Options()).work}
    again = {part.name: part for part in make_plan(recipe, Options(activation_checkpointing=True)).work}
    for name in ("language model", "queries"):
        assert again[name].total - plain[name].total == pytest.approx(plain[name].forward)


# Days and money


@pytest.mark.parametrize(
    ("name", "utilisation", "days"),
    [("paper/stage1-vit-g", 0.12, 6), ("paper/stage2-flan-t5-xxl", 0.19, 3)],
)
def test_the_paper_s_runs_take_the_paper_s_days(name, utilisation, days):
    """Less than 6 and 3 days on 16 A100 of 40 GB for the largest model, at what these reached of their peak."""
    plan = make_plan(read_recipe(name), Options(**SIXTEEN_A100, utilisation=utilisation))
    assert plan.days == pytest.approx(days, rel=0.3)
    assert plan.fits


def test_days_follow_from_the_rate_and_the_price_from_the_days():
    plan = make_plan(recipe_of(), Options(gpus=4, utilisation=0.5, price=2.0))
    rate = 4 * 0.5 * 312e12 / plan.flops_per_sample
    assert plan.samples_per_second == pytest.approx(rate)
    assert plan.days == pytest.approx(1000 * 64 / rate / 86_400)
    assert plan.price == pytest.approx(plan.days * 24 * 4 * 2.0)


def test_a_processor_without_bfloat16_is_planned_for_in_float32():
    plan = make_plan(recipe_of(batch_size=4), Options(gpu="t4"))
    assert plan.precision == "float32"
    assert plan.samples_per_second == pytest.approx(0.4 * 8.1e12 / plan.flops_per_sample)


def test_this_computer_is_measured():
    plan = make_plan(read_recipe("mini/stage2"), Options(gpu="cpu"))
    assert 1e9 < plan.accelerator.float32_flops < 1e14
    assert plan.accelerator.memory_bytes > 2**30


# What does not fit


def test_what_does_not_fit_gets_settings_with_which_it_does():
    recipe = recipe_of("stage2", language="facebook/opt-6.7b", batch_size=256)
    plan = make_plan(recipe, Options(gpu="4090"))
    assert not plan.fits and len(plan.advice) >= 2
    accumulation = next(line for line in plan.advice if line.startswith("--set training.accumulation="))
    changed = apply_overrides(recipe, [accumulation.removeprefix("--set ").partition(":")[0]])
    mended = make_plan(changed, Options(gpu="4090"))
    assert mended.fits and mended.micro_batch < plan.micro_batch
    assert f"{mended.memory_bytes / 2**30:.1f} GiB" in accumulation


def test_no_smaller_number_of_parts_would_do():
    recipe = recipe_of("stage2", language="facebook/opt-6.7b", batch_size=256)
    line = make_plan(recipe, Options(gpu="4090")).advice[0]
    parts = int(line.removeprefix("--set training.accumulation=").partition(":")[0])
    assert not make_plan(apply_overrides(recipe, [f"training.accumulation={parts // 2}"]), Options(gpu="4090")).fits


def test_stage_1_is_told_what_parts_of_a_batch_cost_it():
    advice = make_plan(recipe_of(batch_size=4096), Options(gpu="4090")).advice
    assert any("fewer negatives" in line for line in advice)


def test_what_no_setting_makes_fit_is_told_where_it_fits():
    recipe = recipe_of("stage2", language="google/flan-t5-xxl", batch_size=1)
    (line,) = make_plan(recipe, Options(gpu="3090")).advice
    assert "it fits on: " in line and "a100-40g" in line and "4090" not in line


def test_shards_take_a_share_of_the_weights():
    recipe = recipe_of("stage2", language="facebook/opt-6.7b")
    whole, parts = (
        {part.name: part.bytes for part in make_plan(recipe, Options(gpus=8, strategy=strategy)).memory}
        for strategy in ("ddp", "fsdp")
    )
    for name in ("frozen weights", "trained weights", "gradients", "AdamW's moments"):
        assert parts[name] == pytest.approx(whole[name] / 8)
    assert parts["one layer gathered from all"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "h300"}, "not a processor a plan knows. Known: a100-40g"),
        ({"gpus": 3}, "training.batch_size 64 cannot be split over 3 processors in 1 equal parts. Near it: 63."),
        ({"utilisation": 1.5}, "a share above 0 and up to 1"),
        ({"gpu": "cpu", "gpus": 2}, "leave --gpus out"),
    ],
)
def test_what_cannot_be_planned_is_refused(options, message):
    with pytest.raises(BadRecipe) as refusal:
        make_plan(recipe_of(), Options(**options))
    assert message in str(refusal.value)


def test_a_part_of_unknown_shape_is_refused_not_fetched():
    with pytest.raises(UnknownModel, match="A plan fetches nothing, and the shape of 'someone/their-llm' is not known"):
        make_plan(recipe_of("stage2", language="someone/their-llm"), Options())


# The command


def blip2(monkeypatch, *arguments):
    """Runs the command line; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["blip2", *arguments])
    with pytest.raises(SystemExit) as end:
        main.main()
    return end.value.code


def test_the_command_prints_a_page_and_leaves_with_0_where_it_fits(monkeypatch, capsys):
    assert blip2(monkeypatch, "plan", "mini/stage1", "--gpu", "4090", "--price", "0.5") == 0
    shown = capsys.readouterr().out
    for part in ("Parameters", "AdamW's moments", "pairs (ITM)", "samples a second", "fits", "processor hours"):
        assert part in shown
    assert "It would fit with" not in shown


def test_the_command_leaves_with_1_where_it_does_not_fit(monkeypatch, capsys):
    code = blip2(monkeypatch, "plan", "mini/stage1", "--gpu", "t4", "--set", "training.batch_size=4096")
    shown = capsys.readouterr().out
    assert code == 1 and "DOES NOT FIT" in shown and "It would fit with\n  --set training.accumulation=" in shown


def test_json_holds_what_the_page_holds(monkeypatch, capsys):
    assert blip2(monkeypatch, "plan", "mini/stage2", "--gpu", "h100", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    plan = make_plan(read_recipe("mini/stage2"), Options(gpu="h100"))
    assert record["fits"] and record["micro_batch_per_gpu"] == 64
    assert sum(record["memory_bytes"].values()) == pytest.approx(record["memory_bytes_in_all"], abs=10)
    assert record["samples_per_second"] == plan.samples_per_second
    assert f"{plan.memory_bytes / 2**30:.2f}" in as_text(plan)


def test_processors_that_fetch_each_others_images_project_them_too():
    def projected(gpus):
        plan = make_plan(recipe_of(), Options(gpu="h200", gpus=gpus))
        return next(part.forward for part in plan.work if part.name == "keys and values of images")

    assert projected(2) == 2 * projected(1)
