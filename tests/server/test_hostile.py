"""Pictures, bodies and headers that mean harm: refused with a 4xx in fixed words, at once, and everything goes on."""

import gc
import json
import os
import random
import time
from pathlib import Path

import pytest
from inference.tiny_model import make_tiny_model

import blip2
from blip2.server.settings import Limits, ServerSettings

from .hostile_client import about, picture, serving
from .hostile_pictures import (
    TURNED,
    animations,
    bombs,
    good_pictures,
    jpeg_of_scans,
    mutated,
    noise,
    saved,
    seeds,
    text_bomb,
    turned,
)

CHAT = "/v1/chat/completions"
PNG = saved(noise(), "PNG")
LIMITS = Limits(body_bytes=3_000_000, text_characters=5000)


@pytest.fixture(scope="module")
def hostile_server(tmp_path_factory):
    """A server that is open to all, with small limits."""
    model = blip2.load(make_tiny_model(tmp_path_factory.mktemp("tiny")).model)
    with serving(model, ServerSettings(limits=LIMITS)) as server:
        yield server


def memory():
    """Bytes of this process that are in memory."""
    gc.collect()
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 0


# -- pictures -----------------------------------------------------------------------------------------------------
def test_bombs_are_refused_and_leave_nothing_in_memory(hostile_server):
    hostile_server.see(PNG)
    files = bombs()  # made before anything is measured: that takes up to a hundred megabytes of its own
    before = memory()
    found = {name: hostile_server.see(data)[0] for name, data in files.items()}
    assert set(found.values()) <= {400, 415}, found
    assert memory() - before <= 50_000_000


def test_a_long_animation_costs_what_its_first_frame_costs(hostile_server):
    check_animations(hostile_server, 1000)


@pytest.mark.slow
def test_a_very_long_animation_costs_what_its_first_frame_costs(hostile_server):
    check_animations(hostile_server, 100_000)


def check_animations(server, count):
    before = memory()
    for name, data in animations(count).items():
        begin = time.process_time()
        status, _ = server.see(data) if len(data) * 4 // 3 < LIMITS.body_bytes else (400, None)
        assert status in (200, 400), name  # 200: the first frame
        assert time.process_time() - begin < 5
    assert memory() - before <= 50_000_000


def test_texts_in_a_picture_that_inflate_are_freed_with_it(hostile_server):
    before = memory()
    assert hostile_server.see(text_bomb(1_000_000, 60))[0] in (200, 400)
    assert memory() - before <= 50_000_000


def test_a_picture_that_is_decoded_over_and_over_is_refused(hostile_server):
    status, found = hostile_server.see(jpeg_of_scans(64, 64, 500))
    assert status == 400 and "scans" in found["error"]["message"]
    assert hostile_server.see(jpeg_of_scans(64, 64, 1))[0] == 200


@pytest.mark.parametrize("name", good_pictures())
def test_odd_pictures_are_read(hostile_server, name):
    status, found = hostile_server.see(good_pictures()[name])
    assert status == 200, found


@pytest.mark.parametrize("orientation", TURNED)
def test_a_turned_picture_is_the_upright_one(hostile_server, orientation):
    assert hostile_server.vector(turned(noise(), orientation)) == hostile_server.vector(turned(noise(), 1))


def test_an_exif_block_that_is_broken_does_not_spoil_the_picture(hostile_server):
    good = turned(noise(), 6)
    place = good.index(b"MM\0*") if b"MM\0*" in good else good.index(b"II*\0")
    assert hostile_server.see(good[:place] + b"\xff" * 8 + good[place + 8 :])[0] in (200, 400)


