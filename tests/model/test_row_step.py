"""The step of a single row, written out in kernels, gives what transformers' own gives; without a GPU interpreted."""

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

pytest.importorskip("triton", reason="Triton is for Linux alone")

from blip2.model import replay, row_kernels
from blip2.model.quantized import quantize
from blip2.model.replay import Replay
from blip2.model.row_step import RowStep
from blip2.model.writing import Decoding, write

from .test_writing import WIDTH, _gpt2, _llama, _opt, alone, make_language_model, make_prompts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTH, PLACE = 24, 17


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that tiny widths and lengths are more than one block."""
    monkeypatch.setattr(row_kernels, "COLUMNS", 32)
    monkeypatch.setattr(row_kernels, "POSITIONS", 8)
    monkeypatch.setattr(replay, "LENGTHS", 8)


def _close(y, expected):
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("before", [row_kernels.PLAIN, row_kernels.LAYER_NORM, row_kernels.RMS_NORM, row_kernels.GATE])
@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("after", [False, True])
def test_a_product_with_what_stands_around_it(before, bits, after):
    torch.manual_seed(0)
    num_rows, width = 37, 75
    x = torch.randn(width * 2 if before == row_kernels.GATE else width, device=DEVICE)
    gain, shift = torch.randn(2, width, device=DEVICE)
    if bits is None:
        weight, scale = torch.randn(num_rows, width, device=DEVICE), None
        floats = weight
    else:
        weight = torch.randint(-127, 128, (num_rows, width), dtype=torch.int8, device=DEVICE)
        scale = torch.rand(num_rows, device=DEVICE) / 100
        floats = weight * scale[:, None]
    bias, residual = torch.randn(2, num_rows, device=DEVICE)
    read = {
        row_kernels.PLAIN: lambda: x,
        row_kernels.LAYER_NORM: lambda: F.layer_norm(x, (width,), gain, shift, 1e-3),
        row_kernels.RMS_NORM: lambda: F.rms_norm(x, (width,), gain, 1e-3),
        row_kernels.GATE: lambda: F.silu(x[:width]) * x[width:],
    }[before]()
    expected = F.linear(read, floats)
    given = {}
    if before in (row_kernels.LAYER_NORM, row_kernels.RMS_NORM):
        given = {"gain": gain, "eps": 1e-3, "shift": shift if before == row_kernels.LAYER_NORM else None}
    if after:
        expected = F.relu(expected + bias) + residual
        given |= {"bias": bias, "is_rectified": True, "residual": residual}
    y = torch.full((num_rows,), torch.nan, device=DEVICE)
    row_kernels.row_product(x, weight, y, before=before, scale=scale, **given)
    _close(y, expected)


@pytest.mark.parametrize("num_shared", [1, 2, 6])
@pytest.mark.parametrize("is_rotary", [False, True])
def test_attention_of_a_new_position(num_shared, is_rotary):
    torch.manual_seed(0)
    num_heads, width = 6, 10
    heads = torch.randn(num_heads + 2 * num_shared, width, device=DEVICE)
    keys, values = torch.randn(2, 1, num_shared, LENGTH, width, device=DEVICE)
    mask = torch.zeros(LENGTH, device=DEVICE)
    mask[:3] = torch.finfo(torch.float32).min  # padding
    turns = tuple(torch.randn(2, width, device=DEVICE)) if is_rotary else None
    query, key, value = heads.split([num_heads, num_shared, num_shared])
    if turns is not None:
        half = width // 2
        query, key = (
            one * turns[0] + torch.cat([-one[:, half:], one[:, :half]], dim=1) * turns[1] for one in (query, key)
        )
    put_keys, put_values = keys.clone(), values.clone()
    put_keys[0, :, PLACE], put_values[0, :, PLACE] = key, value
    seen = [
        states[:, :, 3 : PLACE + 1].repeat_interleave(num_heads // num_shared, 1) for states in (put_keys, put_values)
    ]
    expected = F.scaled_dot_product_attention(query[None, :, None], *seen, scale=0.4).flatten()
    y = torch.full((num_heads * width,), torch.nan, device=DEVICE)
    slot = torch.tensor([PLACE], device=DEVICE)
    row_kernels.row_attention(heads.flatten(), keys, values, slot, mask, y, scale=0.4, turns=turns)
    _close(y, expected)
    assert torch.allclose(keys, put_keys, atol=1e-6) and torch.allclose(values, put_values, atol=1e-6)


def _shared_llama():
    """Two heads share keys and values, all products have biases."""
    shape = {"hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    few = {"num_key_value_heads": 2, "attention_bias": True, "head_dim": 12}
    return LlamaForCausalLM(LlamaConfig(vocab_size=60, max_position_embeddings=64, **shape, **few))


MODELS = [_llama, _opt, _shared_llama]


@pytest.mark.parametrize("bits", [None, "int8"])
@pytest.mark.parametrize("make", MODELS)
def test_texts_are_those_of_the_plain_model(make, bits, monkeypatch):
    monkeypatch.setattr("blip2.model.quantized.block_of", lambda width: 0)  # a GPU turns weights back
    plain, written_out = make_language_model(make), make_language_model(make)
    for language_model in (plain, written_out):
        if bits is not None:
            quantize(language_model.model, bits)
        language_model.to(DEVICE)
    assert RowStep.can_take(written_out.model)
    written_out.replay = Replay(written_out.model, RowStep(written_out.model))
    for row in range(3):
        decoding = Decoding(max_new_tokens=14, min_new_tokens=row)
        texts = []
        for language_model in (plain, written_out):
            prompt = [one.to(DEVICE) for one in alone(make_prompts(language_model), row, language_model)]
            texts.append(write(language_model, *language_model.start(*prompt), decoding).tolist())
        assert texts[0] == texts[1]
    assert {rows for rows, _ in written_out.replay._steps} == {1}


@pytest.mark.parametrize("make", MODELS)
def test_the_models_own_layers_compute_as_before(make):
    language_model = make_language_model(make)
    ids = torch.arange(7)[None]
    with torch.no_grad():
        before = language_model.model(input_ids=ids).logits
        RowStep(language_model.model)
        assert torch.equal(language_model.model(input_ids=ids).logits, before)


def test_what_the_kernels_do_not_know_is_not_taken():
    assert not RowStep.can_take(make_language_model(_gpt2).model)
    shape = {"vocab_size": 60, "hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "num_attention_heads": 2}
    late = OPTConfig(**shape, do_layer_norm_before=False)
    assert not RowStep.can_take(OPTForCausalLM(late))
    four_bits = make_language_model(_opt).model
    quantize(four_bits, "int4", group_size=16)
    assert not RowStep.can_take(four_bits)
    turned = make_language_model(_opt).model
    quantize(turned, "int8")
    assert not RowStep.can_take(turned)
