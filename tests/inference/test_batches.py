"""A request's answer does not depend on what else is in its batch: 500 requests alone and mixed, 1 to 32 at once."""

import random

import pytest
from parity.hf_checkpoints import WORDS, forgetful, made_on_first_use, pictures

import blip2

NUM_REQUESTS, NUM_PICTURES = 500, 40


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """Kind -> a checkpoint of Hugging Face's."""
    return made_on_first_use(tmp_path_factory)


@pytest.mark.parametrize("kind", ["blip2-opt", "instructblip-t5"])
def test_500_requests_get_the_same_words_alone_and_in_batches(peers, kind):
    chance, images = random.Random(0), pictures(NUM_PICTURES)
    words = WORDS.split()
    requests = [
        (images[chance.randrange(NUM_PICTURES)], " ".join(chance.choices(words, k=chance.randint(1, 12))))
        for _ in range(NUM_REQUESTS)
    ]
    alone, mixed = blip2.load(peers(kind).folder), forgetful(blip2.load(peers(kind).folder))
    expected = [alone.generate([image], prompt, max_new_tokens=8)[0] for image, prompt in requests]
    found, rest = [], list(requests)
    while rest:
        size = chance.randint(1, 32)
        mixed.batch_size = size
        some, rest = rest[:size], rest[size:]
        found += mixed.generate([image for image, _ in some], [prompt for _, prompt in some], max_new_tokens=8)
    assert found == expected
    assert len(set(expected)) > 100  # they see, and read
