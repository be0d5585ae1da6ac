"""The four-bit copy that guesses ahead: it guesses well, texts are the same with it, and it may be left out."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import blip2
from blip2.inference import loading
from blip2.inference.engine import Engine
from blip2.model import drafting
from blip2.model.drafting import Drafter
from blip2.model.language import DecoderLM
from blip2.model.low_bit_products import has_onednn
from blip2.model.packed import pack
from blip2.model.quantized import quantize
from blip2.model.writing import Decoding, write

from .tiny_model import make_tiny_model

VOCABULARY, WIDTH = 75, 64
STOP = [1]


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """The copy is made at the first word."""
    monkeypatch.setattr(drafting, "WORTH_MAKING", 0)


def make_llama(**shape):
    """A Llama whose weights are exact in four bits, so that its copy differs by the rounding of bfloat16 alone."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        **shape,
    )
    network = LlamaForCausalLM(config).eval().requires_grad_(False)
    for layer in network.modules():
        if isinstance(layer, torch.nn.Linear):
            groups = torch.randint(0, 16, (layer.out_features, layer.in_features // 32, 32))
            groups[..., 0], groups[..., 1] = 0, 15  # the ends of the range are there
            layer.weight.copy_((groups.flatten(1) - 8) / 32)
        elif "Norm" in type(layer).__name__:
            layer.weight.copy_(1 + torch.rand(WIDTH))
    return network


def start(language_model, length=3):
    torch.manual_seed(2)
    ids = torch.randint(2, VOCABULARY, (1, length))
    return language_model.start(torch.randn(1, 5, WIDTH), ids, torch.ones_like(ids))


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("theta", [100.0, 10_000.0])
def test_the_copy_says_what_the_llama_says(is_packed, theta):
    network = make_llama(rope_theta=theta)
    if is_packed:
        assert pack(network) == (15 if has_onednn() else 0)
    language_model = DecoderLM(network, stop_ids=STOP, pad_id=0)
    assert Drafter.can_take(network)
    decoding = Decoding(max_new_tokens=40, min_new_tokens=40)
    text = write(language_model, *start(language_model), decoding)[0].tolist()
    assert len(set(text)) > 5
    passes = []
    network.register_forward_hook(lambda *_: passes.append(1))
    language_model.drafter = Drafter(network)
    assert write(language_model, *start(language_model), decoding)[0].tolist() == text
    # one for the prompt, and for nine tokens each where every guess is right; bfloat16 may cost a few
    assert 1 + 5 <= len(passes) <= 12


def test_the_copy_stops_where_it_should_and_not_before():
    network = make_llama()
    language_model = DecoderLM(network, stop_ids=STOP, pad_id=0)
    reading, logits = start(language_model)
    before = [layer.keys.clone() for layer in reading.cache.layers]
    token_id = int(logits.argmax())
    drafter = Drafter(network)
    free = drafter.draft(reading, token_id, most=6, stop_ids=[], num_without_stop=0)
    assert len(free) == 6
    stops = [free[2]]
    assert (
        drafter.draft(reading, token_id, most=6, stop_ids=stops, num_without_stop=0) == free[: free.index(stops[0]) + 1]
    )
    kept_on = drafter.draft(reading, token_id, most=6, stop_ids=stops, num_without_stop=4)
    assert stops[0] not in kept_on[:4] and kept_on[:2] == free[:2] and len(kept_on) >= 5
    assert len(drafter.draft(reading, token_id, most=100, stop_ids=[], num_without_stop=0)) == drafting.LONGEST
    assert all(layer.keys.equal(keys) for layer, keys in zip(reading.cache.layers, before, strict=True))


def test_padding_on_the_left_does_not_change_the_guesses():
    network = make_llama()
    language_model = DecoderLM(network, stop_ids=STOP, pad_id=0)
    torch.manual_seed(2)
    visual, ids = torch.randn(1, 5, WIDTH), torch.randint(2, VOCABULARY, (1, 2))
    alone, _ = language_model.start(visual, ids, torch.ones_like(ids))
    padded, _ = language_model.start(
        visual, torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1), torch.tensor([[0, 0, 0, 0, 1, 1]])
    )
    drafter = Drafter(network)
    wanted = {"most": 8, "stop_ids": STOP, "num_without_stop": 8}
    assert drafter.draft(padded, 7, **wanted) == drafter.draft(alone, 7, **wanted)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """One model twice: with guesses, and without."""
    folder = make_tiny_model(tmp_path_factory.mktemp("drafts")).model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "MOST_FLOATS", 0)  # none is left to LiteRT
        models = blip2.load(folder), blip2.load(folder, drafts=False)
        assert all(model.generator for model in models)  # parts are made when they are asked for
    return models


def test_a_model_says_the_same_with_guesses_as_without(both, images):
    guessing, plain = both
    assert guessing.generator.language_model.drafter and plain.generator.language_model.drafter is None
    for options in ({}, {"max_new_tokens": 1}, {"max_new_tokens": 2}, {"min_new_tokens": 20}, {"max_new_tokens": 90}):
        for image in images:
            assert guessing.caption(image, best_of=1, **options) == plain.caption(image, best_of=1, **options)
            assert guessing.ask(image, "what is this ?", **options) == plain.ask(image, "what is this ?", **options)
        assert guessing.caption(images, best_of=1, **options) == plain.caption(images, best_of=1, **options)
    assert guessing.generator.language_model.drafter._copy is not None
    assert guessing.caption(images, num_beams=3) == plain.caption(images, num_beams=3)


def test_streams_and_engines_say_the_same_with_guesses(both, images):
    guessing, plain = both
    expected = [plain.caption(image, best_of=1, max_new_tokens=25) for image in images]
    assert ["".join(guessing.stream(image, max_new_tokens=25)) for image in images] == expected
    prompts = guessing.settings.prompts
    with Engine(guessing) as engine:
        decoding = Decoding(max_new_tokens=25)
        for image, text in zip(images, expected, strict=True):
            reply = engine.submit(image, prompts.caption, prompts.caption_instruction, decoding=decoding)
            assert reply.text() == text
            assert reply.num_tokens <= 25


def test_the_copy_is_made_only_when_it_has_become_worth_it(both, images, monkeypatch):
    guessing, _ = both
    language_model = guessing.generator.language_model
    monkeypatch.setattr(language_model, "drafter", Drafter(language_model.model))
    monkeypatch.setattr(drafting, "WORTH_MAKING", 10)
    guessing.caption(images[0], best_of=1, max_new_tokens=9, min_new_tokens=9)
    assert language_model.drafter._copy is None
    guessing.caption(images[0], best_of=1, max_new_tokens=9, min_new_tokens=9)
    assert language_model.drafter._copy is not None


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (lambda network: None, True),
        (lambda network: network.bfloat16(), False),
        (lambda network: quantize(network, "int8"), False),
        (
            lambda network: setattr(
                network.model.layers[0].mlp.down_proj, "bias", torch.nn.Parameter(torch.ones(WIDTH))
            ),
            False,
        ),
        (lambda network: setattr(network.config, "hidden_act", "gelu"), False),
    ],
)
def test_only_a_float32_llama_is_copied(how, expected):
    network = make_llama()
    how(network)
    assert Drafter.can_take(network) == expected


def test_an_llm_too_large_for_a_copy_beside_it_is_not_copied(monkeypatch):
    network = make_llama()
    monkeypatch.setattr(drafting, "MOST_BYTES", 1000)
    assert not Drafter.can_take(network)
