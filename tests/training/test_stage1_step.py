"""A stage-1 step shares passes and projections; these tests state what it must equal."""

import copy
import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from blip2.inference.stage1_losses import Stage1Batch
from blip2.model import qformer
from blip2.model.config import QFormerConfig
from blip2.model.masks import apart_mask, text_after_queries_mask, together_mask
from blip2.model.recomputed import draw_kept
from blip2.model.stage1 import Blip2Stage1, Text
from blip2.objectives.itc import image_text_similarity, sentence_losses
from blip2.objectives.negatives import draw_negatives
from blip2.training.stage1 import Sentences, Stage1Step

CONFIG = QFormerConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
    encoder_hidden_size=24, num_query_tokens=5, max_position_embeddings=16, embed_dim=16,
).without_dropout()  # fmt: skip
DEC = 49
TOLERANCE = 2e-5  # float32 sums in another order; worst seen 2e-6


@pytest.fixture
def model() -> Blip2Stage1:
    torch.manual_seed(0)
    model = Blip2Stage1(None, CONFIG)
    for parameter in model.parameters():  # BERT's start is so small that wrong masks would hardly show
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture
def batch() -> Stage1Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 49, (6, 7), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate((7, 5, 3, 7, 4, 6)):
        ids[row, length:], mask[row, length:] = 0, 0
    return Stage1Batch(torch.randn(6, 9, 24, generator=generator), Text(ids, mask), torch.arange(6))


def attend_plainly(query, key, value, chosen, mask, dropout):
    """By the formula, the weights dropped that the model's own attention would draw at this moment."""
    rows = slice(None) if chosen is None else chosen
    scores = query @ key[rows].transpose(-2, -1) / query.shape[-1] ** 0.5
    is_kept, scale = draw_kept(scores.shape, dropout)
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(dim=-1) * is_kept * scale) @ value[rows]


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.02)])
def test_a_step_with_dropout_of_attention_has_the_gradients_of_the_plain_formulas(
    batch, monkeypatch, precision, tolerance
):
    torch.manual_seed(0)
    model = Blip2Stage1(None, dataclasses.replace(CONFIG, attention_probs_dropout_prob=0.3))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    batch = dataclasses.replace(batch, chance=torch.rand(6, 2))

    def gradients():
        model.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = Stage1Step(model, bos_id=DEC).train()(batch)["loss"]
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    ours = gradients()
    monkeypatch.setattr(qformer, "attend_again", attend_plainly)
    monkeypatch.setattr(qformer, "gelu_linear", lambda wide, linear: linear(F.gelu(wide)))
    plain = gradients()
    assert ours.keys() == plain.keys() and len(ours) > 100
    for name, gradient in plain.items():
        if not name.endswith("key.bias"):  # it has no gradient but rounding's
            assert (ours[name] - gradient).norm() < tolerance * gradient.norm(), name


