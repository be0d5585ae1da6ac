"""Where the Q-Former looked: its own attention, beside a pass that is written out, and what words came from."""

import numpy as np
import pytest
import torch
from PIL import Image

from blip2.inference.attention_maps import AttentionMaps, WordSource, attention_maps, draw, word_sources

QUESTION = "which colour is the cup ?"


def test_maps_are_the_cross_attentions_probabilities(model, images):
    features = model.image_features(images[0])
    maps = attention_maps(model, features, QUESTION)
    generator = model.generator
    assert maps.shape == (generator.model.config.num_query_tokens, 4, 4)
    assert torch.allclose(maps.sum(dim=(1, 2)), torch.ones(len(maps)))
    seen = {}
    module = next(m for name, m in generator.model.qformer.named_modules() if name.endswith("crossattention"))
    hook = module.register_forward_hook(lambda _, inputs, output: seen.update(inputs=inputs, output=output))
    generator.compute_visual_prompt(features, [QUESTION])
    hook.remove()
    hidden, keys, _ = seen["inputs"]
    heads, width = module.num_heads, hidden.shape[-1] // module.num_heads
    query = module.attention.query(hidden)[0].reshape(-1, heads, width)
    weights = torch.stack([(query[:, h] @ keys.key[0, h].T / width**0.5).softmax(-1) for h in range(heads)])
    context = torch.cat([weights[h] @ keys.value[0, h] for h in range(heads)], dim=-1)
    assert torch.allclose(module.output(context, hidden[0]), seen["output"][0], atol=1e-5)  # they are what it used
    expected = weights.mean(dim=0)[:, 1:]  # without [CLS]
    assert torch.allclose(maps.flatten(1), expected / expected.sum(dim=1, keepdim=True), atol=1e-6)


def test_looking_changes_nothing(model, images):
    before = model.ask(images[0], QUESTION)
    attention_maps(model, model.image_features(images[0]), QUESTION)
    assert model.ask(images[0], QUESTION) == before
    assert not any(module._forward_pre_hooks for module in model.generator.model.qformer.modules())


def test_words_make_up_the_answer_and_their_shares_sum_to_one(model, images):
    features = model.image_features(images[0])
    prompt = "Question: which colour ? Answer:"
    words = word_sources(model.generator, features, prompt, QUESTION, " the red cup ")
    assert [word.text for word in words] == ["the", " red", " cup"]
    assert all(word.weights.sum() == pytest.approx(1) and word.weights.min() >= 0 for word in words)
    assert word_sources(model.generator, features, prompt, QUESTION, "  ") == []


def test_a_words_share_is_what_its_probability_loses_without_a_query(model, images):
    features = model.image_features(images[0])
    generator, prompt = model.generator, "Question: which colour ? Answer:"
    (word,) = word_sources(generator, features, prompt, QUESTION, "red")
    visual = generator.visual_prompt(features, [QUESTION])
    prompts = generator.tokenizer.encode_prompts([prompt])
    target = generator.tokenizer.encode_targets(["red"], append_eos=False)
    texts = (prompts.input_ids, prompts.attention_mask, target.input_ids, target.attention_mask)
    whole = generator.language_model.token_losses(visual, *texts).sum()
    falls = []
    for query in range(visual.shape[1]):
        without = visual.clone()
        without[:, query] = visual.mean(dim=1)
        falls.append((generator.language_model.token_losses(without, *texts).sum() - whole).clamp(min=0))
    expected = torch.stack(falls)
    assert torch.allclose(word.weights, expected / expected.sum(), atol=1e-4)


def test_a_drawing_is_brightest_where_it_was_looked_at():
    weights = torch.zeros(2, 2)
    weights[0, 1] = 1.0
    drawn = np.asarray(draw(Image.new("RGB", (40, 20), "grey"), weights)).astype(int).sum(axis=2)  # (H, W)
    assert drawn.shape == (20, 40)
    assert drawn[3, 36] > drawn[3, 4] and drawn[3, 36] > drawn[16, 36]


def test_a_words_map_is_the_queries_weighted():
    queries = torch.rand(3, 2, 2)
    weights = torch.tensor([0.5, 0.25, 0.25])
    maps = AttentionMaps(queries, [WordSource("cup", weights)])
    assert torch.allclose(maps.of_word(0), (queries * weights[:, None, None]).sum(dim=0))
    assert torch.allclose(maps.average, queries.mean(dim=0))
