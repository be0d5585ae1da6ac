"""Steps of a fixed shape say what steps of growing shapes say, whoever joins, leaves or changes places meanwhile.

Here they are run as they are; on a GPU the same step is recorded and replayed.
"""

import pytest
import torch

from blip2.model import replay
from blip2.model.writing import Decoding, Writer, write

from .test_writing import (
    NUM_ROWS,
    WAYS,
    _gpt2,
    _llama,
    _mistral,
    _opt,
    _t5,
    alone,
    make_language_model,
    make_prompts,
    up_to_the_end,
)

FIXED = [_llama, _gpt2, _opt]


@pytest.fixture(autouse=True)
def short_buffers(monkeypatch):
    """So that a text outgrows its buffer while it is written."""
    monkeypatch.setattr(replay, "LENGTHS", 8)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", FIXED)
def test_fixed_steps_say_the_same(make, way):
    plain, replayed = make_language_model(make), make_language_model(make)
    assert replayed.replay_steps()
    decoding = Decoding(max_new_tokens=14, **WAYS[way])
    texts = []
    for language_model in (plain, replayed):
        torch.manual_seed(1)
        texts.append(write(language_model, *language_model.start(*make_prompts(language_model)), decoding))
    assert texts[0].tolist() == texts[1].tolist()
    assert all(rows.bit_count() == 1 for rows, _ in replayed.replay._steps)  # six rows are rounded up
    assert len({length for _, length in replayed.replay._steps}) > 1


@pytest.mark.parametrize("make", FIXED)
def test_rows_join_and_leave_between_fixed_steps(make):
    language_model = make_language_model(make)
    prompts = make_prompts(language_model)
    ways = [Decoding(max_new_tokens=5 + row, repetition_penalty=1.0 + row % 2) for row in range(NUM_ROWS)]
    expected = []
    for row in range(NUM_ROWS):
        started = language_model.start(*alone(prompts, row, language_model))
        expected.append(up_to_the_end(write(language_model, *started, ways[row])[0]))
    language_model.replay_steps()
    writer, rows = Writer(language_model), []
    with torch.no_grad():
        for row in range(NUM_ROWS):
            rows += writer.add(*language_model.start(*alone(prompts, row, language_model)), [ways[row]])
            writer.step()
            writer.step()
        while writer.rows:
            writer.step()
    assert [row.token_ids for row in rows] == expected


def test_two_texts_take_turns_with_one_recorded_step():
    language_model = make_language_model(_opt)
    prompts = make_prompts(language_model)
    decoding = Decoding(max_new_tokens=10, min_new_tokens=10)
    expected = [
        write(language_model, *language_model.start(*alone(prompts, row, language_model)), decoding)[0].tolist()
        for row in (0, 2)
    ]
    language_model.replay_steps()
    writers, rows = [], []
    with torch.no_grad():
        for row in (0, 2):
            writers.append(Writer(language_model))
            rows += writers[-1].add(*language_model.start(*alone(prompts, row, language_model)), [decoding])
        while any(writer.rows for writer in writers):
            for writer in writers:
                writer.step()
    assert [row.token_ids for row in rows] == expected


def test_where_a_step_has_no_fixed_shape_it_is_not_replayed():
    assert not make_language_model(_t5).replay_steps()
    windowed = make_language_model(_mistral)
    windowed.replay_steps()
    started = windowed.start(*make_prompts(windowed))
    write(windowed, *started, Decoding(max_new_tokens=4))
    assert not windowed.replay._steps
    eager = _llama()
    eager.config._attn_implementation = "eager"  # would add the mask's ones and zeros to its scores
    assert not replay.Replay.can_take(eager, takes_positions=True)


def test_rows_that_nobody_reads_stay_within_the_models_positions():
    language_model = make_language_model(_opt)
    language_model.replay_steps()
    first, *others = make_prompts(language_model)
    prompts = [one[:3] for one in (first, *others)]  # a step of four rows
    decoding = Decoding(max_new_tokens=8, min_new_tokens=8)
    expected = None
    for _ in range(12):  # more steps than the model has positions
        said = write(language_model, *language_model.start(*prompts), decoding).tolist()
        assert expected is None or said == expected
        expected = said


def test_without_a_compiler_a_single_row_is_read_by_the_model(monkeypatch, caplog):
    class Broken:
        def __call__(self, *inputs):
            raise ValueError("no compiler")

    def rerun(function, device):
        return function, function()

    monkeypatch.setattr(replay, "record", rerun)
    language_model = make_language_model(_opt)
    prompt = alone(make_prompts(language_model), 0, language_model)
    reading, logits = language_model.start(*prompt)
    plain, _ = language_model.start(*prompt)
    newest = logits.argmax(dim=1)
    with torch.no_grad():
        step = replay.FixedStep(language_model.model, reading.cache, 1, 24, Broken())
        step._record()
        assert step.row_step is None and step._logits is not None and "no compiler" in caplog.text
        step._tape = None  # from here on as without a GPU
        step.bind(reading)
        torch.testing.assert_close(step.run(newest), language_model.step(plain, newest))


def test_of_steps_only_so_many_bytes_are_kept(monkeypatch):
    language_model = make_language_model(_opt)
    language_model.replay_steps()
    monkeypatch.setattr(replay, "MOST_BYTES", 1)
    for row in range(3):
        started = language_model.start(*alone(make_prompts(language_model), row, language_model))
        write(language_model, *started, Decoding(max_new_tokens=20, min_new_tokens=20))
        assert len(language_model.replay._steps) == 1
