"""The engine: many threads ask one model, share its steps, and each gets what it would have got alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from parity.hf_checkpoints import made_on_first_use

import blip2
from blip2.errors import BadImage, Busy, Closing, UserError
from blip2.inference.decoding import make_candidates, make_decoding
from blip2.inference.engine import Engine
from blip2.model.writing import Writer

QUESTIONS = ["what is this ?", "which colour is the red cup left of the star ?", "how many", "a cat ?", "which cup"]
WAYS = [{}, {"max_new_tokens": 4}, {"repetition_penalty": 1.5}, {"num_beams": 3}, {"min_new_tokens": 6}]


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """Kind -> a checkpoint of Hugging Face's."""
    return made_on_first_use(tmp_path_factory)


@pytest.mark.parametrize("kind", ["blip2-opt", "blip2-t5", "instructblip-llama"])
def test_forty_requests_at_once_get_what_each_gets_alone(peers, kind, images):
    model = blip2.load(peers(kind).folder)
    wanted = [
        (images[i % len(images)], QUESTIONS[i % 4], {"max_new_tokens": 12} | WAYS[i * 7 % len(WAYS)]) for i in range(40)
    ]
    alone = [model.generate([image], question, **options)[0] for image, question, options in wanted]

    def ask(request):
        image, question, options = request
        reply = engine.submit(image, question, decoding=make_decoding(options))
        return reply.text(), reply

    with Engine(blip2.load(peers(kind).folder), max_rows=8) as engine, ThreadPoolExecutor(40) as threads:
        found = list(threads.map(ask, wanted))
    assert [text.strip() for text, _ in found] == alone
    assert len(set(alone)) > 5
    one_by_one = sum(
        reply.num_tokens for (_, reply), (*_, options) in zip(found, wanted, strict=True) if "num_beams" not in options
    )
    assert 0 < engine.num_steps < one_by_one / 2  # they shared steps


def test_a_stream_comes_in_pieces_while_others_are_written(model, images):
    expected = model.generate([images[0]], QUESTIONS[1], max_new_tokens=20)[0]
    with Engine(model) as engine:
        others = [engine.submit(image, "how many", decoding=make_decoding({})) for image in images]
        reply = engine.submit(images[0], QUESTIONS[1], decoding=make_decoding({"max_new_tokens": 20}))
        pieces = list(reply)
        assert "".join(pieces) == expected and len(pieces) > 1
        assert all(isinstance(other.text(), str) for other in others)
    assert reply.reason in ("stop", "length") and reply.num_tokens <= 20


def test_who_stops_reading_stops_the_model(model, images):
    with Engine(model) as engine:
        reply = engine.submit(images[0], "a", decoding=make_decoding({"max_new_tokens": 4000, "min_new_tokens": 4000}))
        for _ in reply:
            break
        assert engine.submit(images[1], "a").text() == model_says(model, images[1], "a")
    assert reply.reason == "cancelled" and reply.num_tokens < 4000


def model_says(model, image, prompt):
    return model.generate([image], prompt)[0]


def test_a_full_queue_refuses_and_keeps_what_it_took(model, images, monkeypatch):
    gate = threading.Event()
    features_of = model.features_of
    monkeypatch.setattr(model, "features_of", lambda pixels: gate.wait() and features_of(pixels))
    with Engine(model, max_rows=1, max_waiting=2) as engine:
        replies = [engine.submit(images[0], "a")]
        while engine._waiting:  # until the first is in the model's hands
            pass
        replies += [engine.submit(image, "a") for image in images[1:3]]
        with pytest.raises(Busy, match="2 requests are waiting"):
            engine.submit(images[3], "a")
        gate.set()
        assert [reply.text() for reply in replies] == [model_says(model, image, "a") for image in images[:3]]


def test_a_bad_request_fails_alone(model, images, monkeypatch):
    encode_prompts = model.generator.tokenizer.encode_prompts

    def refuse(prompts):
        if "poison" in prompts:
            raise UserError("no such prompt")
        return encode_prompts(prompts)

    monkeypatch.setattr(model.generator.tokenizer, "encode_prompts", refuse)
    expected = model_says(model, images[0], "a")
    with Engine(model) as engine:
        with pytest.raises(BadImage):
            engine.submit(b"no picture", "a")
        replies = [engine.submit(images[0], prompt) for prompt in ("a", "poison", "a")]
        assert replies[0].text() == replies[2].text() == expected
        with pytest.raises(UserError, match="no such prompt"):
            replies[1].text()


