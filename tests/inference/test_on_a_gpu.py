"""On a GPU, where passes are recorded and replayed, a model says what it says on a CPU."""

import pytest
import torch
from parity.hf_checkpoints import PROMPTS, made_on_first_use, pictures

import blip2
from blip2.inference.engine import Engine
from blip2.model.recorded import SEEN_BEFORE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SPEAKING = ("blip2-opt", "blip2-t5", "instructblip-llama", "instructblip-t5")
TIMES = SEEN_BEFORE + 2  # the last ones are replays


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """Kind -> a checkpoint of Hugging Face's."""
    return made_on_first_use(tmp_path_factory)


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """Not in TensorFloat-32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}, {"repetition_penalty": 1.5}, {"min_new_tokens": 9}])
@pytest.mark.parametrize("kind", SPEAKING)
def test_replayed_passes_say_what_a_cpu_says(peers, kind, options):
    here, there = blip2.load(peers(kind).folder), blip2.load(peers(kind).folder, "cuda")
    images = pictures(3 * TIMES)
    for number in range(TIMES):
        for prompt in PROMPTS[:2]:
            alone = images[number : number + 1]
            assert there.generate(alone, prompt, **options) == here.generate(alone, prompt, **options)
            some = images[3 * number : 3 * number + 3]
            assert there.generate(some, prompt, **options) == here.generate(some, prompt, **options)
    assert there.vision_model._recorded._runs and there.generator._recorded._runs
    language_model = there.generator.language_model
    assert language_model._recorded._runs
    if not language_model.is_encoder_decoder:
        assert all(step._tape is not None for step in language_model.replay._steps.values())
        assert language_model.replay._row_step is not None


@pytest.mark.parametrize("kind", SPEAKING)
def test_requests_share_steps_and_say_what_they_say_alone(peers, kind):
    here, there = blip2.load(peers(kind).folder), blip2.load(peers(kind).folder, "cuda")
    images = pictures(12)
    expected = [here.generate([image], PROMPTS[i % 3])[0] for i, image in enumerate(images)]
    engine = Engine(there)
    replies = [engine.submit(image, PROMPTS[i % 3]) for i, image in enumerate(images)]
    assert [reply.text() for reply in replies] == expected
    engine.close()


@pytest.mark.parametrize("kind", ["blip2-opt", "instructblip-llama"])
@pytest.mark.parametrize("bits", [None, "int8"])
def test_in_bfloat16_most_words_are_those_of_the_plain_model(peers, kind, bits):
    there = blip2.load(peers(kind).folder, "cuda", torch.bfloat16, quantize=bits)
    plain = blip2.load(peers(kind).folder, "cuda", torch.bfloat16, quantize=bits)
    plain.generator.language_model.replay = plain.generator.language_model._recorded = None
    plain.vision_model._recorded = None
    said = [[model.generate([image], PROMPTS[0])[0] for image in pictures(20)] for model in (there, plain)]
    assert sum(one == other for one, other in zip(*said, strict=True)) >= 14


def test_pixels_are_the_same_bits_as_on_a_cpu(peers):
    transform = blip2.load(peers("blip2-opt").folder).transform
    levels = torch.arange(256, dtype=torch.uint8).repeat(3, 1).T.reshape(1, 16, 16, 3)
    assert torch.equal(transform.normalise(levels.cuda()).cpu(), transform.normalise(levels))


def test_a_picture_is_known_again_and_others_are_not(peers):
    there = blip2.load(peers("blip2-opt").folder, "cuda")
    first, second = pictures(2)
    before = there.image_features([first, second])
    kept = len(there.image_cache)
    assert torch.equal(there.image_features([first, second]), before) and len(there.image_cache) == kept == 2
    assert not torch.equal(before[0], before[1])


def test_features_of_many_pictures_are_those_of_each(peers):
    here, there = blip2.load(peers("blip2-opt").folder), blip2.load(peers("blip2-opt").folder, "cuda")
    images = pictures(40)
    torch.testing.assert_close(there.image_features(images).cpu(), here.image_features(images), rtol=1e-3, atol=1e-4)
