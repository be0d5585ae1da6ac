"""Bridges go from any of the three formats to any other; what is written in Hugging Face's layout loads there whole."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from parity.hf_checkpoints import KINDS, PROMPTS, made_on_first_use, pictures
from safetensors.torch import load_file
from typer.testing import CliRunner

import blip2
from blip2.checkpoints import eva, huggingface, lavis
from blip2.cli.main import app
from blip2.errors import BadData, MissingFile, MissingPart, UnknownModel, UserError

GOLDEN = Path(__file__).parents[1] / "parity" / "golden" / "lavis_stage1.safetensors"


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """Kind -> a checkpoint of Hugging Face's."""
    return made_on_first_use(tmp_path_factory)


@pytest.fixture(autouse=True)
def narrow_heads(monkeypatch):
    monkeypatch.setattr(lavis, "HEAD_WIDTH", 8)  # the tiny models'
    monkeypatch.setattr(eva, "HEAD_WIDTH", 6)


def convert(*arguments):
    """`blip2 convert`; an error is raised."""
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output


def stored(folder):
    """All weights of a Hugging Face folder, by name."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def load_whole(folder):
    """What transformers makes of a folder, and its processor; a weight too many or too few is a failure."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval(), transformers.AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_hugging_faces_weights_come_back_bit_for_bit(peers, tmp_path, kind):
    folder = peers(kind).folder
    convert(folder, tmp_path / "ours", "--to", "blip2")
    convert(tmp_path / "ours", tmp_path / "back", "--to", "hf")
    before, after = stored(folder), stored(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype, name


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_what_we_write_answers_in_transformers_as_here(peers, tmp_path, kind):
    convert(peers(kind).folder, tmp_path / "ours", "--to", "blip2")
    convert(tmp_path / "ours", tmp_path / "written", "--to", "hf")
    model, processor = load_whole(tmp_path / "written")
    ours, (image,) = blip2.load(tmp_path / "ours"), pictures(1)
    inputs = processor(images=image, text=PROMPTS[0], return_tensors="pt")
    if kind == "blip2-retrieval":
        theirs = model(**inputs).logits_per_image.item()
        assert ours.match(image, [PROMPTS[0]])[0].itc == pytest.approx(theirs, abs=1e-5)
        return
    said = model.generate(**inputs, max_new_tokens=10)[0, 0 if kind.endswith("t5") else inputs["input_ids"].shape[1] :]
    text = processor.tokenizer.decode(said, skip_special_tokens=True).strip()
    assert text and ours.generate([image], PROMPTS[0], max_new_tokens=10, num_beams=1) == [text]


def test_temperature_and_head_survive_hugging_faces_layout(tmp_path, peers):
    tower = peers("blip2-retrieval").folder
    state = {k[6:]: v for k, v in load_file(GOLDEN).items() if k.startswith("model.")}
    torch.save({"model": state}, tmp_path / "first.pth")
    named = ("--vision", tower, "--text-init", bert_folder(tmp_path), "--image-size", 28)
    convert(tmp_path / "first.pth", tmp_path / "written", "--to", "hf", *named)
    assert set(load_file(tmp_path / "written" / huggingface.EXTRAS)) >= {"temperature", "lm_head.bias"}
    load_whole(tmp_path / "written")
    convert(tmp_path / "written", tmp_path / "ours", "--to", "blip2")
    for source in ("written", "ours"):
        convert(tmp_path / source, tmp_path / "back.pth", "--to", "lavis")
        back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
        assert back.keys() == state.keys() - {lavis.BUFFER}
        assert all(torch.equal(tensor, state[name]) for name, tensor in back.items())
    assert blip2.load(tmp_path / "written").retriever.model.temperature == state["temp"]


def bert_folder(root):
    """A BERT's folder with the golden model's vocabulary, tokenizer and configuration only."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(54))]
    tokenizer = transformers.BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    tokenizer.save_pretrained(root / "bert")
    return root / "bert"


@pytest.mark.parametrize("kind", ["blip2-opt", "instructblip-t5"])
@torch.inference_mode()
def test_a_fine_tuned_image_encoder_goes_every_way(peers, tmp_path, kind):
    folder = peers(kind).folder
    convert(folder, tmp_path / "frozen.pth", "--to", "lavis")
    state = torch.load(tmp_path / "frozen.pth", weights_only=True)["model"]
    tower = {k.removeprefix("vision_model."): v for k, v in stored(folder).items() if k.startswith("vision_model.")}
    for name in tower:
        if name.endswith("qkv.bias"):
            tower[name][24:48] = 0  # LAVIS has no bias of the keys
    tuned = {f"visual_encoder.{name}": tensor for name, tensor in eva.to_lavis(tower).items()}
    torch.save({"model": state | tuned}, tmp_path / "tuned.pth")
    named = ("--llm", folder, "--text-init", folder / "qformer_tokenizer")
    convert(tmp_path / "tuned.pth", tmp_path / "ours", "--to", "blip2", *named)
    convert(tmp_path / "tuned.pth", tmp_path / "written", "--to", "hf", *named)
    for source in ("ours", "written"):
        model = blip2.load(tmp_path / source)
        assert model.settings.image_size == 28
        here = model.vision_model.network.state_dict()
        for name, tensor in tower.items():
            assert torch.equal(here[name], tensor) or name.startswith(eva.UNUSED), name
    load_whole(tmp_path / "written")
    convert(tmp_path / "ours", tmp_path / "back.pth", "--to", "lavis")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert back.keys() == (state | tuned).keys()
    assert all(torch.equal(tensor, (state | tuned)[name]) for name, tensor in back.items())


def test_what_hugging_faces_layout_has_no_place_for_is_said(tmp_path):
    from inference.tiny_model import make_tiny_model

    tiny = make_tiny_model(tmp_path)
    with pytest.raises(MissingPart, match="Add --part NAME"):
        convert(tiny.model, tmp_path / "x", "--to", "hf")
    with pytest.raises(UnknownModel, match=r"looks through .*one kind of image encoder only"):
        convert(tiny.model, tmp_path / "x", "--to", "hf", "--part", "generation")
    assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match="written over"):
        convert(tiny.model, tiny.model, "--to", "blip2", "--part", "stage1")


def test_a_pth_is_a_model_with_the_names_of_its_frozen_parts(peers, tmp_path, monkeypatch):
    monkeypatch.setenv("BLIP2_HOME", str(tmp_path / "home"))
    folder = peers("blip2-opt").folder
    convert(folder, tmp_path / "a.pth", "--to", "lavis")
    name = f"{tmp_path / 'a.pth'},vision={folder},llm={folder},image_size=28"
    (image,), asked = pictures(1), {"prompts": [PROMPTS[0]], "num_beams": 2}
    said = blip2.load(folder).generate([image], **asked)
    assert [blip2.load(name).generate([image], **asked) for _ in range(2)] == [said, said]
    assert len(list((tmp_path / "home" / "converted").iterdir())) == 1  # made once
    for wrong, error, message in (
        (f"{tmp_path / 'a.pth'},vision={folder}", UserError, r"a\.pth,llm=NAME as a model"),
        (f"{tmp_path / 'a.pth'},tower=x", UserError, "has no part tower"),
        (f"{tmp_path / 'a.pth'},image_size=big", UserError, "no number of pixels"),
        (f"{tmp_path / 'b.pth'},vision={folder}", MissingFile, "There is no file"),
    ):
        with pytest.raises(error, match=message):
            blip2.load(wrong)


def test_an_encoder_of_another_make_is_named():
    with pytest.raises(BadData, match=r"holds rope.freqs, which EVA"):
        eva.from_lavis({"rope.freqs": torch.ones(2)})
