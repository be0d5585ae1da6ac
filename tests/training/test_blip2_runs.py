"""Every stage runs on real parts made tiny, leaves the frozen ones alone, and survives kills bit for bit."""

import dataclasses
from pathlib import Path

import pytest
import torch

from blip2.checkpoints import frozen, lavis, native
from blip2.errors import BadRecipe, MissingFile, UnknownModel, UserError
from blip2.training import compiled
from blip2.training.export import export
from blip2.training.loop import train
from blip2.training.recipe import apply_overrides
from blip2.training.sections import PromptsSection
from blip2.training.starting import bridge_weights
from blip2.training.state import MODEL, OPTIMIZER, newest_checkpoint

from .tiny_blip2 import build_in, make_parts, run_blip2, tiny_recipe
from .tiny_run import kill_five_times


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("parts")
    make_parts(root)
    return root


@pytest.fixture(autouse=True)
def home(monkeypatch, root):
    monkeypatch.setenv("BLIP2_HOME", str(root / "home"))


def weights(run_dir: Path) -> tuple[bytes, bytes]:
    checkpoint = newest_checkpoint(run_dir)
    return (checkpoint / MODEL).read_bytes(), (checkpoint / OPTIMIZER).read_bytes()


@pytest.mark.parametrize("stage", ["stage1", "stage2", "instruct"])
def test_five_kills_leave_the_bits_of_an_uninterrupted_run(root, tmp_path, stage):
    run_blip2(root, stage, tmp_path / "whole")
    assert kill_five_times(stage, run_blip2, root, stage, tmp_path / "killed", 6) >= 3
    assert run_blip2(root, stage, tmp_path / "killed").finished
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


@pytest.mark.parametrize("stage", ["stage2", "instruct"])
def test_training_leaves_the_frozen_language_model_as_it_was(root, tmp_path, stage):
    recipe = tiny_recipe(root, stage)
    job = build_in(root, recipe, tmp_path)
    language_model = job.module.model.language_model
    before = frozen.fingerprint(language_model)
    optimized = [p for p in job.module.parameters() if p.requires_grad]
    assert not {id(p) for p in optimized} & {id(p) for p in language_model.parameters()}
    train(job, recipe, tmp_path)
    assert frozen.fingerprint(language_model) == before
    assert all(p.grad is None for p in language_model.parameters())


def test_an_encoder_decoder_language_model_trains_too(tmp_path, monkeypatch):
    make_parts(tmp_path, decoder_only=False)
    assert run_blip2(tmp_path, "stage2", tmp_path / "run", steps=3).finished


@pytest.mark.parametrize(("task", "longest"), [("question", 2), ("caption", 3)])
def test_answers_and_captions_are_cut_at_their_own_lengths(root, tmp_path, task, longest):
    recipe = tiny_recipe(root, "instruct")
    mixture = (dataclasses.replace(recipe.data.mixture[0], task=task),)
    data = dataclasses.replace(recipe.data, mixture=mixture, max_answer_length=2, max_text_length=3)
    batches = build_in(root, dataclasses.replace(recipe, data=data), tmp_path / "run").batches
    assert batches(0).target.input_ids.shape[1] == longest


@pytest.mark.parametrize(("stage", "is_split"), [("stage2", True), ("instruct", False)])
def test_captions_are_split_for_an_encoder_decoder_language_model_in_stage_2(tmp_path, monkeypatch, stage, is_split):
    make_parts(tmp_path, decoder_only=False)
    monkeypatch.setenv("BLIP2_HOME", str(tmp_path / "home"))
    recipe = tiny_recipe(tmp_path, stage)
    captions = dataclasses.replace(recipe.data.mixture[0], task="caption")
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, mixture=(captions,)))
    batches = build_in(tmp_path, recipe, tmp_path / "run").batches
    read = {tuple(row) for number in range(8) for row in batches(number).prompt.input_ids.tolist()}
    assert (len(read) > 1) == is_split  # prefixes differ, the prompt for captions does not


