"""A checkpoint that would run or fetch code, or lies about its weights, is refused by name, and no code runs."""

import json
import os
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

import blip2
from blip2.errors import BadData, MissingFile, Untrusted

from .hf_checkpoints import make


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A sound checkpoint."""
    return make("blip2-opt", tmp_path_factory.mktemp("good") / "checkpoint").folder


@pytest.fixture
def folder(good, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(good, tmp_path / "spoilt")


@pytest.fixture
def canary(tmp_path):
    """A folder that a payload would make."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code of the checkpoint ran"


class Payload:
    """Makes the canary when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (os.mkdir, (str(self.canary),))


PICKLES = ("pytorch_model.bin", "model.pt", "model.pth", "training_args.bin", "optimizer.pt", "query_tokens.pkl")


def change(path, **settings):
    """Puts settings into a JSON file."""
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(values | settings))


def test_pickles_beside_sound_weights_are_never_opened(folder, canary):
    for name in PICKLES:
        torch.save({"query_tokens": Payload(canary)}, folder / name)
    assert blip2.load(folder).settings.qformer.num_query_tokens == 5


def test_extras_that_lie_are_refused(folder):
    extras = folder / "blip2" / "extras.safetensors"
    extras.parent.mkdir()
    extras.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(Untrusted, match=r"extras\.safetensors is no whole safetensors file"):
        blip2.load(folder)
    for metadata in (None, {"settings": "no json"}, {"settings": '{"prompts": {"caption": 1}}'}):
        save_file({"x": torch.ones(1)}, extras, metadata=metadata)
        with pytest.raises(BadData, match=r"extras\.safetensors is broken"):
            blip2.load(folder)


def test_weights_that_are_pickles_are_refused(folder, canary):
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    with pytest.raises(MissingFile, match="no weights"):
        blip2.load(folder)
    torch.save({"query_tokens": Payload(canary)}, folder / "pytorch_model.bin")
    with pytest.raises(Untrusted, match="pickles only"):
        blip2.load(folder)


CODE = "import os\nos.mkdir({canary!r})\nclass Evil: pass\n"


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer_config.json", "processor_config.json", "generation_config.json"]
)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"auto_map": {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}}, "auto_map to Python code"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"_attn_implementation_internal": "somebody/kernel"}, "_attn_implementation_internal.*fetch compiled code"),
        ({"text_config": {"model_type": "opt", "attn_implementation": {"": "a/b:c"}}}, "attn_implementation"),
    ],
)
def test_settings_that_run_code_are_refused_with_file_and_reason(folder, canary, file, settings, message):
    (folder / "evil.py").write_text(CODE.format(canary=str(canary)))
    change(folder / file, **settings)
    with pytest.raises(Untrusted, match=message) as refused:
        blip2.load(folder)
    assert file in str(refused.value)


def test_settings_that_are_no_json_are_refused(folder):
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(BadData, match=r"generation_config.json is broken"):
        blip2.load(folder)


def header(path, edit):
    """Rewrites a safetensors file's header."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    values = json.loads(data[8 : 8 + length])
    edit(values)
    text = json.dumps(values).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def first_tensor(values):
    return next(values[name] for name in values if name != "__metadata__")


LIES = {
    "offsets beyond the file": lambda values: first_tensor(values).update(data_offsets=[0, 1 << 40]),
    "a shape of another size": lambda values: first_tensor(values).update(shape=[1 << 20, 1 << 20]),
    "overlapping tensors": lambda values: first_tensor(values).update(data_offsets=[4, 8]),
    "an unknown dtype": lambda values: first_tensor(values).update(dtype="PICKLE"),
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie_are_refused(folder, lie):
    path = sorted(folder.glob("*.safetensors"))[0]
    header(path, LIES[lie])
    with pytest.raises(Untrusted, match=r"is no whole safetensors file") as refused:
        blip2.load(folder)
    assert path.name in str(refused.value)


@pytest.mark.parametrize("cut", [0, 4, 20, -50])
def test_cut_shards_are_refused(folder, cut):
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(Untrusted, match="is no whole safetensors file"):
        blip2.load(folder)


@pytest.mark.parametrize(
    "name",
    [
        "query_tokens",
        "language_projection.weight",
        "vision_model.embeddings.class_embedding",
        "language_model.model.decoder.embed_tokens.weight",
    ],
)
def test_weights_of_a_wrong_shape_are_refused(folder, name):
    for path in folder.glob("*.safetensors"):
        weights = load_file(path)
        if name in weights:
            weights[name] = torch.zeros(3, 3)
            save_file(weights, path, metadata={"format": "pt"})
            break
    else:
        raise AssertionError(f"{name} is in no shard")
    with pytest.raises(BadData, match=r"shape|fit"):
        blip2.load(folder)
