"""An encoder-decoder language model behind the same methods: the visual prompt goes to its encoder."""

import pytest
import torch

import blip2
from blip2.model.language import EncoderDecoderLM

from .tiny_model import make_tiny_model

ANSWERS = ["red", "a blue cup", "two"]


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return blip2.load(make_tiny_model(tmp_path_factory.mktemp("t5"), decoder_only=False).model)


def test_a_row_does_not_depend_on_its_batch(t5, images):
    assert isinstance(t5.generator.language_model, EncoderDecoderLM)
    questions = ["what is this ?", "which colour is the red cup left of the star ?", "how many", "a cat ?", "which cup"]
    together = t5.ask(images, questions, max_new_tokens=12)
    assert together == [t5.ask(*row, max_new_tokens=12) for row in zip(images, questions, strict=True)]
    assert len(set(t5.caption(images, num_beams=2))) > 1


def test_streamed_pieces_join_to_the_whole(t5, images):
    assert "".join(t5.stream(images[0], max_new_tokens=20)) == t5.caption(images[0], max_new_tokens=20)


def test_scores_are_the_log_probabilities_of_the_whole_answers(t5, images):
    (ranking,) = t5.rank_answers(images[:1], "what is this ?", ANSWERS)
    generator = t5.generator
    visual_prompt = generator.visual_prompt(t5.image_features(images[0]), ["what is this ?"])
    prompt = generator.tokenizer.encode_prompts(["Question: what is this ? Answer:"]).input_ids
    network = generator.language_model.model
    embeds = torch.cat([visual_prompt, network.get_input_embeddings()(prompt)], dim=1)
    for row in ranking:
        target = generator.tokenizer.encode_targets([row.text]).input_ids
        with torch.no_grad():
            logits = network(inputs_embeds=embeds, labels=target).logits
        expected = logits[0].log_softmax(dim=-1).gather(1, target[0][:, None]).sum()
        # sums of float32 logits near -1,200: 1e-3 apart on a CPU whose kernels add in another order
        assert row.log_probability == pytest.approx(float(expected), rel=2e-6)