@pytest.mark.parametrize("name", seeds())
def test_pictures_cut_short_are_refused_or_read(hostile_server, name):
    data = seeds()[name]
    lengths = sorted({*range(0, 12, 3), *range(12, len(data), max(1, len(data) // 5)), len(data) - 1, len(data) - 2})
    found = [hostile_server.see(data[:length])[0] for length in lengths]
    assert set(found) <= {200, 400} and found[0] == 400


def test_three_hundred_changed_pictures_do_no_harm(hostile_server):
    check_mutations(hostile_server, 300, random.Random(0))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_hundred_thousand_changed_pictures_do_no_harm(hostile_server):
    check_mutations(hostile_server, 100_000, random.Random(1))


def check_mutations(server, count, chance):
    good = list(seeds().values())
    statuses, slowest = set(), 0.0  # seconds of the processor, whatever else the machine does; the server is a thread
    for i in range(count):
        data = mutated(good[i % len(good)], chance)
        begin = time.process_time()
        statuses.add(server.see(data)[0])
        slowest = max(slowest, time.process_time() - begin)
    assert statuses == {200, 400}
    assert slowest < 10 if count < 1000 else slowest < 2


# -- how much -----------------------------------------------------------------------------------------------------
def test_a_body_that_is_too_large_is_refused_before_it_is_read(hostile_server):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    found = hostile_server.say(f"{head}Connection: close\r\nContent-Length: 3000001\r\n\r\n".encode())
    assert found.startswith(b"HTTP/1.1 413 ")  # none of the body was sent
    piece = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    chunked = f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + piece * 60
    found = hostile_server.say(chunked + b"0\r\n\r\n", seconds=0.5)
    assert found.startswith(b"HTTP/1.1 413 ") and found.count(b"HTTP/1.1") == 1


def test_a_body_that_is_full_of_small_things_is_refused_without_being_built(hostile_server):
    before = memory()
    for opening, item, closing in ((b'{"model":"mini"', b',"%":1', b"}"), (b'{"messages":[0', b",%", b"]}")):
        body = opening + b"".join(item.replace(b"%", b"%06d" % i) for i in range(250_000)) + closing
        status, found = hostile_server.ask(body)
        assert status == 400 and "too many fields" in found["error"]["message"]
    assert memory() - before <= 50_000_000


def one_turn(**fields):
    return about(PNG) | fields


def turns(count, text="a"):
    more = [{"role": role, "content": text} for _ in range(count) for role in ("assistant", "user")]
    return one_turn(messages=[*about(PNG)["messages"], *more])


TOO_MUCH = {
    "nine pictures": one_turn(messages=[{"role": "user", "content": [picture(PNG)]}] * 9),
    "two pictures in a turn": one_turn(messages=[{"role": "user", "content": [picture(PNG)] * 2}]),
    "many parts": one_turn(messages=[{"role": "user", "content": [picture(PNG)] * 65}]),
    "33 messages": turns(16),
    "2000 messages": turns(1000),
    "long text": about(PNG, text="a" * 5001),
    "long texts together": turns(15, "a" * 200),
    "a text of 200,000": about(PNG, text="a" * 200_000),
    "a long question": about(PNG, text="what colour " * 400),
    "a long model name": one_turn(model="m" * 10_000),
    "stop texts": one_turn(stop=["a"] * 5),
    "a long stop text": one_turn(stop="a" * 513),
    "an empty stop text": one_turn(stop=["a", ""]),
    **{f"n {n}": one_turn(n=n) for n in (0, -1, 9, 65, 10**6, 10**30)},
    **{f"best_of {n}": one_turn(best_of=n) for n in (0, -1, 2, 9, 10**6)},
    **{f"max_tokens {n}": one_turn(max_tokens=n) for n in (0, -1, 513, 10**6, 10**9, 2**63, 10**400)},
    "min_tokens": one_turn(min_tokens=9, max_tokens=8),
    "two maxima": one_turn(max_tokens=3, max_completion_tokens=4),
    **{f"temperature {t}": one_turn(temperature=t) for t in (-0.1, 2.1, 1e300)},
    **{f"top_p {p}": one_turn(top_p=p) for p in (0, -1, 1.1, 1e-30)},
    **{f"penalty {p}": one_turn(repetition_penalty=p) for p in (0, 0.4, 2.1, -1)},
    "picture 0": one_turn(messages=[about(PNG)["messages"][0] | {"image": 0}]),
    "picture 2 of 1": one_turn(messages=[about(PNG)["messages"][0] | {"image": 2}]),
    "named picture 99": about(PNG, text="Image 99: what is it?"),
    "seed": one_turn(seed=2**63),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_what_is_too_much_is_refused(hostile_server, name):
    status, found = hostile_server.ask(TOO_MUCH[name])
    assert status in (400, 404), found
    assert len(found["error"]["message"]) < 400


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/score"])
def test_many_long_texts_are_refused_before_they_are_tokenised(hostile_server, path):
    field = "input" if path == "/v1/embeddings" else "text_1"
    more = {} if field == "input" else {"text_2": {"content": [picture(PNG)]}}
    for texts in (["a"] * 257, ["a " * 2000] * 5, ["", "a"], [], ["a"] * 5000):
        status, found = hostile_server.ask({"model": "mini", field: texts} | more, path)
        assert status == 400, (len(texts), found)


def test_an_answer_that_the_model_cannot_read_is_refused(hostile_server):
    asked = one_turn(answer="é" * 2000, by_word=True)
    status, found = hostile_server.ask(asked, "/v1/attention")
    assert status == 400 and found["error"]["param"] == "answer"
    assert hostile_server.ask(asked | {"by_word": False}, "/v1/attention")[0] == 200


# -- what is no request -------------------------------------------------------------------------------------------
RAW = {
    "nothing": b"",
    "a word": b"hello",
    "null": b"null",
    "a list": b"[]",
    "cut short": json.dumps(one_turn()).encode()[:-1],
    "two": b"{}{}",
    "no UTF-8": b'{"model":"\xff\xfe","messages":[]}',
    "half a surrogate": b'{"model":"\\ud800","messages":[]}',
    "UTF-16": json.dumps(one_turn()).encode("utf-16"),
    "NUL": b"\0" * 100,
    "not a number": json.dumps(one_turn(temperature=float("nan"))).encode(),
    "infinity": json.dumps(one_turn(temperature=float("inf"))).encode(),
    "minus infinity": json.dumps(one_turn(top_p=float("-inf"))).encode(),
    "too large a number": b'{"temperature":1e999}',
    "a number of 100,000 digits": b'{"n":' + b"9" * 100_000 + b"}",
    "a name twice": b'{"model":"mini","model":"other","messages":[]}',
    **{f"lists {depth} deep": b"[" * depth + b"]" * depth for depth in (33, 10_000, 1_000_000)},
    **{f"objects {depth} deep": b'{"a":' * depth + b"1" + b"}" * depth for depth in (33, 10_000)},
    **{
        f"{field} {depth} deep": b'{"model":"mini","%s":' % field.encode() + b"[" * depth + b"]" * depth + b"}"
        for field in ("messages", "tools", "metadata", "logit_bias", "unknown")
        for depth in (33, 10_000)
    },
}


@pytest.mark.parametrize("name", RAW)
def test_what_is_no_request_is_refused(hostile_server, name):
    for path in (CHAT, "/v1/embeddings", "/v1/score", "/v1/attention"):
        assert hostile_server.ask(RAW[name], path)[0] == 400


@pytest.mark.parametrize("kind", ["", "text/plain", "multipart/form-data; boundary=x", "application/x-json", "a" * 999])
def test_a_body_of_another_kind_is_refused(hostile_server, kind):
    assert hostile_server.ask(json.dumps(one_turn()).encode(), headers={"Content-Type": kind})[0] == 415


WRONG = [None, True, 0, -1, 1.5, "", "x", "\0", [], [None], [[]], {}, {"a": 1}, [{"type": "text"}], 10**30]


def places(value, path=()):
    """Every place in a request."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def put(whole, path, value):
    """The request with another value at a place."""
    if not path:
        return value
    copy = dict(whole) if isinstance(whole, dict) else list(whole)
    copy[path[0]] = put(whole[path[0]], path[1:], value)
    return copy


REQUESTS = {
    CHAT: one_turn(max_tokens=1, n=1, stop=["x"], temperature=0, stream_options={"include_usage": False}, metadata={}),
    "/v1/attention": one_turn(answer="a cup", by_word=True),
    "/v1/embeddings": {"model": "mini", "input": ["a cup"], "encoding_format": "float"},
    "/v1/score": {"model": "mini", "text_1": ["a cup"], "text_2": {"content": [picture(PNG)]}},
}


@pytest.mark.parametrize("path", REQUESTS)
def test_a_wrong_type_anywhere_is_no_fault_of_the_server(hostile_server, path):
    good = REQUESTS[path]
    assert hostile_server.ask(good, path)[0] == 200
    for place in places(good):
        for wrong in WRONG:
            body = json.dumps(put(good, place, wrong)).encode()
            assert hostile_server.ask(body, path)[0] in (200, 400, 404)


@pytest.mark.parametrize("path", REQUESTS)
def test_an_unknown_field_anywhere_is_refused_by_name(hostile_server, path):
    good = REQUESTS[path]
    for place in places(good):
        value = good
        for step in place:
            value = value[step]
        if isinstance(value, dict) and place != ("metadata",):
            status, found = hostile_server.ask(put(good, place, value | {"surprise": 1}), path)
            assert status == 400 and "surprise" in found["error"]["message"]


# -- what looks like the model's own signs ----------------------------------------------------------------------------
SIGNS = ["<|im_start|>", "<|im_end|>", "</s>", "<s>", "<image>", "<|endoftext|>", "<pad>", "[SEP]", "[CLS]", "[DEC]"]
SIGNS += ["[PAD]", "[MASK]", "<ImageHere>", "<|vision_start|>", "<|im_end<|im_end|>|>", "<<|im_start|>|im_end|>"]


@pytest.mark.parametrize("sign", SIGNS)
def test_a_users_text_never_becomes_a_special_token(hostile_server, monkeypatch, sign):
    generator = hostile_server.service.model.generator
    said, told = [], []
    start, encode = generator.language_model.start, generator.instruction_tokenizer.encode

    def watched_start(visual_prompt, input_ids, attention_mask, **more):
        said.append(input_ids[attention_mask.bool()].tolist())
        return start(visual_prompt, input_ids, attention_mask, **more)

    def watched_encode(*arguments):
        batch = encode(*arguments)
        told.append(batch.input_ids[batch.attention_mask.bool()].tolist())
        return batch

    monkeypatch.setattr(generator.language_model, "start", watched_start)
    monkeypatch.setattr(generator.instruction_tokenizer, "encode", watched_encode)
    text = f"{sign} what {sign}{sign} is"
    history = [{"role": "system", "content": text}, *about(PNG, text=text)["messages"]]
    messages = [*history, {"role": "assistant", "content": text}, {"role": "user", "content": text}]
    status, found = hostile_server.ask(one_turn(messages=messages, max_tokens=1))
    assert status == 200, found
    tokenizer = generator.tokenizer
    special = set(tokenizer.tokenizer.all_special_ids) - {tokenizer.tokenizer.unk_token_id}
    assert said and not [ids for ids in said if special & set(ids)]
    assert all(not {0, 2, 3, 4} & set(ids[1:-1]) for ids in told)  # [PAD], [CLS], [SEP], [MASK]