def test_neighbours_bring_samples_of_near_captions_the_same_at_every_call(root, tmp_path):
    plain = tiny_recipe(root, "stage1")
    data = dataclasses.replace(plain.data, neighbour_share=0.9)
    reader = build_in(root, dataclasses.replace(plain, data=data), tmp_path).batches.reader
    drawn = [item.sample.id for item in reader.items(0, 200)]
    assert drawn == [item.sample.id for position in range(200) for item in reader.items(position, 1)]
    by_chance = [item.sample.id for item in build_in(root, plain, tmp_path).batches.reader.items(0, 200)]
    assert 100 < sum(a != b for a, b in zip(drawn, by_chance, strict=True)) < 190


def test_stage_2_starts_from_the_queries_of_stage_1(root, tmp_path):
    run_blip2(root, "stage1", tmp_path / "first", steps=2)
    recipe = tiny_recipe(root, "instruct", init_from=str(tmp_path / "first"))
    started = build_in(root, recipe, tmp_path / "second").module.model
    trained = build_in(
        root, tiny_recipe(root, "stage1", init_from=str(tmp_path / "first")), tmp_path / "x"
    ).module.model
    for name, parameter in started.named_parameters():
        if name.startswith(("qformer.", "query_tokens", "vision_layernorm.")):
            torch.testing.assert_close(parameter, trained.get_parameter(name), atol=0, rtol=0)


@pytest.mark.parametrize("stage", ["stage1", "instruct"])
def test_a_run_starts_from_a_model_folder_and_from_lavis(root, tmp_path, stage, monkeypatch):
    monkeypatch.setattr(lavis, "HEAD_WIDTH", 8)  # the tiny model's
    first = tmp_path / "first"
    run_blip2(root, stage, first, steps=2)
    part = "stage1" if stage == "stage1" else "generation"
    export(tmp_path / "model", "tiny", **{part: first})
    trained = {k: v for k, v in bridge_weights(str(first)).items() if not k.startswith("language_model.")}
    lavis.write(tmp_path / "first.pth", trained, projection="llm_proj")
    for source, tolerance in ((tmp_path / "model", 1e-3), (tmp_path / "first.pth", 0)):  # a folder holds float16
        started = build_in(root, tiny_recipe(root, stage, init_from=str(source)), tmp_path / "x").module.model
        for name, tensor in trained.items():
            torch.testing.assert_close(started.state_dict()[name], tensor, atol=tolerance, rtol=tolerance)


