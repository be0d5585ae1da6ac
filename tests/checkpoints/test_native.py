"""Our model folder: what is written is read back, whole or not at all, and nothing else is trusted."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn

from blip2.checkpoints import native
from blip2.errors import BadData, MissingPart, UnknownModel, Untrusted
from blip2.model.config import QFormerConfig

SETTINGS = native.ModelSettings(
    name="small",
    vision=native.FrozenPart("efficientnet-lite2", "ab" * 32),
    text_init=native.FrozenPart("minilm-l6-v2"),
    qformer=QFormerConfig(hidden_size=32, num_query_tokens=4),
    image_size=256,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
    prompts=native.Prompts("a picture of", "Describe.", "Question: {} Answer:"),
    from_text_init=("words.weight",),
    notes={"seed": 1, "said": "图 é"},
)


@pytest.fixture
def state():
    return {"layer.weight": torch.randn(3, 4), "temperature": torch.tensor(0.07), "count": torch.tensor([2, 3])}


@pytest.fixture
def folder(tmp_path, state):
    native.save_model_folder(tmp_path / "small", SETTINGS, {"stage1": state})
    return tmp_path / "small"


def read(folder):
    return native.load_part(folder, native.read_settings(folder), "stage1")


def test_what_is_written_is_read_back(folder, state):
    settings = native.read_settings(folder)
    assert settings.name == "small" and settings.qformer == SETTINGS.qformer and settings.notes == SETTINGS.notes
    loaded = read(folder)
    assert torch.equal(loaded["layer.weight"], state["layer.weight"].half().float())
    assert torch.equal(loaded["temperature"], state["temperature"])  # scalars keep float32
    assert torch.equal(loaded["count"], state["count"])
    assert native.load_part(folder, settings, "stage1", torch.bfloat16)["layer.weight"].dtype == torch.bfloat16


def test_weights_take_two_bytes_on_disk(folder):
    tensors = safetensors.torch.load_file(folder / "stage1.safetensors")
    assert tensors["layer.weight"].dtype == torch.float16


def test_the_same_weights_give_the_same_bytes(folder, tmp_path, state):
    native.save_model_folder(tmp_path / "again", SETTINGS, {"stage1": dict(reversed(state.items()))})
    for name in ("blip2.json", "stage1.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_frozen_parts_and_the_text_start_are_not_stored():
    module = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("vision_model", "language_model", "qformer", "words")})
    assert set(native.trained_state(module, ("words.weight",))) == {"qformer.weight", "qformer.bias", "words.bias"}


def test_writing_again_replaces_our_files_and_keeps_the_others(folder, state):
    (folder / "README.md").write_text("a model card")
    native.save_model_folder(folder, SETTINGS, {"generation": state})
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "blip2.json", "generation.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["small"]


def test_a_failed_write_leaves_the_old_folder_whole(folder, state):
    with pytest.raises(BadData, match=r"layer\.weight holds values that are not finite in float16"):
        native.save_model_folder(folder, SETTINGS, {"stage1": {"layer.weight": torch.tensor([1e6])}})
    assert torch.equal(read(folder)["count"], state["count"])
    assert [path.name for path in folder.parent.iterdir()] == ["small"]


def test_a_part_that_is_not_there_is_named(folder):
    with pytest.raises(MissingPart, match="lacks the generating part; it has the retrieval part"):
        native.load_part(folder, native.read_settings(folder), "generation")


def test_a_changed_file_is_refused(folder):
    path = folder / "stage1.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(Untrusted, match="its sha256 differs"):
        read(folder)


def test_a_missing_file_is_named(folder):
    (folder / "stage1.safetensors").unlink()
    with pytest.raises(BadData, match=r"stage1\.safetensors is missing"):
        read(folder)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"format": 2}, UnknownModel, "does not know. Update blip2"),
        ({"surprise": 1}, BadData, r"unknown fields \['surprise'\]"),
        ({"vision": None}, BadData, "no vision model is named"),
        ({"qformer": {"hidden": 3}}, BadData, "is broken"),
        ({"prompts": {}}, BadData, "is broken"),
        ({"parts": {"stage1": {"file": "../../secret", "sha256": "0"}}}, Untrusted, "would lie outside"),
    ],
)
def test_settings_that_are_not_ours_are_refused(folder, change, error, message):
    path = folder / "blip2.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(error, match=message):
        read(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 1}'])
def test_a_broken_settings_file_is_refused(folder, text):
    (folder / "blip2.json").write_text(text)
    with pytest.raises(BadData, match="is broken"):
        read(folder)


def test_a_pickle_in_the_place_of_weights_is_refused(folder):
    import hashlib

    torch.save({"a": torch.zeros(1)}, folder / "stage1.safetensors")
    settings = json.loads((folder / "blip2.json").read_text())
    settings["parts"]["stage1"]["sha256"] = hashlib.sha256((folder / "stage1.safetensors").read_bytes()).hexdigest()
    (folder / "blip2.json").write_text(json.dumps(settings))
    with pytest.raises(Untrusted, match="is no safetensors file"):
        read(folder)