def plain_pass(model: Blip2Stage1, features: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> tuple:
    """Queries and text through all layers as one sequence, image projected anew, under a mask drawn in masks.py."""
    normed = model.vision_layernorm(features)
    layers = enumerate(model.qformer.encoder.layer)
    image = {i: layer.crossattention.project(normed) for i, layer in layers if hasattr(layer, "crossattention")}
    queries = model.query_tokens.expand(len(features), -1, -1)
    output = model.qformer(queries=queries, text=model.embeddings(ids), image=image, mask=mask)
    return output.queries, output.text


def plain_losses(model: Blip2Stage1, batch: Stage1Batch) -> dict[str, torch.Tensor]:
    """The three losses, each from full passes of its own (paper, figure 2), hardest negatives."""
    ids, real, features = batch.text.input_ids, batch.text.attention_mask, batch.image_features
    num_queries = CONFIG.num_query_tokens
    queries, text = plain_pass(model, features, ids, apart_mask(num_queries, real))
    image_embeds = F.normalize(model.vision_projection(queries), dim=-1)
    text_embeds = F.normalize(model.text_projection(text[:, 0]), dim=-1)
    similarity = image_text_similarity(image_embeds, text_embeds) / model.temperature
    own = torch.arange(len(ids))
    itc = (
        F.cross_entropy(similarity, own, label_smoothing=0.1) + F.cross_entropy(similarity.T, own, label_smoothing=0.1)
    ) / 2
    logits, labels = [], []
    eye = torch.eye(len(ids), dtype=torch.bool)
    hard_image = similarity.T.masked_fill(eye, -math.inf).argmax(dim=1)
    hard_text = similarity.masked_fill(eye, -math.inf).argmax(dim=1)
    for images, texts, label in ((own, own, 1), (hard_image, own, 0), (own, hard_text, 0)):
        joint, _ = plain_pass(model, features[images], ids[texts], together_mask(num_queries, real[texts]))
        logits.append(model.itm_head(joint).mean(dim=1))
        labels.append(torch.full_like(own, label))
    itm = F.cross_entropy(torch.cat(logits), torch.cat(labels))
    decoder_ids = ids.clone()
    decoder_ids[:, 0] = DEC
    _, told = plain_pass(model, features, decoder_ids, text_after_queries_mask(num_queries, real))
    targets = ids[:, 1:].masked_fill(real[:, 1:] == 0, -100)
    vocabulary = model.vocabulary_logits(told[:, :-1]).transpose(1, 2)
    itg = F.cross_entropy(vocabulary, targets, label_smoothing=0.1)
    return {"itc": itc, "itm": itm, "itg": itg}


@pytest.mark.parametrize("loss", ["itc", "itm", "itg"])
def test_shared_passes_give_the_losses_of_three_full_passes(model: Blip2Stage1, batch: Stage1Batch, loss: str) -> None:
    shared = Stage1Step(model, bos_id=DEC, negatives="hardest")(batch)
    torch.testing.assert_close(shared[loss], plain_losses(model, batch)[loss], atol=TOLERANCE, rtol=0)


def test_shared_passes_give_the_gradients_of_three_full_passes(model: Blip2Stage1, batch: Stage1Batch) -> None:
    Stage1Step(model, bos_id=DEC, negatives="hardest")(batch)["loss"].backward()
    shared = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    sum(plain_losses(model, batch).values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(shared[name], parameter.grad, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: n + m)


def test_padding_changes_nothing(model: Blip2Stage1, batch: Stage1Batch) -> None:
    text = batch.text
    longer = Text(F.pad(text.input_ids, (0, 4)), F.pad(text.attention_mask, (0, 4)))
    step = Stage1Step(model, bos_id=DEC, negatives="hardest")
    short, long = step(batch), step(Stage1Batch(batch.image_features, longer, batch.groups))
    for name in ("itc", "itm", "itg"):
        torch.testing.assert_close(short[name], long[name], atol=TOLERANCE, rtol=0)


def test_an_image_of_any_number_of_tokens_gives_the_same_number_of_outputs(model: Blip2Stage1) -> None:
    for num_tokens in (1, 9, 257):
        assert model.image_pass(torch.randn(2, num_tokens, 24)).output.shape == (2, 5, 32)


def test_untrained_embeddings_that_say_nothing_cost_log_b(batch: Stage1Batch) -> None:
    model = Blip2Stage1(None, CONFIG).eval()
    torch.nn.init.zeros_(model.vision_projection.weight)  # every image has one and the same embedding
    step = Stage1Step(model, bos_id=DEC, label_smoothing=0.0)
    text_side_is_even = step(batch)["itc"]
    embeds = model.embed_images(batch.image_features)
    assert torch.allclose(embeds[0], embeds[1])
    image_side = F.cross_entropy(
        image_text_similarity(embeds, model.embed_texts(batch.text)) / model.temperature, torch.arange(6)
    )
    assert (2 * text_side_is_even - image_side).item() == pytest.approx(math.log(6), abs=1e-5)


def test_equal_captions_are_no_negatives_of_each_other() -> None:
    is_positive = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    similarity = torch.tensor([[9.0, 9.0, -9.0], [9.0, 9.0, -9.0], [9.0, 9.0, 9.0]])
    for rule in ("paper", "lavis-2023-02", "hardest"):
        for _ in range(20):
            drawn = draw_negatives(similarity, is_positive, rule)
            assert drawn[0] == drawn[1] == 2
            assert drawn[2] in (0, 1)


def test_features_equal_to_the_sentences_cost_nothing_and_opposite_ones_4() -> None:
    sentences = F.normalize(torch.randn(3, 8), dim=-1)
    images = F.normalize(torch.randn(3, 5, 8), dim=-1)
    images[:, 2] = sentences  # one query is enough
    assert torch.stack(sentence_losses(images, sentences, sentences)).tolist() == pytest.approx([0, 0], abs=1e-6)
    opposite = -sentences[:, None].expand(-1, 5, -1)
    assert torch.stack(sentence_losses(opposite, -sentences, sentences)).tolist() == pytest.approx([2, 2], abs=1e-6)


def test_the_sentence_model_is_left_as_it_was(model: Blip2Stage1, batch: Stage1Batch) -> None:
    frozen = copy.deepcopy(model).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    step = Stage1Step(model, bos_id=DEC, sentences=Sentences(frozen, 2.0, 5.0))
    losses = step(batch)
    plain = Stage1Step(model, bos_id=DEC)(batch)
    torch.testing.assert_close(losses["itc"], plain["itc"])
    image_side, text_side = losses["sentence_image"], losses["sentence_text"]
    assert 0 < image_side < 2
    expected = losses["itc"] + losses["itm"] + losses["itg"] + 2 * image_side + 5 * text_side
    torch.testing.assert_close(losses["loss"], expected)
    losses["loss"].backward()
    assert all(parameter.grad is None for parameter in frozen.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in frozen.state_dict().items())


def test_a_batch_of_one_has_no_negatives_and_still_learns(model: Blip2Stage1, batch: Stage1Batch) -> None:
    one = Stage1Batch(batch.image_features[:1], batch.text[torch.tensor([0])], batch.groups[:1])
    losses = Stage1Step(model, bos_id=DEC)(one)
    losses["loss"].backward()
    assert all(torch.isfinite(value) for value in losses.values())


def test_hard_negatives_are_drawn_by_their_softmax() -> None:
    torch.manual_seed(0)
    similarity = torch.tensor([0.0, 1.0, 2.0, 3.0]).repeat(20_000, 1)
    is_positive = torch.zeros_like(similarity, dtype=torch.bool)
    is_positive[:, 0] = True
    drawn = draw_negatives(similarity, is_positive)
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    expected = torch.tensor([-math.inf, 1.0, 2.0, 3.0]).softmax(dim=0)
    torch.testing.assert_close(shares, expected, atol=0.015, rtol=0)  # four standard errors


def test_16_pairs_are_memorised_by_all_three_objectives() -> None:
    torch.manual_seed(0)
    model = Blip2Stage1(None, CONFIG)
    for parameter in model.parameters():  # from BERT's narrow start so small a model learns to match late
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    ids = torch.cat([torch.full((16, 1), 1), torch.randint(4, 48, (16, 4)), torch.full((16, 1), 2)], dim=1)
    batch = Stage1Batch(torch.randn(16, 4, 24), Text(ids, torch.ones_like(ids)), torch.arange(16))
    step = Stage1Step(model, bos_id=DEC, label_smoothing=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(150):
        losses = step(batch)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    assert losses["itc_accuracy"] == 1
    assert losses["itm_accuracy"] > 0.95
    assert losses["itg"] < 0.5


def test_the_sentence_encoder_never_drops_out(batch: Stage1Batch) -> None:
    model = Blip2Stage1(None, dataclasses.replace(CONFIG, hidden_dropout_prob=0.5, embed_dim=32))
    step = Stage1Step(model, bos_id=DEC, sentences=Sentences(copy.deepcopy(model), 1.0, 1.0)).train()
    assert step.sentence_model is not None and model.training
    first, second = (step.sentence_model.embed_texts(batch.text) for _ in range(2))
    assert torch.equal(first, second)


def test_the_temperature_sinks_to_its_floor_and_no_further(model: Blip2Stage1, batch: Stage1Batch) -> None:
    with torch.no_grad():
        model.temperature.fill_(0.02)
    step = Stage1Step(model, bos_id=DEC, min_temperature=0.03)
    step.eval()(batch)
    assert model.temperature.item() == pytest.approx(0.02)  # looking changes nothing
    losses = step.train()(batch)
    assert losses["temperature"].item() == model.temperature.item() == pytest.approx(0.03)
    losses["loss"].backward()
    assert model.temperature.grad is not None and model.temperature.grad != 0


def test_pooled_queries_stand_for_an_image_as_one_unit_vector(model: Blip2Stage1, batch: Stage1Batch) -> None:
    each = model.embed_images(batch.image_features)  # (B, Q, E)
    model.config = dataclasses.replace(CONFIG, query_pooling="mean")
    pooled = model.embed_images(batch.image_features)
    assert pooled.shape == (each.shape[0], 1, each.shape[2])
    torch.testing.assert_close(pooled, F.normalize(each.mean(dim=1, keepdim=True), dim=-1))
    text_embeds = model.embed_texts(batch.text)
    expected = torch.einsum("bqe,ce->bc", each, text_embeds) / each.sum(dim=1).norm(dim=-1, keepdim=True)
    torch.testing.assert_close(image_text_similarity(pooled, text_embeds), expected)
    assert all(torch.isfinite(value) for value in Stage1Step(model, bos_id=DEC)(batch).values())


def test_queries_side_by_side_each_have_a_projection_of_their_own(batch: Stage1Batch) -> None:
    torch.manual_seed(0)
    model = Blip2Stage1(None, dataclasses.replace(CONFIG, query_pooling="concat")).eval()
    output = model.image_pass(batch.image_features).output  # (B, Q, D)
    parts = model.vision_projection.weight.view(CONFIG.embed_dim, CONFIG.num_query_tokens, CONFIG.hidden_size)
    expected = F.normalize(torch.einsum("bqd,eqd->be", output, parts) + model.vision_projection.bias, dim=-1)
    torch.testing.assert_close(model.embed_images(batch.image_features)[:, 0], expected)
    assert all(torch.isfinite(value) for value in Stage1Step(model, bos_id=DEC)(batch).values())