def test_a_run_starts_from_a_name_of_the_hub(root, tmp_path, monkeypatch):
    run_blip2(root, "stage1", tmp_path / "first", steps=2)
    export(tmp_path / "model", "tiny", stage1=tmp_path / "first")
    asked = []
    monkeypatch.setattr(frozen, "snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path / "model"))
    fetched = bridge_weights("someone/tiny-blip2")
    assert asked == ["someone/tiny-blip2"]
    torch.testing.assert_close(fetched["query_tokens"], bridge_weights(str(tmp_path / "model"))["query_tokens"])


def test_a_name_that_the_hub_does_not_give_is_told(monkeypatch):
    monkeypatch.setattr(frozen, "snapshot_download", lambda name, **_: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(UnknownModel, match="'someone/nothing' is no run, folder or file here, nor a model"):
        bridge_weights("someone/nothing")


PROMPTS = {"caption": "a photo of", "caption_instruction": "tell", "question": "Q {} A"}


def test_the_recipe_s_prompts_are_what_the_llm_reads_and_what_the_exported_model_asks_with(root, tmp_path):
    for stage, prompts, instructions in (
        ("stage2", {"a photo of"}, {"tell"}),
        ("instruct", {"Q what colour is the cup? A", "Q is it left? A"}, {"what colour is the cup?", "is it left?"}),
    ):
        recipe = dataclasses.replace(tiny_recipe(root, stage, steps=1), prompts=PromptsSection(**PROMPTS))
        batches = build_in(root, recipe, tmp_path / stage).batches
        read, asked, _ = zip(*map(batches.texts, batches.reader.items(0, 40)), strict=True)
        assert (set(asked), set(read)) == (prompts, instructions)
    train(build_in(root, recipe, tmp_path / "run"), recipe, tmp_path / "run")
    export(tmp_path / "model", "tiny", generation=tmp_path / "run")
    assert dataclasses.asdict(native.read_settings(tmp_path / "model").prompts) == PROMPTS


def test_runs_with_different_prompts_are_no_average(root, tmp_path):
    for name, prompts in (("a", PromptsSection()), ("b", PromptsSection(caption="a photo of"))):
        recipe = dataclasses.replace(tiny_recipe(root, "stage2", steps=1), prompts=prompts)
        train(build_in(root, recipe, tmp_path / name), recipe, tmp_path / name)
    with pytest.raises(BadRecipe, match="other prompts"):
        export(tmp_path / "model", "tiny", generation={tmp_path / "a": 1.0, tmp_path / "b": 1.0})


def test_a_run_of_other_prompts_is_not_gone_on_with_and_the_way_to_do_so_is_told(root, tmp_path):
    run_blip2(root, "stage2", tmp_path / "run", steps=1)
    recipe = dataclasses.replace(tiny_recipe(root, "stage2", steps=1), prompts=PromptsSection(caption="a photo of"))
    with pytest.raises(BadRecipe, match=r"--set prompts\.caption=null to go on as it began"):
        train(build_in(root, recipe, tmp_path / "run"), recipe, tmp_path / "run")


def test_prompts_where_nothing_reads_them_are_refused(root):
    with pytest.raises(BadRecipe, match="stage1 has no language model"):
        apply_overrides(tiny_recipe(root, "stage1"), ["prompts.caption=a photo of"])


def test_captions_may_follow_the_picture_with_no_prompt_between(root, tmp_path):
    recipe = dataclasses.replace(tiny_recipe(root, "stage2"), prompts=PromptsSection(caption=""))
    job = build_in(root, recipe, tmp_path / "run")
    batch = job.batches(0)
    assert batch.prompt.attention_mask.sum() == 0 or (batch.prompt.input_ids == batch.prompt.input_ids[0, 0]).all()
    loss = job.module(batch)["loss"]
    loss.backward()
    assert loss.isfinite() and job.module.model.query_tokens.grad.abs().max() > 0


def test_an_encoder_decoder_whose_captions_have_a_prompt_learns_whole_captions(tmp_path):
    make_parts(tmp_path, decoder_only=False)
    plain = tiny_recipe(tmp_path, "stage2")
    for prompts, wanted in ((PromptsSection(), None), (PromptsSection(caption="a photo of"), {"a photo of"})):
        batches = build_in(tmp_path, dataclasses.replace(plain, prompts=prompts), tmp_path / "run").batches
        items = batches.reader.items(0, 40)
        _, prompt, target = zip(*map(batches.texts, items), strict=True)
        captions = [item.sample.captions[0] for item in items]
        if wanted:
            assert set(prompt) == wanted and list(target) == captions
        else:  # prefix and suffix
            assert [f"{a} {b}".strip() for a, b in zip(prompt, target, strict=True)] == captions
            assert list(target) != captions


def test_a_start_that_does_not_fit_is_refused(root, tmp_path):
    run_blip2(root, "stage1", tmp_path / "first", steps=2)
    with pytest.raises(BadRecipe, match="queries"):
        build_in(root, tiny_recipe(root, "stage1", init_from=str(tmp_path / "first"), num_query_tokens=5), tmp_path)
    with pytest.raises(MissingFile, match="nowhere"):
        build_in(root, tiny_recipe(root, "stage1", init_from=str(tmp_path / "nowhere")), tmp_path)


def test_an_exported_model_says_what_the_trained_one_would(root, tmp_path):
    import blip2

    run_blip2(root, "stage1", tmp_path / "s1", steps=2)
    run_blip2(root, "instruct", tmp_path / "i", steps=2)
    export(tmp_path / "model", "tiny", stage1=tmp_path / "s1", generation=tmp_path / "i", caption_best_of=3)
    model = blip2.load(tmp_path / "model")
    image = root / "cup.png"
    from .tiny_blip2 import picture

    image.write_bytes(picture(0).image)
    assert isinstance(model.ask(image, "what colour is the cup?"), str)
    assert len(model.match(image, ["a red cup left", "a blue cup right"])) == 2
    assert model.settings.caption_best_of == 3 and model.caption(image) == model.caption(image, best_of=3)
    with pytest.raises(BadRecipe, match="takes both parts"):
        export(tmp_path / "other", "tiny", generation=tmp_path / "i", caption_best_of=3)
    with pytest.raises(BadRecipe, match="stage1"):
        export(tmp_path / "other", "tiny", generation=tmp_path / "s1")


def test_runs_of_one_part_are_averaged(root, tmp_path):
    run_blip2(root, "stage1", tmp_path / "first", steps=2)
    recipe = tiny_recipe(root, "stage1", init_from=str(tmp_path / "first"), steps=3)
    train(build_in(root, recipe, tmp_path / "second"), recipe, tmp_path / "second")
    export(tmp_path / "model", "tiny", stage1={tmp_path / "first": 0.6, tmp_path / "second": 1.4})
    first, second, both = (bridge_weights(str(tmp_path / name)) for name in ("first", "second", "model"))
    assert any((first[name] - second[name]).abs().max() > 1e-3 for name in both)
    for name, tensor in both.items():
        torch.testing.assert_close(tensor, 0.3 * first[name] + 0.7 * second[name], atol=1e-3, rtol=1e-3)
    shares = native.read_settings(tmp_path / "model").notes["recipes"]["stage1"]
    assert [entry["share"] for entry in shares] == [0.3, 0.7]
    assert shares[1]["recipe"]["model"]["init_from"] == "first"


def test_runs_that_cannot_be_averaged_are_named(root, tmp_path):
    run_blip2(root, "stage1", tmp_path / "first", steps=1)
    recipe = tiny_recipe(root, "stage1", num_query_tokens=5)
    train(build_in(root, recipe, tmp_path / "second"), recipe, tmp_path / "second")
    with pytest.raises(BadRecipe, match="num_query_tokens"):
        export(tmp_path / "model", "tiny", stage1={tmp_path / "first": 1.0, tmp_path / "second": 1.0})
    with pytest.raises(BadRecipe, match="above 0"):
        export(tmp_path / "model", "tiny", stage1={tmp_path / "first": -1.0})
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_compiled_layers_give_the_losses_of_plain_ones(root, tmp_path):
    plain = tiny_recipe(root, "instruct")
    fused = dataclasses.replace(plain, training=dataclasses.replace(plain.training, compile=True))
    losses = []
    for recipe, folder in ((plain, tmp_path / "plain"), (fused, tmp_path / "fused")):
        job = build_in(root, recipe, folder)
        job.module.eval()
        loss = job.module(job.batches(0))["loss"]
        loss.backward()
        gradient = next(p.grad for p in job.module.parameters() if p.grad is not None)
        losses.append((loss.detach(), gradient))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-4)


def test_compiling_without_a_compiler_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"g\+\+ or clang\+\+\); install one"):
        compiled.compile_layers(torch.nn.Linear(2, 2))


def test_compiling_what_has_no_layers_is_refused(monkeypatch):
    monkeypatch.setattr(compiled.shutil, "which", lambda name: "/usr/bin/g++")
    with pytest.raises(UserError, match="finds no layers in Linear"):
        compiled.compile_layers(torch.nn.Linear(2, 2))
