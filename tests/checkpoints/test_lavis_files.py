"""Checkpoints of the original code are read, written back bit for bit, and refused where they are more than tensors."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from inference.tiny_model import make_tiny_model
from safetensors.torch import load_file
from typer.testing import CliRunner

import blip2
from blip2.checkpoints import lavis, native
from blip2.checkpoints.names import Names
from blip2.cli.main import app
from blip2.errors import BadData, MissingFile, MissingPart, UnknownModel, Untrusted, UserError

GOLDEN = Path(__file__).parents[1] / "parity" / "golden" / "lavis_stage1.safetensors"


@pytest.fixture
def stage1_pth(tmp_path):
    """A .pth as LAVIS saves it: its own state dict under "model"."""
    path = tmp_path / "stage1.pth"
    torch.save({"model": lavis_state(), "epoch": 3}, path)
    return path


def lavis_state():
    """LAVIS's own state dict, from the golden file."""
    golden = load_file(GOLDEN)
    return {name.removeprefix("model."): tensor for name, tensor in golden.items() if name.startswith("model.")}


def run(*arguments):
    """`blip2 convert`; an error is raised."""
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_shape_is_read_from_the_weights(stage1_pth, monkeypatch):
    monkeypatch.setattr(lavis, "HEAD_WIDTH", 8)  # the tiny model's
    bridge = lavis.read(stage1_pth)
    config = bridge.config
    assert bridge.part == "stage1" and not bridge.instruction_aware and bridge.stop == ""
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 4, 4)
    assert (config.encoder_hidden_size, config.num_query_tokens, config.embed_dim) == (24, 5, 16)
    assert (config.vocab_size, config.max_position_embeddings, config.cross_attention_frequency) == (60, 20, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_round_trip_changes_no_bit(tmp_path, stage1_pth, monkeypatch, dtype):
    monkeypatch.setattr(lavis, "HEAD_WIDTH", 8)
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in lavis_state().items()}
    torch.save({"model": state}, stage1_pth)
    run(stage1_pth, tmp_path / "ours", "--to", "blip2", "--vision", "efficientnet-lite2")
    run(tmp_path / "ours", tmp_path / "back.pth", "--to", "lavis")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert back.keys() == state.keys() - {lavis.BUFFER}
    for name, tensor in back.items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name]), name


@pytest.mark.parametrize(("decoder_only", "aware"), [(True, False), (True, True), (False, False), (False, True)])
def test_a_generating_model_says_the_same_after_the_way_there_and_back(tmp_path, monkeypatch, decoder_only, aware):
    monkeypatch.setattr(lavis, "HEAD_WIDTH", 8)
    tiny = make_tiny_model(tmp_path, parts=("generation",), aware=aware, decoder_only=decoder_only)
    model = blip2.load(tiny.model)
    whole = tmp_path / "whole"  # with the word embeddings, which the tiny model takes from its text start
    settings = native.read_settings(tiny.model)
    state = {k: v for k, v in model.generator.model.state_dict().items() if not k.startswith(native.FROZEN)}
    native.save_model_folder(whole, replace(settings, from_text_init=(), parts={}), {"generation": state}, halve=False)
    run(whole, tmp_path / "there.pth", "--to", "lavis")
    names = torch.load(tmp_path / "there.pth", weights_only=True)["model"]
    assert ("t5_proj.weight" if not decoder_only else "llm_proj.weight") in names  # the tiny decoder is a Llama
    named = ("--vision", tiny.vision, "--llm", tiny.language, "--text-init", tiny.text_init, "--image-size", 32)
    run(tmp_path / "there.pth", tmp_path / "back", "--to", "blip2", *named)
    again = blip2.load(tmp_path / "back")
    assert again.settings.instruction_aware == aware
    features = model.vision_model(torch.rand(2, 3, 32, 32))  # the same for both: LAVIS's normalisation is CLIP's
    prompts = [one.generator.visual_prompt(features, ["what is red", "a cat"]) for one in (model, again)]
    torch.testing.assert_close(prompts[0], prompts[1], atol=0, rtol=0)


def test_a_payload_is_refused_and_does_not_run(tmp_path):
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(canary),))

    torch.save({"model": {"query_tokens": Payload()}}, tmp_path / "evil.pth")
    with pytest.raises(Untrusted, match=r"evil.pth is no plain checkpoint.*never run"):
        lavis.read(tmp_path / "evil.pth")
    assert not canary.exists()


def test_what_is_no_checkpoint_is_told_apart(tmp_path, stage1_pth):
    with pytest.raises(MissingFile, match="There is no file"):
        lavis.read(tmp_path / "nowhere.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(Untrusted, match="broken"):
        lavis.read(tmp_path / "text.pth")
    torch.save({"model": {"weight": torch.ones(2)}}, tmp_path / "other.pth")
    with pytest.raises(BadData, match="is no checkpoint of BLIP-2"):
        lavis.read(tmp_path / "other.pth")
    torch.save({"model": lavis_state() | {"surprise": torch.ones(1)}}, tmp_path / "more.pth")
    with pytest.raises(BadData, match="1 weights of no known name, the first is surprise"):
        lavis.read(tmp_path / "more.pth")


def test_what_a_pth_cannot_say_has_to_be_given(tmp_path, stage1_pth, monkeypatch):
    monkeypatch.setattr(lavis, "HEAD_WIDTH", 8)
    with pytest.raises(UserError, match="--vision NAME"):
        run(stage1_pth, tmp_path / "x", "--to", "blip2")
    speaking = {k: v for k, v in lavis_state().items() if "_proj" not in k} | {"opt_proj.weight": torch.ones(8, 32)}
    torch.save({"model": speaking}, stage1_pth)
    assert lavis.read(stage1_pth).stop == "\n"
    with pytest.raises(UserError, match="--llm NAME"):
        run(stage1_pth, tmp_path / "x", "--to", "blip2", "--vision", "efficientnet-lite2")
    assert not (tmp_path / "x").exists()


def test_two_parts_want_a_choice_and_what_a_text_start_holds_is_written_too(tmp_path, monkeypatch):
    tiny = make_tiny_model(tmp_path)
    with pytest.raises(UnknownModel, match="4 heads for a width of 32"):
        run(tiny.model, tmp_path / "x.pth", "--to", "lavis", "--part", "stage1")
    monkeypatch.setattr(lavis, "HEAD_WIDTH", 8)
    with pytest.raises(MissingPart, match=r"one is converted. Add --part"):
        run(tiny.model, tmp_path / "x.pth", "--to", "lavis")
    assert not (tmp_path / "x.pth").exists()
    run(tiny.model, tmp_path / "x.pth", "--to", "lavis", "--part", "stage1")
    words = torch.load(tmp_path / "x.pth", weights_only=True)["model"]["Qformer.bert.embeddings.word_embeddings.weight"]
    torch.testing.assert_close(words, blip2.load(tiny.model).retriever.model.embeddings.word_embeddings.weight)


def test_every_weight_of_stage_1_has_a_name_everywhere_it_may():
    ours = Names("lavis", "blip2").rename(lavis_state())
    lacking = {name for name in ours if Names("blip2", "hf").translate(name) is None}
    assert lacking == {"temperature"} | {name for name in ours if name.startswith("lm_head.")}
