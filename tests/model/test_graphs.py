"""A quantised LLM whose layers are graphs reads and writes as the same weights do in transformers' layers."""

import copy
import gc
import tempfile
import threading
import weakref
from types import SimpleNamespace

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
from blip2.model.graphs.taking_over import take_over
from blip2.model.language import DecoderLM, EncoderDecoderLM
from blip2.model.quantized import Int4Linear, Int8Embedding, Int8Linear, quantize, to_int4
from blip2.model.reading import Prefix
from model.rounded import EXACT, RoundedRows, float_inputs, near, whole, words_of

VOCABULARY, WIDTH = 80, 64
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


FAMILIES = [_opt, _opt_norms_last, _opt_of_two_kinds_of_bits, _llama, _llama_of_shared_heads, _t5]
FAMILIES += [_opt_of_narrow_words, _t5_with_a_head_of_its_own]


def with_floats(make):
    torch.manual_seed(0)
    network = make().eval().requires_grad_(False)
    for name, weight in network.named_parameters():
        if weight.dim() > 1:
            weight.normal_(0, 2.0 if "relative_attention_bias" in name else 0.1)
    return network


def quantized(make, bits="int4"):
    network = with_floats(make)
    quantize(network, bits, group_size=32)
    return network


def language_models(make, bits="int4", layer_of=RoundedRows):
    """The network by PyTorch, and taken over; of no bits in float32."""
    network = quantized(make, bits) if bits else with_floats(make)
    kind = EncoderDecoderLM if network.config.is_encoder_decoder else DecoderLM
    expected = kind(whole(network, layer_of) if bits else copy.deepcopy(network), stop_ids=[1], pad_id=0)
    assert take_over(network)
    language_model = kind(network, stop_ids=[1], pad_id=0)
    language_model.replay = next(part.words for part in network.modules() if hasattr(part, "words"))
    language_model.prompts = next((part.prompts for part in network.modules() if hasattr(part, "prompts")), None)
    return expected, language_model


@pytest.fixture
def visual_prompt():
    torch.manual_seed(1)
    return torch.randn(2, 5, WIDTH)


@pytest.mark.parametrize("bits", ["int8", "int4", None])
@pytest.mark.parametrize("make", FAMILIES)
def test_what_is_read_and_written_is_what_the_layers_would(visual_prompt, make, bits):
    """Rows of different lengths, and more words than the buffers have room for at first."""
    logits = []
    for language_model in language_models(make, bits):
        visual_prompt = visual_prompt[:, :, : language_model.width]
        reading, first = language_model.start(visual_prompt, IDS, MASK)
        steps = [language_model.step(reading, torch.tensor([3 + i % 9, 8])) for i in range(70)]
        losses = language_model.token_losses(visual_prompt, IDS, MASK, IDS, torch.ones_like(IDS))
        logits.append((torch.stack([first, *steps]), losses))
    near(logits[1][0], logits[0][0], EXACT)
    near(logits[1][1], logits[0][1], EXACT)


@pytest.mark.parametrize("bits", ["int8", "int4", None])
@pytest.mark.parametrize("make", FAMILIES)
def test_words_of_a_single_row_are_what_the_layers_would_say(visual_prompt, make, bits):
    """In one pass of all layers, where the LLM can: with padding before it, and past the room there is at first."""
    logits = []
    for language_model in language_models(make, bits):
        visual = visual_prompt[:1, :, : language_model.width]
        reading, first = language_model.start(visual, IDS[:1], MASK[:1])
        logits.append(
            torch.stack([first, *(language_model.step(reading, torch.tensor([3 + i % 9])) for i in range(70))])
        )
    takes = make is not _opt_of_narrow_words
    assert (language_model.replay is not None and language_model.replay.takes(reading)) == takes
    near(logits[1], logits[0], EXACT)


@pytest.mark.parametrize("make", [_opt, _opt_norms_last, _llama, _llama_of_shared_heads])
def test_floats_read_a_single_prompt_in_one_pass(visual_prompt, make):
    """Of one length and another, and as the layers would; of rounded inputs, how many are read together matters."""
    expected, language_model = language_models(make, None)
    assert language_models(make)[1].prompts is None
    for length in (2, 4, 0, 1):
        given = visual_prompt[:1], IDS[1:, :length], MASK[1:, :length]
        both = [one.start(*given) for one in (expected, language_model)]
        near(both[1][1], both[0][1], EXACT)
        for layer, other in zip(*(one[0].cache.layers for one in both), strict=True):
            near(other.keys, layer.keys, EXACT)
            near(other.values, layer.values, EXACT)
    embeds = language_model.embed(torch.cat([IDS, IDS], dim=1))
    assert language_model.prompts.takes(embeds[:1], torch.ones(1, 8))
    assert not language_model.prompts.takes(embeds[:1], torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]]))
    assert not language_model.prompts.takes(embeds, torch.ones(2, 8))
    assert not language_model.prompts.takes(torch.zeros(1, 1000, WIDTH), torch.ones(1, 1000))


@pytest.mark.parametrize("make", [_opt, _llama_of_shared_heads, _t5])
def test_inputs_of_eight_bits_stay_near(visual_prompt, make):
    both = language_models(make, layer_of=float_inputs)
    expected, logits = (language_model.start(visual_prompt, IDS, MASK)[1] for language_model in both)
    near(logits, expected, 0.1)


