"""`blip2 serve` as a process: it opens where it is told, refuses an open door, and finishes what it took."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request

import pytest

from .serving import Serving, user


@pytest.fixture
def start(tiny_folder):
    """Starts `blip2 serve` on a free port; gives the process and the server's address."""
    processes = []

    def run(*arguments, **environment):
        command = [sys.executable, "-m", "blip2.cli.main", "serve", "--model", str(tiny_folder), "--port", "0"]
        process = subprocess.Popen(
            [*command, *arguments], stderr=subprocess.PIPE, text=True, env=os.environ | environment
        )
        processes.append(process)
        for line in process.stderr:
            if found := re.search(r"running on (http://\S+)", line):
                threading.Thread(target=process.stderr.read, daemon=True).start()
                return process, Serving(found[1], None)
        raise AssertionError("the server did not start")

    yield run
    for process in processes:
        process.kill()
        process.wait()


def test_a_signal_lets_what_was_taken_finish_and_the_process_ends_well(start, images):
    process, running = start("--name", "tiny")
    body = {
        "model": "tiny",
        "messages": [user(images[0], "why ?")],
        "stream": True,
        "max_tokens": 400,
        "min_tokens": 400,
    }
    head = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{running.url}/v1/chat/completions", json.dumps(body).encode(), head)
    streams = [urllib.request.urlopen(request, timeout=60) for _ in range(8)]
    for stream in streams:
        stream.readline()
    process.send_signal(signal.SIGTERM)
    texts = [stream.read() for stream in streams]
    assert all(text.rstrip().endswith(b"data: [DONE]") for text in texts)
    assert all(b'"finish_reason": "length"' in text for text in texts)
    assert process.wait(30) == 0
    with pytest.raises(OSError):
        running.send("/healthz")


def test_settings_come_from_the_environment_too(start, images):
    key = "a-key-of-some-length"
    _, running = start(BLIP2_NAME="tiny", BLIP2_API_KEYS=key)
    assert running.send("/v1/models").status == 401
    answer = running.send("/v1/models", Authorization=f"Bearer {key}")
    assert answer.json["data"][0]["id"] == "tiny"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "On 0.0.0.0 others can reach the server"),
        (["--host", "::"], "others can reach"),
        (["--api-key", "short"], "16 ASCII characters"),
        (["--filter", "nothing.at:all"], "There is no filter"),
        (["--filter", "words:no-such-file"], "There is no word list"),
        (["--model", "no-such-model"], "no-such-model"),
    ],
)
def test_what_must_not_be_is_refused_before_anything_is_loaded(tiny_folder, arguments, message):
    command = [sys.executable, "-m", "blip2.cli.main", "serve", "--model", str(tiny_folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