def test_a_model_that_breaks_tells_those_who_wait_and_goes_on_with_the_next(model, images, monkeypatch):
    expected = model_says(model, images[0], "a")
    language_model = model.generator.language_model
    with Engine(model) as engine:
        with monkeypatch.context() as patch:
            for name in ("step", "step_through"):
                patch.setattr(language_model, name, lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.submit(images[0], "a").text()
        assert engine.submit(images[0], "a").text() == expected


def test_who_is_held_back_beside_a_bad_request_is_written_once(model, images, monkeypatch):
    expected, read = model_says(model, images[1], "a cat ?"), model.generator.read
    poison = model.generator.tokenizer.encode_prompts(["poison"]).input_ids.tolist()

    def read_alone(visual_prompt, prompt):
        if prompt.input_ids.tolist() == poison:
            raise UserError("no such prompt")
        return read(visual_prompt, prompt)

    monkeypatch.setattr(model.generator, "read", read_alone)
    monkeypatch.setattr(Writer, "takes", lambda writer, _: not writer.rows)  # as of models whose rows cannot join
    added, add = [], Writer.add
    monkeypatch.setattr(Writer, "add", lambda self, *read: (rows := add(self, *read), added.append(len(rows)))[0])
    gate = threading.Event()
    with Engine(model) as engine:
        first = engine.submit(images[0], "a", decoding=make_decoding({"max_new_tokens": 30, "min_new_tokens": 30}))
        while not engine.num_writing:
            pass
        engine.call(gate.wait)
        held, bad = engine.submit(images[1], "a cat ?"), engine.submit(images[2], "poison")
        gate.set()
        with pytest.raises(UserError, match="no such prompt"):
            bad.text()
        assert held.text() == expected
    assert first.reason == "length" and added == [1, 1]


def test_closing_finishes_what_was_taken_or_cancels_it(model, images):
    long = make_decoding({"max_new_tokens": 300, "min_new_tokens": 300})
    engine = Engine(model)
    reply = engine.submit(images[0], "a", decoding=long)
    engine.close()
    assert reply.reason == "length" and reply.num_tokens == 300
    with pytest.raises(Busy, match="shut down"):
        engine.submit(images[0], "a")
    engine = Engine(model)
    replies = [engine.submit(image, "a", decoding=long) for image in images]
    engine.close(finish=False)
    assert {reply.reason for reply in replies} == {"cancelled"}
    assert not engine._thread.is_alive()


def test_of_several_captions_the_one_most_similar_to_the_picture_is_given(model, images):
    decoding = make_candidates({"max_new_tokens": 9}, 4)
    prompts = model.settings.prompts
    expected = model.caption(images, best_of=4, max_new_tokens=9)
    with Engine(model) as engine:
        replies = [
            engine.submit(image, prompts.caption, prompts.caption_instruction, decoding=decoding) for image in images
        ]
        assert [reply.text() for reply in replies] == expected
    assert all(reply.num_tokens <= 9 for reply in replies)


def test_other_work_with_the_model_is_done_between_steps(model, images):
    expected = model.embed_texts(["a red cup"])
    with Engine(model) as engine:
        reply = engine.submit(images[0], "a", decoding=make_decoding({"max_new_tokens": 300, "min_new_tokens": 300}))
        found = engine.call(lambda: (threading.current_thread().name, model.embed_texts(["a red cup"])))
        name, vectors = found.result(60)
        assert name == "blip2 engine" and (vectors == expected).all()
        assert reply.reason is None  # it was not waited for
        with pytest.raises(ZeroDivisionError):
            engine.call(lambda: 1 / 0).result(60)
        reply.cancel()
    with pytest.raises(Closing):
        engine.call(lambda: None)


def test_pieces_may_be_delivered_as_they_come(model, images):
    given = []
    with Engine(model) as engine:
        engine.submit(images[0], "a", deliver=given.append)
    *pieces, end = given
    assert end is None and "".join(pieces) == model_says(model, images[0], "a")


def test_who_cannot_be_told_is_not_written_for_and_others_are(model, images):
    def gone(piece):
        raise RuntimeError("Event loop is closed")

    long = make_decoding({"max_new_tokens": 400, "min_new_tokens": 400})
    with Engine(model) as engine:
        lost = engine.submit(images[0], "a", decoding=long, deliver=gone)
        assert engine.submit(images[1], "a").text() == model_says(model, images[1], "a")
    assert lost.is_cancelled and lost.num_tokens < 400
