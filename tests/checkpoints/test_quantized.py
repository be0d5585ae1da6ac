"""`blip2 quantize`: a folder with rounded frozen parts gives what rounding at load gives, and needs nothing else."""

import json
import shutil

import pytest
import torch
from inference.tiny_model import make_tiny_model
from parity.hf_checkpoints import PROMPTS, made_on_first_use, pictures
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import blip2
from blip2.checkpoints import quantized
from blip2.cli.main import app
from blip2.errors import BadData, MissingFile, Untrusted, UserError
from blip2.model.graphs.taking_over import Product
from blip2.model.quantized import Int4Linear, Int8Linear

SPEAKING = ("blip2-opt", "blip2-t5", "instructblip-llama", "instructblip-t5")


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """Kind -> a checkpoint of Hugging Face's."""
    return made_on_first_use(tmp_path_factory)


@pytest.fixture
def small(peers, tmp_path):
    """An int4 folder made of BLIP-2 with OPT."""
    run("quantize", peers("blip2-opt").folder, tmp_path / "small", "--to", "int4")
    return tmp_path / "small"


def run(*arguments):
    """A command of blip2; an error is raised."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def said(model):
    """Features, scores and texts, to be compared bit for bit."""
    images = pictures(4)
    features = model.image_features(images)
    scores = model.generator.score(features, list(PROMPTS), list(PROMPTS), ["red cup", "a star"])
    return features, scores, model.generate(images, list(PROMPTS)), model.generate(images, "a", num_beams=3)


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("kind", SPEAKING)
def test_the_folder_gives_what_rounding_at_load_gives(peers, tmp_path, kind, bits):
    folder = peers(kind).folder
    assert run("quantize", folder, tmp_path / "small", "--to", bits, "--quiet").strip() == str(tmp_path / "small")
    moved = tmp_path / "elsewhere"
    (tmp_path / "small").rename(moved)
    models = blip2.load(folder, quantize=bits), blip2.load(moved)
    for model in models:
        modules = list(model.generator.model.language_model.modules())
        assert any(isinstance(module, Product) for module in modules), "the head is a graph"
        assert not any(isinstance(module, Int4Linear | Int8Linear) for module in modules), "and all layers are in one"
    rounded, read = map(said, models)
    assert torch.equal(rounded[0], read[0]) and torch.equal(rounded[1], read[1])
    assert rounded[2:] == read[2:]


@pytest.mark.parametrize("kind", SPEAKING)
def test_eight_bits_stay_near_the_original(peers, kind):
    folder = peers(kind).folder
    whole, rounded = said(blip2.load(folder)), said(blip2.load(folder, quantize="int8"))
    for before, after in zip(whole[:2], rounded[:2], strict=True):
        assert (after - before).square().mean() < 0.01 * before.square().mean()
        assert not torch.equal(before, after)


def test_the_weights_take_a_fraction_of_the_room(peers, small):
    network = blip2.load(peers("blip2-opt").folder).generator.language_model.model
    linear = {name: module for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)}
    stored = load_file(small / "language" / quantized.WEIGHTS)
    for name, layer in linear.items():
        if layer is network.get_output_embeddings():
            continue
        used = sum(tensor.nbytes for key, tensor in stored.items() if key.startswith(f"{name}.") and "bias" not in key)
        assert used == layer.weight.numel() * (1 / 2 + 4 / 32)  # bytes: four bits, and two bfloat16 for each 32


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_picture_that_is_known_changes_no_bit(peers, bits):
    model = blip2.load(peers("blip2-opt").folder, quantize=bits)
    generator, (image,) = model.generator, pictures(1)
    visual = generator.visual_prompt(model.image_features(image), [""])
    for text in ("Question: what ? Answer:", ""):
        prompt = generator.tokenizer.encode_prompts([text])
        generator.image_cache.clear()
        new, known = (generator.read(visual, prompt)[1] for _ in range(2))
        assert torch.equal(new, known)


def test_a_retrieval_model_has_its_encoder_rounded(peers, tmp_path):
    folder = peers("blip2-retrieval").folder
    run("quantize", folder, tmp_path / "small", "--to", "int8")
    before, after = (blip2.load(path).embed_images(pictures(3)) for path in (folder, tmp_path / "small"))
    assert abs((before * after).sum(axis=-1) - 1).max() < 0.01


def test_our_own_folder_keeps_both_parts_and_stores_no_layer_that_the_encoder_drops(tmp_path):
    run("quantize", make_tiny_model(tmp_path).model, tmp_path / "small", "--to", "int8")
    told = json.loads((tmp_path / "small" / "blip2.json").read_text())
    assert told["parts"].keys() == {"stage1", "generation"}
    assert told["language"]["name"] == "./language" and told["notes"]["quantized"]["bits"] == "int8"
    assert f"int8 of {tmp_path / 'language'}, see there, ./language" in run("info", "--model", tmp_path / "small")
    assert json.loads((tmp_path / "small" / "vision" / "config.json").read_text())["num_hidden_layers"] == 2
    model, image = blip2.load(tmp_path / "small"), pictures(1)[0]
    assert isinstance(model.caption(image), str) and model.match(image, ["a cup"])


def test_rounding_twice_is_refused(small, tmp_path):
    with pytest.raises(UserError, match="quantised already"):
        run("quantize", small, tmp_path / "again", "--to", "int8")
    with pytest.raises(UserError, match="quantised already"):
        blip2.load(small, quantize="int8")
    assert not (tmp_path / "again").exists() and not list(tmp_path.glob(".again*"))


@pytest.mark.parametrize("to", ["hf", "lavis", "blip2"])
def test_a_quantised_model_is_not_converted(small, tmp_path, to):
    with pytest.raises(UserError, match="Convert what it was made of"):
        run("convert", small, tmp_path / "other", "--to", to)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("fault", "error", "told"),
    [("truncated", Untrusted, "no whole safetensors"), ("gone", MissingFile, "missing"), ("other", BadData, "not fit")],
)
def test_a_broken_folder_is_named(small, fault, error, told):
    path = small / "language" / quantized.WEIGHTS
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif fault == "gone":
        path.unlink()
    else:
        weights = load_file(path)
        name = next(name for name in weights if name.endswith("packed"))
        save_file(weights | {name: weights[name][:16].clone()}, path)
    with pytest.raises(error, match=told):
        blip2.load(small)


def test_a_mark_that_is_no_mark_is_named(small):
    (small / "vision" / quantized.MARK).write_text("[]")
    with pytest.raises(BadData, match=r"quantization\.json is broken"):
        blip2.load(small)


def test_a_folder_tells_its_groups_and_whether_weights_were_turned(peers, tmp_path, monkeypatch):
    monkeypatch.setattr("blip2.inference.loading._take_over", lambda network: None)  # the layers stay to be seen
    run("quantize", peers("blip2-opt").folder, tmp_path / "small", "--to", "int4", "--group-size", 64)

    def layers():
        network = blip2.load(tmp_path / "small").generator.language_model.model
        return [layer for layer in network.modules() if isinstance(layer, Int4Linear)]

    assert layers() and all(layer.group_size == 64 and layer.turned_block == 64 for layer in layers())
    told = json.loads(run("info", "--model", tmp_path / "small", "--json"))["frozen"]["language model"]
    assert told["group_size"] == 64
    assert told["bytes"] == (tmp_path / "small" / "language" / quantized.WEIGHTS).stat().st_size
    place = tmp_path / "small" / "language" / quantized.MARK
    mark = json.loads(place.read_text())
    assert mark["format"] == 2
    place.write_text(json.dumps(mark | {"format": 1}))  # as before weights were turned
    assert layers() and not any(layer.turned_block for layer in layers())
    place.write_text(json.dumps(mark | {"format": 3}))
    with pytest.raises(BadData, match="Update blip2"):
        layers()


@pytest.mark.parametrize("size", [48, 0, "64", [64]])
def test_groups_that_there_are_none_of_are_named(small, size):
    place = small / "language" / quantized.MARK
    place.write_text(json.dumps(json.loads(place.read_text()) | {"group_size": size}))
    with pytest.raises(BadData, match="has groups of"):
        blip2.load(small)


def test_a_bad_group_size_or_place_is_refused(peers, tmp_path):
    folder = peers("blip2-opt").folder
    with pytest.raises(UserError, match="group-size"):
        run("quantize", folder, tmp_path / "small", "--to", "int4", "--group-size", 48)
    with pytest.raises(UserError, match="is for int4"):
        run("quantize", folder, tmp_path / "small", "--to", "int8", "--group-size", 64)
    copy = shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(UserError, match="written over"):
        run("quantize", copy, copy, "--to", "int8")
