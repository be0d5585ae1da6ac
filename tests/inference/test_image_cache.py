"""The second question about a picture: nothing is computed twice, and nothing is answered differently."""

import pytest
import torch
from parity.hf_checkpoints import PROMPTS, forgetful, made_on_first_use, pictures

import blip2
from blip2.inference.image_cache import ImageCache, digest, digests, multilinear, secrets

SPEAKING = ("blip2-opt", "blip2-t5", "instructblip-llama", "instructblip-t5")
WAYS = ({}, {"num_beams": 4}, {"max_new_tokens": 5}, {"repetition_penalty": 1.5})


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """Kind -> a checkpoint of Hugging Face's."""
    return made_on_first_use(tmp_path_factory)


def count_rows(module):
    """A list that grows by the number of rows of every input `module` is given."""
    seen = []
    module.register_forward_hook(
        lambda _, args, kwargs, __: seen.append(len([*args, *kwargs.values()][0])), with_kwargs=True
    )
    return seen


def test_the_least_recently_used_goes_when_the_bound_is_reached():
    cache = ImageCache(max_bytes=100)
    a, b, c = (torch.zeros(10) + i for i in range(3))  # 40 bytes each
    cache.put("a", [a])
    cache.put("b", [b])
    assert torch.equal(cache.get("a")[0], a)  # now b is the older
    cache.put("c", [c])
    assert cache.get("b") is None and cache.get("a") is not None and cache.get("c") is not None
    assert cache.num_bytes == 80
    cache.put("large", [torch.zeros(26)])
    assert cache.get("large") is None and cache.num_bytes == 80
    cache.clear()
    assert len(cache) == 0 and cache.num_bytes == 0 and cache.get("a") is None


def test_of_small_ones_the_number_is_bounded():
    cache = ImageCache(max_entries=3)
    for number in range(10):
        cache.put(number, [torch.zeros(10)])
    assert [number for number in range(10) if cache.get(number)] == [7, 8, 9] and cache.num_bytes == 120


def test_a_digest_tells_contents_apart_and_nothing_else():
    a = torch.arange(12.0).reshape(3, 4)
    assert digest(a) == digest(a.t().contiguous().t())
    assert digest(a) != digest(a + 1e-6) and digest(a.bfloat16()) != digest(a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_a_copy(dtype):
    cache = ImageCache()
    given = torch.randn(20, 40).to(dtype)[:, ::2]
    expected = given.clone()
    cache.put("a", [given])
    given.zero_()
    (kept,) = cache.get("a")
    assert torch.equal(kept, expected) and kept.dtype == dtype and cache.num_bytes == kept.nbytes
    assert kept.untyped_storage().nbytes() == kept.nbytes  # and keeps no larger tensor alive


def test_each_row_has_the_digest_of_its_contents():
    rows = torch.randn(3, 4, 5)
    assert digests(rows) == [digest(row) for row in rows]


def test_what_a_gpu_hashes_by_is_the_multilinear_sum():
    rows = torch.randn(2, 3, 3)
    found = multilinear(rows)
    secret = secrets(10, rows.device).tolist()
    for row, hashed in zip(rows.flatten(1).view(torch.int32).tolist(), found.tolist(), strict=True):
        for numbers, one in zip(secret, hashed, strict=True):
            total = (numbers[0] + sum(a * b for a, b in zip(row, numbers[1:], strict=True))) % 2**64
            assert one % 2**32 == total >> 32
    assert found.dtype == torch.int32


def test_what_a_gpu_hashes_tells_single_bits_apart():
    for values in (torch.randn(1, 33), torch.randn(1, 33).bfloat16()):  # also rows of an odd number of bytes each
        raw = values.view(torch.int16)
        seen = {tuple(multilinear(raw)[0].tolist())}
        for place in range(raw.shape[1]):
            for bit in (0, 7, 15):
                other = raw.clone()
                other[0, place] ^= torch.tensor(1 << bit).to(torch.int16)
                seen.add(tuple(multilinear(other)[0].tolist()))
        assert len(seen) == 1 + 3 * raw.shape[1]
        assert torch.equal(multilinear(values), multilinear(values.clone()))


@pytest.mark.parametrize("kind", SPEAKING)
def test_later_questions_are_answered_as_first_ones(peers, kind):
    fresh, warm = forgetful(blip2.load(peers(kind).folder)), blip2.load(peers(kind).folder)
    differing = set()
    for image in pictures(2):
        for prompt, options in zip(PROMPTS, WAYS, strict=True):
            expected = fresh.generate([image], prompt, **options)
            assert warm.generate([image], prompt, **options) == expected
            differing.add(expected[0])
        assert "".join(warm.stream(image, PROMPTS[1])) == "".join(fresh.stream(image, PROMPTS[1]))
    assert len(differing) > 4 and len(fresh.image_cache) == len(fresh.generator.image_cache) == 0


@pytest.mark.parametrize("kind", SPEAKING)
def test_the_picture_goes_through_each_part_once(peers, kind, monkeypatch):
    model, image = blip2.load(peers(kind).folder), pictures(1)[0]
    generator = model.generator
    looks, queries = count_rows(model.vision_model), count_rows(generator.model.language_projection)
    decoder = generator.language_model.model.get_decoder()
    lengths = []

    def note_length(_, __, kwargs, ___):
        if kwargs.get("inputs_embeds") is not None:
            lengths.append(kwargs["inputs_embeds"].shape[1])

    decoder.register_forward_hook(note_length, with_kwargs=True)
    if (prompts := generator.language_model.prompts) is not None:  # reads in the decoder's place
        read = prompts.logits
        monkeypatch.setattr(prompts, "logits", lambda x, cache: (lengths.append(x.shape[1]), read(x, cache))[1])
    first = model.generate([image], "a photo of", "a")
    model.generate([image], "a photo of:", "a")
    assert looks == [1] and queries == [1]
    if not generator.language_model.is_encoder_decoder:
        assert lengths[0] > generator.model.config.num_query_tokens
        assert lengths[1] == lengths[0] + 1 - generator.model.config.num_query_tokens  # one letter more, no picture
    assert model.generate([image], "a photo of", "a") == first


def test_a_picture_is_known_by_what_it_shows(peers, tmp_path):
    model = blip2.load(peers("blip2-opt").folder)
    looks = count_rows(model.vision_model)
    one, other = pictures(2)
    one.save(tmp_path / "a.png")
    one.save(tmp_path / "b.png")
    before = model.image_features(tmp_path / "a.png")
    assert torch.equal(model.image_features(tmp_path / "b.png"), before) and looks == [1]
    other.save(tmp_path / "a.png")
    assert not torch.equal(model.image_features(tmp_path / "a.png"), before) and looks == [1, 1]


def test_a_picture_that_is_twice_in_a_list_is_computed_once(peers):
    model = blip2.load(peers("blip2-opt").folder)
    looks = count_rows(model.vision_model)
    one, two, three = pictures(3)
    features = model.image_features([two, one, two, three, one])
    assert looks == [3]
    alone = blip2.load(peers("blip2-opt").folder)
    expected = torch.cat([alone.image_features(image) for image in (two, one, two, three, one)])
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
