"""Bad samples are counted exactly, named once, and stop a run when they are too many."""

import json
import pickle
import threading

import pytest

from blip2.data.faults import Fault, FaultLog
from blip2.errors import BadData, BadImage, BadSample


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_bad_sample_is_a_line_with_its_file_and_reason(tmp_path):
    with FaultLog(tmp_path / "run" / "faults.jsonl") as log:
        log.record(BadSample("a/1", "a.jpg", "is empty"))
        log.record(BadImage("a/2 is broken or cut short and cannot be decoded."), sample_id="a/2", where="b.jpg")
        log.record(Fault("", "c.tar", "is cut short"))
        log.seen(300)
    assert lines(tmp_path / "run" / "faults.jsonl") == [
        {"sample": "a/1", "where": "a.jpg", "reason": "is empty"},
        {"sample": "a/2", "where": "b.jpg", "reason": "is broken or cut short and cannot be decoded"},
        {"sample": "", "where": "c.tar", "reason": "is cut short"},
    ]
    assert log.summary().startswith("3 of 300 samples were bad: is empty (1)")


def test_no_fault_makes_no_file(tmp_path):
    with FaultLog(tmp_path / "faults.jsonl") as log:
        log.seen(1000)
    assert not (tmp_path / "faults.jsonl").exists() and log.summary() == "0 of 1,000 samples were bad"


def test_a_sample_met_again_is_counted_again_and_named_once_also_after_a_restart(tmp_path):
    path = tmp_path / "faults.jsonl"
    with FaultLog(path) as log:
        for _ in range(3):
            log.record(BadSample("a", "a.jpg", "is empty"))
            log.seen(100)
        state = log.state_dict()
    path.write_bytes(path.read_bytes() + b'{"sample": "b", "wh')  # as a kill leaves it
    with FaultLog(path) as log:
        log.load_state_dict(json.loads(json.dumps(state)))
        log.record(BadSample("a", "a.jpg", "is empty"))
        log.record(BadSample("b", "b.jpg", "is empty"))
        log.seen(100)
    assert [line["sample"] for line in lines(path)] == ["a", "b"]
    assert (log.num_faults, log.num_seen, log.num_named) == (5, 400, 2)


@pytest.mark.parametrize(("bad", "of", "stops"), [(10, 100, False), (11, 100, True), (50, 99, False), (0, 5000, False)])
def test_more_than_the_share_stops_after_a_hundred_samples(tmp_path, bad, of, stops):
    log = FaultLog(tmp_path / "faults.jsonl", stop_share=0.1)
    for number in range(bad):
        log.record(BadSample(str(number), "x.jpg", "does not exist"))
    if not stops:
        log.seen(of)
        return
    with pytest.raises(
        BadData, match=r"11 of 100 samples are bad\. Most frequent: does not exist \(11\).*faults\.jsonl"
    ):
        log.seen(of)


def test_a_run_in_which_nothing_is_good_stops_though_it_never_sees_a_sample():
    log = FaultLog(None)
    with pytest.raises(BadData, match="100 samples in a row are bad"):
        for number in range(200):
            log.record(BadSample(str(number), "x.jpg", "does not exist"))
    assert log.num_faults == 100


def test_threads_lose_no_count(tmp_path):
    log = FaultLog(tmp_path / "faults.jsonl", stop_share=1)

    def work(thread):
        for number in range(200):
            log.record(BadSample(f"{thread}/{number}", "x.jpg", "is empty"))
            log.seen(1)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (log.num_faults, log.num_seen, len(lines(tmp_path / "faults.jsonl"))) == (800, 800, 800)


def test_the_error_of_a_sample_can_be_sent_between_processes():
    error = pickle.loads(pickle.dumps(BadSample("a\n1", "b.jpg", "is empty")))
    assert (error.sample_id, error.where, error.reason) == ("a\n1", "b.jpg", "is empty")
    assert str(error) == "Sample 'a\\n1' cannot be used: b.jpg is empty."
