"""The command as a process of its own: light to start, quiet, and clean when it is stopped."""

import os
import signal
import subprocess
import sys

import pytest

import blip2

HEAVY = ("torch", "transformers", "PIL", "numpy", "pydantic", "yaml")


def test_the_command_line_imports_nothing_heavy():
    code = "import sys, blip2, blip2.cli.main; print([name for name in sys.argv[1:] if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, *HEAVY], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_names_every_command(run):
    result = run("--help")
    assert result.code == 0
    for command in ("caption", "ask", "chat", "match", "embed", "info", "demo", "train"):
        assert command in result.out
        assert run(command, "--help").code == 0


def test_the_version_is_shown(run):
    assert run("--version").out == f"blip2 {blip2.__version__}\n"


def test_results_alone_go_to_standard_output_and_a_closed_pipe_is_no_crash(folder, tiny):
    command = [sys.executable, "-m", "blip2.cli.main", "caption", "pictures", "--model", tiny, "--max-new-tokens", "4"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert len(done.stdout.splitlines()) == 3 and done.stderr == b""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_with_its_code_and_no_traceback(folder, tiny, number, code):
    command = [sys.executable, "-m", "blip2.cli.main", "chat", "pictures/a.png", "--model", tiny]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background shell ignores it
    ) as process:
        process.stdin.write(b"what ?\n")
        process.stdin.flush()
        process.stdout.readline()  # it answers, so it is at work
        process.send_signal(number)
        process.wait(timeout=60)
        assert process.returncode == code
        assert b"Traceback" not in process.stderr.read()
