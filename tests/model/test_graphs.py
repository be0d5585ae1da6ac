"""A quantised LLM whose layers are graphs reads and writes as the same weights do in transformers' layers."""

import copy
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from blip2.errors import UserError
from blip2.model import quantized as quantized_module
from blip2.model.graphs import decoders, graph, t5
from blip2.model.graphs.graph import Graph, input_groups, whole_zeros
from blip2.model.graphs.taking_over import OnnxLinear, take_over
from blip2.model.language import DecoderLM, EncoderDecoderLM
from blip2.model.quantized import Int4Linear, Int8Embedding, Int8Linear, quantize, to_int4, to_int8

VOCABULARY, WIDTH = 80, 64
FLOAT_INPUTS = 0  # the kernel's accuracy level that rounds no inputs
IDS = torch.tensor([[0, 0, 5, 9], [7, 3, 2, 8]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])


def _opt(**other):
    shape = {"hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 96, "num_hidden_layers": 3}
    config = {"vocab_size": VOCABULARY, "num_attention_heads": 4, "max_position_embeddings": 256}
    return OPTForCausalLM(OPTConfig(**shape | config | other))


def _opt_norms_last():
    return _opt(do_layer_norm_before=False)


def _opt_of_two_kinds_of_bits():
    return _opt(ffn_dim=90)


def _llama(**other):
    shape = {"hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **shape, num_key_value_heads=4, **other))


def _llama_of_shared_heads():
    shape = {"hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **shape, num_key_value_heads=2, head_dim=16))


def _t5(**other):
    shape = {"d_model": WIDTH, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
    other = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} | other
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **shape | other))


def _opt_of_narrow_words():
    return _opt(word_embed_proj_dim=32)


def _t5_with_a_head_of_its_own():
    network = _t5()
    network.lm_head.weight = nn.Parameter(torch.empty(VOCABULARY, WIDTH))
    return network


FIRST = {_opt: "layers.0.fc1", _t5: "block.0.layer.0.SelfAttention.q"}
FAMILIES = [_opt, _opt_norms_last, _opt_of_two_kinds_of_bits, _llama, _llama_of_shared_heads, _t5]
FAMILIES += [_opt_of_narrow_words, _t5_with_a_head_of_its_own]


def quantized(make, bits="int4"):
    torch.manual_seed(0)
    network = make().eval().requires_grad_(False)
    for weight in network.parameters():
        if weight.dim() > 1:
            weight.normal_(0, 0.1)
    quantize(network, bits, group_size=32)
    return network


def whole(network):
    """The same network with the weights that the rounded ones stand for, in float32."""
    network = copy.deepcopy(network)
    for name, layer in list(network.named_modules()):
        if isinstance(layer, Int8Embedding):
            network.set_submodule(name, nn.Embedding.from_pretrained(layer.weight * layer.scale[:, None]))
        if not isinstance(layer, Int4Linear | Int8Linear):
            continue
        if isinstance(layer, Int8Linear):
            weight = layer.weight * layer.scale[:, None]
        else:
            q = torch.stack([layer.packed & 15, layer.packed >> 4], dim=2).flatten(1).float()
            scale, zero = layer.scale_and_zero.float().transpose(0, 1).unbind(dim=2)
            groups = q.unflatten(1, (-1, layer.group_size)) - 8
            weight = (groups * scale[..., None] + zero[..., None]).flatten(1)
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        linear.weight.data = weight
        if layer.bias is not None:
            linear.bias.data = layer.bias
        network.set_submodule(name, linear)
    return network


def language_models(make, bits="int4"):
    """The network with whole weights, and taken over."""
    network = quantized(make, bits)
    kind = EncoderDecoderLM if network.config.is_encoder_decoder else DecoderLM
    expected = kind(whole(network), stop_ids=[1], pad_id=0)
    assert take_over(network)
    return expected, kind(network, stop_ids=[1], pad_id=0)


def near(y, expected, error):
    """Between whole steps and bfloat16's zeros 0.003 at most was measured, 0.005 is allowed; between inputs of eight
    bits and whole ones 0.06, and for one product 0.01; 0.1 and 0.02 are."""
    assert y.shape == expected.shape
    assert float((y - expected).norm() / expected.norm()) < error


@pytest.fixture
def visual_prompt():
    torch.manual_seed(1)
    return torch.randn(2, 5, WIDTH)


@pytest.fixture
def float_inputs(monkeypatch):
    monkeypatch.setattr(graph, "INT8_INPUTS", FLOAT_INPUTS)


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("make", FAMILIES)
def test_the_graph_reads_and_writes_as_the_layers_do(float_inputs, visual_prompt, make, bits):
    """Rows of different lengths, and more words than the buffers have room for at first."""
    logits = []
    for language_model in language_models(make, bits):
        visual_prompt = visual_prompt[:, :, : language_model.width]
        reading, first = language_model.start(visual_prompt, IDS, MASK)
        steps = [language_model.step(reading, torch.tensor([3 + i % 9, 8])) for i in range(70)]
        losses = language_model.token_losses(visual_prompt, IDS, MASK, IDS, torch.ones_like(IDS))
        logits.append((torch.stack([first, *steps]), losses))
    near(logits[1][0], logits[0][0], 5e-3)
    near(logits[1][1], logits[0][1], 5e-3)


@pytest.mark.parametrize("make", [_opt, _llama_of_shared_heads, _t5])
def test_inputs_of_eight_bits_stay_near(visual_prompt, make):
    expected, language_model = (lm.start(visual_prompt, IDS, MASK)[1] for lm in language_models(make))
    near(language_model, expected, 0.1)


@pytest.mark.parametrize("make", [_opt, _llama_of_shared_heads, _t5])
def test_rows_leave_join_and_are_chosen(float_inputs, visual_prompt, make):
    logits = []
    for language_model in language_models(make):
        reading, _ = language_model.start(visual_prompt, IDS, MASK)
        language_model.step(reading, torch.tensor([4, 5]))
        reading.select(torch.tensor([1, 1, 0]))
        other, _ = language_model.start(visual_prompt[:1], IDS[1:], MASK[1:])
        reading.join(other)
        steps = [language_model.step(reading, torch.tensor([2, 3, 4, 5]))]
        reading.select(torch.tensor([3]))
        if not language_model.is_encoder_decoder:
            steps.append(language_model.step_through(reading, [6, 7, 8]))
            reading.shorten(reading.mask.shape[1] - 2)
        steps.append(language_model.step(reading, torch.tensor([9])))
        logits.append(torch.cat(steps))
    near(logits[1], logits[0], 5e-3)


@pytest.mark.parametrize("make", [_opt, _llama, _t5])
def test_layers_may_be_in_several_graphs(make, float_inputs, monkeypatch, visual_prompt):
    one = language_models(make)[1]
    monkeypatch.setattr(decoders, "AT_ONCE", 1)
    monkeypatch.setattr(t5, "AT_ONCE", 1)
    each = language_models(make)[1]
    logits = []
    for language_model, count in ((one, 1), (each, 2 if make is _t5 else 3)):
        decoder = language_model.model.get_decoder()
        assert len(decoder.block if make is _t5 else decoder.layers) == count
        reading, first = language_model.start(visual_prompt, IDS, MASK)
        logits += [torch.stack([first, language_model.step(reading, torch.tensor([4, 5]))])]
    torch.testing.assert_close(logits[0], logits[1])


def test_a_row_is_read_as_if_it_were_alone(visual_prompt):
    language_model = language_models(_llama)[1]
    together = language_model.start(visual_prompt, IDS, MASK)[1]
    alone = language_model.start(visual_prompt[:1], IDS[:1, 2:], MASK[:1, 2:])[1]
    near(alone[0], together[0], 1e-5)


def test_several_threads_of_a_program_may_read_at_once(visual_prompt):
    language_model = language_models(_opt)[1]
    expected = language_model.start(visual_prompt, IDS, MASK)[1]
    results, together = [], threading.Barrier(6)

    def read():
        together.wait()
        results.append(language_model.start(visual_prompt, IDS, MASK)[1])

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6 and all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("num_rows", [1, 5, 70])
@pytest.mark.parametrize(("length", "group_size"), [(256, 128), (192, 64), (96, 32)])
def test_a_layer_alone_computes_with_the_weights_it_stores(length, group_size, num_rows):
    torch.manual_seed(0)
    linear = nn.Linear(length, 48).requires_grad_(False)
    x = torch.randn(length, num_rows).t()  # its rows need not lie one after the other
    for layer in (
        Int4Linear(*to_int4(linear.weight, group_size), linear.bias),
        Int8Linear(*to_int8(linear.weight), linear.bias),
        Int8Linear(*to_int8(linear.weight), None),
    ):
        expected = whole(nn.Sequential(layer))(x)
        y = OnnxLinear(layer)(x)
        near(y, expected, 0.02)
        assert y.dtype == torch.float32


@pytest.mark.parametrize("length", [7, 16, 36, 100])
def test_rows_of_any_length_are_multiplied(length):
    torch.manual_seed(0)
    linear = nn.Linear(length, 40).requires_grad_(False)
    layer = Int8Linear(*to_int8(linear.weight), linear.bias)
    x = torch.randn(2, 3, length)
    near(OnnxLinear(layer)(x), whole(nn.Sequential(layer))(x), 0.02)


def test_what_stands_out_makes_its_own_group_coarse_alone():
    torch.manual_seed(0)
    linear = nn.Linear(256, 40, bias=False).requires_grad_(False)
    linear.weight[:, 7] = 0
    layer = Int8Linear(*to_int8(linear.weight), None)
    x = torch.randn(4, 256)
    x[:, :32] = 0
    x[:, 7] = 1e4
    near(OnnxLinear(layer)(x), whole(nn.Sequential(layer))(x), 0.02)


def test_inputs_of_eight_bits_are_rounded_in_the_groups_that_a_layer_names():
    torch.manual_seed(0)
    linear = nn.Linear(384, 40, bias=False).requires_grad_(False)
    x = torch.randn(4, 384)
    x[:, 7] = 1e4  # in a group of 128 every other input is rounded to 0
    weight, scale = to_int8(linear.weight)
    y = OnnxLinear(Int8Linear(weight, scale, None, group_size=128))(x)
    x[:, :128] = x[:, :128] * (torch.arange(128) == 7)
    near(y, x @ (weight * scale[:, None]).t(), 1e-4)
    assert y.std() > 10


def test_a_group_is_halved_until_a_row_has_whole_ones():
    for length, group_size in ((256, 256), (384, 128), (96, 32), (48, 16), (20, 16)):
        weight = torch.ones(16, length, dtype=torch.int8)
        assert input_groups(Int8Linear(weight, torch.ones(16), None, group_size=256)) == group_size


def test_a_gradient_is_refused_instead_of_lost(visual_prompt):
    language_model = language_models(_opt)[1]
    prompt = visual_prompt.requires_grad_()
    with pytest.raises(UserError, match="no gradient"):
        language_model.token_losses(prompt, IDS, MASK, IDS, torch.ones_like(IDS))
    language_model.start(prompt, IDS, MASK)


def test_other_precisions_flow_between_the_layers(visual_prompt):
    network = quantized(_llama).to(torch.bfloat16)
    for module in network.modules():
        if isinstance(module, Int8Embedding):
            module.dtype = torch.bfloat16
    expected = language_models(_llama)[1].start(visual_prompt, IDS, MASK)[1]
    assert take_over(network)
    logits = DecoderLM(network, stop_ids=[1], pad_id=0).start(visual_prompt, IDS, MASK)[1]
    near(logits, expected, 0.1)


def test_families_without_a_graph_keep_their_layers():
    torch.manual_seed(0)
    network = GPT2LMHeadModel(GPT2Config(vocab_size=80, n_embd=64, n_layer=2, n_head=4)).eval().requires_grad_(False)
    quantize(network, "int8")
    assert not take_over(network)
    assert not take_over(quantized(lambda: _opt(activation_function="gelu")))
    assert not take_over(quantized(lambda: _t5(feed_forward_proj="relu")))
    network(torch.arange(5)[None])


@pytest.mark.parametrize("make", [_opt, _t5])
def test_zeros_that_are_no_whole_steps_are_added(float_inputs, monkeypatch, visual_prompt, make):
    """As in weights that had four bits before, and in folders that an earlier version wrote."""
    monkeypatch.setattr(quantized_module, "WORTH_WHOLE", 0)
    assert (
        whole_zeros(*quantized(make).get_decoder().get_submodule(FIRST[make]).scale_and_zero.float().unbind(2)) is None
    )
    logits = []
    for language_model in language_models(make):
        reading, first = language_model.start(visual_prompt, IDS, MASK)
        logits.append(torch.stack([first, language_model.step(reading, torch.tensor([4, 5]))]))
    near(logits[1], logits[0], 5e-3)


def test_zeros_are_whole_steps_where_that_loses_little():
    torch.manual_seed(0)
    weight = torch.randn(300, 64)
    packed, scale_and_zero = to_int4(weight)
    assert whole_zeros(*scale_and_zero.float().unbind(2)) is not None
    again = (packed[:, 0:32] & 15).float() * 0.1 + 0.033  # weights of sixteen values, none of them 0
    stored, found = to_int4(again)
    assert whole_zeros(*found.float().unbind(2)) is None
    layer = Int4Linear(stored, found, None)
    near(whole(nn.Sequential(layer))[0].weight, again, 0.03)


def test_unquantised_layers_stay():
    assert not take_over(_opt().eval())


def test_nothing_is_left_where_temporary_files_go(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    language_models(_opt)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is full")
def test_a_full_disk_says_what_is_needed():
    for is_small in (True, False):  # a small one is written when the file is closed
        empty = Graph()
        empty._files["constants"].close()
        empty._files["constants"] = open("/dev/full", "wb")  # noqa: SIM115
        with pytest.raises(UserError, match=r"\(No space left on device\).*TMPDIR"):
            empty.constant(torch.zeros(3 if is_small else 1 << 20))
            empty.session()


def test_no_folder_for_temporary_files_says_what_is_needed(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(UserError, match="TMPDIR"):
        language_models(_opt)


def test_half_precision_does_not_overflow():
    """T5's states grow beyond what float16 holds; transformers' layers clamp them."""
    network = quantized(_t5)
    network.encoder.block[0].layer[1].DenseReluDense.wo.scale_and_zero *= 1e7
    for module in network.modules():
        if isinstance(module, Int8Embedding):
            module.dtype = torch.float16
    assert take_over(network)
    states, _, _ = network.encoder.block[0](torch.randn(1, 4, WIDTH).half(), None, None)
    assert states.dtype == torch.float16 and float(states.abs().max()) == torch.finfo(torch.float16).max