@pytest.mark.parametrize("make", [_opt, _llama_of_shared_heads, _t5])
def test_rows_leave_join_and_are_chosen(visual_prompt, make):
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
    near(logits[1], logits[0], EXACT)


def test_a_row_is_read_as_if_it_were_alone(visual_prompt):
    language_model = language_models(_llama)[1]
    together = language_model.start(visual_prompt, IDS, MASK)[1]
    alone = language_model.start(visual_prompt[:1], IDS[:1, 2:], MASK[:1, 2:])[1]
    near(alone[0], together[0], 1e-5)


def test_several_threads_of_a_program_may_read_at_once(visual_prompt):
    """Some of them a picture that is new, beside others' batches."""
    language_model = language_models(_opt)[1]
    language_model.attends_apart = language_model.model.get_decoder().layers[0]
    expected = language_model.start(visual_prompt, IDS, MASK)[1]
    results, together = [], threading.Barrier(6)

    def read():
        together.wait()
        language_model.start(visual_prompt[:1], IDS[1:], MASK[1:], prefix=Prefix())
        results.append(language_model.start(visual_prompt, IDS, MASK)[1])

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6 and all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("make", [_opt, _llama, _llama_of_shared_heads])
def test_a_visual_prompt_read_with_the_question_is_the_one_read_before_it(visual_prompt, make):
    """To the last bit: what is said of a new picture is what is said of it when it is known."""
    language_model = language_models(make)[1]
    language_model.attends_apart = language_model.model.get_decoder().layers[0]
    one, ids, mask = visual_prompt[:1], IDS[1:], MASK[1:]
    prefix, alone = Prefix(), Prefix()
    reading, logits = language_model.start(one, ids, mask, prefix=prefix)
    language_model.start(one, ids[:, :0], mask[:, :0], prefix=alone)
    assert all(torch.equal(a, b) for a, b in zip(prefix.keys_and_values, alone.keys_and_values, strict=True))
    again, logits_again = language_model.start(one, ids, mask, prefix=alone)
    assert torch.equal(logits, logits_again)
    step = torch.tensor([7])
    assert torch.equal(language_model.step(reading, step), language_model.step(again, step))


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
def test_weights_that_had_four_bits_before_are_found_again(visual_prompt, make):
    """As in a GGUF file, and in folders that an earlier version wrote: they are not turned, and computed with eight
    bits."""
    network = quantized(make, "int8")
    for name, layer in list(network.named_modules()):
        if isinstance(layer, Int8Linear):
            weight = float_inputs(layer).weight
            again = Int4Linear(*to_int4(weight), layer.bias) if layer.in_features % 32 == 0 else layer
            network.set_submodule(name, float_inputs(again).requires_grad_(False))
        elif isinstance(layer, Int8Embedding):
            network.set_submodule(name, words_of(layer))
    expected = copy.deepcopy(network)
    quantize(network, "int4", group_size=32)
    found = [layer for layer in network.modules() if isinstance(layer, Int4Linear)]
    assert found and not any(layer.turned_block for layer in found)
    assert take_over(network)
    kind = EncoderDecoderLM if network.config.is_encoder_decoder else DecoderLM
    both = [kind(one, stop_ids=[1], pad_id=0).start(visual_prompt, IDS, MASK)[1] for one in (network, expected)]
    near(*both, 0.1)
    assert any(layer.turned_block for layer in quantized(make).modules() if isinstance(layer, Int4Linear))


def test_a_network_of_which_some_layers_are_quantised_stays():
    network = _opt().eval()
    quantize(network.model.decoder.layers[0], "int8")
    assert not take_over(network)
    assert type(network.model.decoder.layers[1].fc1) is nn.Linear


def test_nothing_is_left_where_temporary_files_go(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    language_models(_opt)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_will_be_full_says_so_before(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(UserError, match=r"too little space.*TMPDIR"):
        language_models(_opt)


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


def test_what_was_read_goes_when_nobody_has_it(visual_prompt):
    """Its buffers too, that LiteRT was shown; and those that rows had before they changed places."""
    language_model = language_models(_opt)[1]
    reading, _ = language_model.start(visual_prompt[:1], IDS[:1], MASK[:1])
    language_model.step(reading, torch.tensor([4]))
    layer = reading.cache.layers[0]
    before = weakref.ref(layer.reserve(1))
    language_model.step(reading, torch.tensor([5]))
    assert layer.reserve(1) is before()
    reading.select(torch.tensor([0]))
    after = weakref.ref(layer.reserve(1))
    language_model.step(reading, torch.tensor([6]))
    assert before() is None and after() is not None
    del reading, layer
    gc.collect()
    assert after() is None


@pytest.mark.parametrize("make", [_opt, _llama, _t5])
def test_what_is_laid_out_goes_with_the_network(make):
    """At once, and not when Python next looks for cycles: it is gigabytes, on disk too."""
    language_model = language_models(make)[1]
    runtime = weakref.ref(next(part.runtime for part in language_model.model.modules() if hasattr(part, "runtime")))
    gc.collect()
    gc.disable()
    try:
        del language_model
        assert runtime() is None
    finally:
        gc.enable()
