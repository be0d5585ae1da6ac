"""load(): by name and by folder; what is not the model that was saved is refused."""

import dataclasses
import json
import shutil

import pytest
import torch
from transformers import CLIPVisionModel, T5Config, T5ForConditionalGeneration

import blip2
from blip2.checkpoints import native
from blip2.checkpoints.frozen import fingerprint, load_vision
from blip2.errors import BadData, MissingPart, UnknownModel, Untrusted
from blip2.inference.loading import find_model, model_names, wrap_language_model
from blip2.model.language import DecoderLM, EncoderDecoderLM


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of the tiny model folder, to be broken."""
    return shutil.copytree(tiny.model, tmp_path / "copy")


def rewrite(folder, **changes):
    """Changes fields of blip2.json."""
    path = folder / "blip2.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_model_is_found_by_its_name_under_home(tiny, tmp_path, monkeypatch, images):
    monkeypatch.setenv("BLIP2_HOME", str(tmp_path))
    shutil.copytree(tiny.model, tmp_path / "models" / "seer")
    assert "seer" in model_names()
    assert find_model("seer") == tmp_path / "models" / "seer"
    assert blip2.load("seer").caption(images[0]) == blip2.load(tiny.model).caption(images[0])


@pytest.mark.parametrize("name", ["no-such-model", "no/such/folder", "../models"])
def test_an_unknown_name_is_refused_and_told_what_to_do(name, tmp_path, monkeypatch):
    monkeypatch.setenv("BLIP2_HOME", str(tmp_path))
    with pytest.raises(UnknownModel, match=f"No model is called '{name}'.*Models: .*blip2 train mini/stage1"):
        blip2.load(name)


def test_a_folder_without_settings_is_no_model(tmp_path):
    with pytest.raises(UnknownModel, match=r"is no model folder: it has no blip2\.json"):
        blip2.load(tmp_path)


def test_only_the_parts_asked_for_are_loaded(tiny, images):
    retrieval = blip2.load(tiny.model, parts=["stage1"])
    assert retrieval.match(images[0], "a red cup")
    with pytest.raises(MissingPart, match="was loaded without the generating part"):
        retrieval.caption(images[0])


def test_a_part_that_the_model_lacks_is_refused_before_anything_is_read(folder):
    rewrite(folder, parts={})
    with pytest.raises(MissingPart, match="lacks the generating part"):
        blip2.load(folder, parts=["generation"])


def test_word_embeddings_come_from_the_text_start(tiny, model):
    stored = native.load_part(tiny.model, model.settings, "stage1")
    assert "embeddings.word_embeddings.weight" not in stored
    start = load_bert(tiny)["embeddings.word_embeddings.weight"]
    words = model.retriever.model.embeddings.word_embeddings.weight
    assert torch.equal(words[:-1], start)
    assert torch.allclose(words[-1], start.mean(dim=0))  # [DEC]


def load_bert(tiny):
    from safetensors.torch import load_file

    return load_file(tiny.text_init / "model.safetensors")


def test_nothing_is_left_trainable_or_in_training_mode(model):
    modules = [model.vision_model, model.retriever.model, model.generator.model]
    assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())
    assert not any(part.training for module in modules for part in module.modules())


def test_bfloat16_says_nearly_the_same(tiny, model, images):
    half = blip2.load(tiny.model, dtype=torch.bfloat16)
    assert half.caption(images[0], max_new_tokens=5)
    difference = abs(half.embed_images(images) - model.embed_images(images)).max()
    assert difference < 0.1  # bfloat16 keeps 8 bits; measured 0.011


def test_a_frozen_part_with_other_weights_is_refused(folder, tiny, tmp_path):
    vision = shutil.copytree(tiny.vision, tmp_path / "vision")
    sha256 = fingerprint(load_vision(str(vision), image_size=32))
    rewrite(folder, vision={"name": str(vision), "sha256": sha256})
    assert blip2.load(folder)
    network = CLIPVisionModel.from_pretrained(vision)
    with torch.no_grad():
        next(network.parameters()).add_(1)
    network.save_pretrained(vision)
    with pytest.raises(Untrusted, match="has other weights than the ones 'tiny' was trained with"):
        blip2.load(folder)


def test_weights_that_do_not_fit_the_settings_are_refused(folder, tiny):
    rewrite(folder, from_text_init=[])
    with pytest.raises(BadData, match=r"do not fit its settings; wrong are embeddings\.word_embeddings\.weight"):
        blip2.load(folder)


def test_settings_without_a_text_start_are_refused(folder):
    rewrite(folder, text_init=None)
    with pytest.raises(BadData, match="names no text_init"):
        blip2.load(folder)


def test_a_folder_of_a_gone_frozen_part_is_named(folder):
    rewrite(folder, vision={"name": "/gone/vision", "sha256": None})
    with pytest.raises(UnknownModel, match="/gone/vision"):
        blip2.load(folder)


def test_settings_are_written_as_they_are_read(model, tmp_path):
    settings = dataclasses.replace(model.settings, parts={})
    assert native.save_model_folder(tmp_path / "m", settings, {}) == native.read_settings(tmp_path / "m") == settings


@pytest.mark.parametrize(("is_encoder_decoder", "kind"), [(False, DecoderLM), (True, EncoderDecoderLM)])
def test_both_kinds_of_language_model_are_wrapped_with_their_ends(model, is_encoder_decoder, kind):
    tokenizer = model.generator.tokenizer
    network = model.generator.language_model.model
    if is_encoder_decoder:
        network = T5ForConditionalGeneration(
            T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        )
    network.generation_config.eos_token_id = [7, 9]
    wrapped = wrap_language_model(network, tokenizer)
    network.generation_config.eos_token_id = 1
    assert isinstance(wrapped, kind)
    assert wrapped.stop_ids == sorted({7, 9, tokenizer.eos_id})


def test_a_language_model_spread_over_places_says_the_same(tiny, model, images):
    here = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = dict.fromkeys(here, "cpu") | {"model.layers.1": "disk"}  # which is read when it is needed
    spread = blip2.load(tiny.model, device_map=places)
    network = spread.generator.language_model.model
    assert network.hf_device_map == places and {p.device.type for p in network.parameters()} == {"cpu", "meta"}
    asked = {"max_new_tokens": 8, "num_beams": 3}
    assert spread.caption(images, best_of=1, **asked) == model.caption(images, best_of=1, **asked)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_frozen_parts_take_the_dtype_and_the_bridge_stays_float32(tiny, images, dtype):
    loaded = blip2.load(tiny.model, dtype=dtype)
    assert loaded.vision_model.dtype == dtype and loaded.generator.language_model.model.dtype == dtype
    assert {p.dtype for p in loaded.retriever.model.parameters()} == {torch.float32}
    assert len(loaded.caption(images)) == len(images) and len(loaded.match(images[0], ["a cup", "a cat"])) == 2
