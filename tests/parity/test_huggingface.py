"""Hugging Face's checkpoints give the same numbers here as there, of every class."""

import json
import shutil

import numpy as np
import pytest
import torch

import blip2
from blip2.errors import UnknownModel, Untrusted
from blip2.model.writing import Decoding, write

from .hf_checkpoints import KINDS, NUM_QUERIES, PROMPTS, forgetful, made_on_first_use, pictures, token_losses

CLOSE = {"atol": 1e-5, "rtol": 0}
GENERATING = [kind for kind in KINDS if kind != "blip2-retrieval"]


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """Kind -> a checkpoint of Hugging Face's."""
    return made_on_first_use(tmp_path_factory)


@pytest.fixture(scope="module")
def loaded(peers):
    """Kind -> our model of it."""
    made = {}

    def load(kind):
        if kind not in made:
            made[kind] = forgetful(blip2.load(peers(kind).folder))
        return made[kind]

    return load


@pytest.mark.parametrize("kind", KINDS)
def test_pixel_values_are_those_of_the_image_processor(peers, loaded, kind):
    images = pictures(7)
    theirs = peers(kind).processor.image_processor(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(loaded(kind).transform.batch(images), theirs, atol=0, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_image_features_are_the_towers(peers, loaded, kind):
    images = pictures(3)
    pixel_values = loaded(kind).transform.batch(images)
    vision = peers(kind).model.vision_model
    theirs = vision(pixel_values).last_hidden_state
    ours = vision.post_layernorm(loaded(kind).image_features(images))
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("kind", GENERATING)
@torch.inference_mode()
def test_visual_prompts_are_the_same(peers, loaded, kind):
    peer, model, images = peers(kind), loaded(kind), pictures(len(PROMPTS))
    ours = model.generator.visual_prompt(model.image_features(images), PROMPTS)
    assert ours.shape[1] == NUM_QUERIES
    for rows in batches(kind, len(images)):
        inputs = read(peer, images[rows], PROMPTS[rows])
        given = {name: inputs[name] for name in ("qformer_input_ids", "qformer_attention_mask") if name in inputs}
        theirs = peer.model.get_image_features(inputs["pixel_values"], **given).pooler_output
        torch.testing.assert_close(ours[rows], theirs, **CLOSE)


@pytest.mark.parametrize("kind", GENERATING)
@torch.inference_mode()
def test_the_loss_of_every_token_is_the_same(peers, loaded, kind):
    (image,) = pictures(1)
    ours, theirs = token_losses(peers(kind), loaded(kind), image, PROMPTS[0], "a red cup left")
    assert len(ours) > 4
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("kind", GENERATING)
@pytest.mark.parametrize("options", [{}, {"num_beams": 5}])
def test_generated_tokens_are_the_same_alone_and_in_a_batch(peers, loaded, kind, options):
    peer, model, count = peers(kind), loaded(kind), 8
    images, prompts = pictures(count), [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    expected = []
    for rows in batches(kind, count):
        inputs = read(peer, images[rows], prompts[rows])
        said = peer.model.generate(**inputs, max_new_tokens=12, **options)
        start = 1 if kind.endswith("t5") else inputs["input_ids"].shape[1]  # decoders are given back with the prompt
        expected += [plain(row[start:], model) for row in said]
    together = tokens(model, images, prompts, options)
    alone = [tokens(model, [i], [p], options)[0] for i, p in zip(images, prompts, strict=True)]
    assert together == alone == expected
    assert len({tuple(row) for row in together}) > 4  # they look and listen


def tokens(model, images, prompts, options):
    """What our model generates, as token ids up to the end."""
    generator = model.generator
    prompt = generator.tokenizer.encode_prompts(prompts)
    visual_prompt = generator.visual_prompt(model.image_features(images), prompts)
    decoding = Decoding(max_new_tokens=12, **options)
    started = generator.language_model.start(visual_prompt, prompt.input_ids, prompt.attention_mask)
    said = write(generator.language_model, *started, decoding)
    return [plain(row, model) for row in said]


def plain(row, model):
    """Token ids without what comes after the end."""
    ids, ends = row.tolist(), model.generator.language_model.stop_ids
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


def read(peer, images, prompts):
    """What the processor makes of pictures with a prompt each."""
    return peer.processor(images=images, text=list(prompts), padding=True, return_tensors="pt")


def batches(kind, count):
    """Rows that Hugging Face's code reads at once: all, but for InstructBLIP with a decoder one by one.

    Its processor pads the Q-Former's text on the left as it does the LLM's (transformers 5.23), which moves the text's
    absolute positions: there a row's answer depends on its neighbours.
    """
    return [slice(i, i + 1) for i in range(count)] if kind == "instructblip-llama" else [slice(0, count)]


@torch.inference_mode()
def test_similarities_and_match_logits_are_the_same(peers, loaded):
    peer, model, images = peers("blip2-retrieval"), loaded("blip2-retrieval"), pictures(4)
    texts = ["a red cup", "which colour is the star left of the cat ?", "cat"]
    for image in images:
        inputs = peer.processor(images=[image] * len(texts), text=texts, padding=True, return_tensors="pt")
        itc = peer.model(**inputs).logits_per_image[0]
        itm = peer.model(**inputs, use_image_text_matching_head=True).logits_per_image.softmax(dim=-1)[:, 1]
        ours = model.match(image, texts)
        assert [row.itc for row in ours] == pytest.approx(itc.tolist(), abs=1e-5)
        assert [row.itm for row in ours] == pytest.approx(itm.tolist(), abs=1e-5)
    assert np.ptp([row.itc for row in ours]) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_info_counts_the_bridge_of_a_checkpoint(peers, kind, capsys):
    from blip2.cli.info import info

    info(str(peers(kind).folder), json=True)
    told = json.loads(capsys.readouterr().out)
    (part,) = told["trained"].values()
    frozen = ("vision_model.", "language_model.")
    bridge = [
        parameter.numel()
        for name, parameter in peers(kind).model.named_parameters()
        if not name.startswith(frozen) or "post_layernorm" in name
    ]
    assert part["parameters"] == sum(bridge)


def test_words_are_drawn_as_the_checkpoint_says_where_the_caller_does_not(peers, tmp_path):
    folder = tmp_path / "beams"
    shutil.copytree(peers("blip2-opt").folder, folder)
    told = json.loads((folder / "generation_config.json").read_text())
    told |= {"num_beams": 3, "max_new_tokens": 7, "length_penalty": 2.0, "top_p": 0.5, "repetition_penalty": 1.5}
    (folder / "generation_config.json").write_text(json.dumps(told))
    model, images = blip2.load(folder), pictures(6)
    asked = {"num_beams": 3, "max_new_tokens": 7, "length_penalty": 2.0, "repetition_penalty": 1.5}
    assert model.settings.generation == asked
    said = model.generate(images, PROMPTS[0])
    assert said == model.generate(images, PROMPTS[0], **asked) != model.generate(images, PROMPTS[0], num_beams=1)


def test_a_hub_name_without_a_network_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UnknownModel, match=r"nor a folder, nor a model that the Hugging Face hub gave.*as a folder"):
        blip2.load("Salesforce/blip2-opt-2.7b")


def test_a_retrieval_checkpoint_starts_what_the_format_lacks(loaded):
    model = loaded("blip2-retrieval").retriever.model
    assert model.temperature.item() == pytest.approx(0.07)
    head = model.lm_head
    assert 0.01 < head.dense.weight.std() < 0.03 and not head.bias.any() and bool((head.LayerNorm.weight == 1).all())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"architectures": ["Blip2TextModelWithProjection"]}, UnknownModel, "is a Blip2TextModelWithProjection"),
        ({"qformer_config": {"hidden_act": "relu"}}, UnknownModel, "A Q-Former with relu"),
    ],
)
def test_a_checkpoint_of_another_make_is_refused(peers, tmp_path, change, error, message):
    folder = tmp_path / "changed"
    shutil.copytree(peers("blip2-opt").folder, folder)
    config = json.loads((folder / "config.json").read_text())
    for name, value in change.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        blip2.load(folder)


def test_a_shard_that_was_cut_is_refused(peers, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(peers("blip2-retrieval").folder, folder)
    for path in folder.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Untrusted, match=r"safetensors is no whole safetensors file.*Fetch it again"):
        blip2.load(folder)
