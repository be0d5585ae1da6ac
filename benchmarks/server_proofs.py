"""What tests hold of the server, as rows of benchmarks/server.py's table: they are run, and counted by promise.

    python benchmarks/server_proofs.py

The slow ones are among them: 100,000 changed pictures, other people's clients, the page in a real Chromium.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Proof:
    """A promise and the tests that hold it.

    Attributes:
        number: of the promise.
        what, target: as the table tells them.
        tests: what matches "module::test" of each.
    """

    number: str
    what: str
    target: str
    tests: str


PROOFS = (
    Proof(
        "S8",
        "bodies, pictures, messages, depth, n, beams and tokens beyond the limits",
        "refused before they are read",
        r"test_(hostile|gate)::test_(a_large_body|a_body|bodies|what_is_too_much|many_long_texts)",
    ),
    Proof(
        "S9",
        "bombs, and animations of 100,000 frames",
        "refused, or as dear as one frame",
        r"test_hostile::.*(bombs|animation|inflate|over_and_over)",
    ),
    Proof(
        "S10",
        "pictures cut short, 100,000 changed ones, odd sizes, colours and EXIF",
        "read or refused in plain words",
        r"test_hostile::test_(pictures_cut|three_hundred|a_hundred_thousand|odd_pictures|a_turned|an_exif)",
    ),
    Proof(
        "S11",
        "every answer to hostile requests: addresses, paths, tracebacks",
        "none",
        r"test_hostile(_headers)?::",
    ),
    Proof("S12", "addresses that must not be fetched", "at least 60 payloads, none asked", r"test_remote::"),
    Proof(
        "S14",
        "routes of the OpenAPI document without a key",
        "401, but for /healthz",
        r"test_gate::test_every_route|test_hostile_headers::test_(without_a_key|no_way|nothing_beside)",
    ),
    Proof(
        "S15",
        "foreign Host and Origin; the page's CSP, requests and markup",
        "refused; none outside; shown as text",
        r"test_gate::test_only_known|test_hostile_headers::test_other_names|test_page::test_(the_page_opens|markup)",
    ),
    Proof(
        "S17",
        "requests alone and in batches of 1 to 32",
        "500, identical tokens",
        r"test_batches::|test_engine::test_forty",
    ),
    Proof(
        "S19",
        "openai's clients in Python and JavaScript, llm, Open WebUI, schemathesis",
        "no failure",
        r"test_clients::|test_chat::test_openais_client",
    ),
    Proof(
        "", "the page in Chromium: streams, stops, outlives a reload; keyboard, 375 px, axe-core", "all", r"test_page"
    ),
)
PLACES = ("tests/server", "tests/inference/test_batches.py", "tests/inference/test_engine.py")


def note_proofs(note: Callable[[str, str, str, str], None]) -> bool:
    """Runs the tests, and notes a row for each promise; whether none failed.

    Raises:
        SystemExit: a promise has no test, or the tests cannot be run.
    """
    outcomes = _outcomes()
    for proof in PROOFS:
        found = {name: outcome for name, outcome in outcomes.items() if re.search(proof.tests, name)}
        if not found:
            raise SystemExit(f"No test holds {proof.number} {proof.what}: {proof.tests} matches none.")
        told = [f"{list(found.values()).count('passed')} tests hold"]
        told += [f"{name} {outcome}" for name, outcome in found.items() if outcome != "passed"]
        note(proof.number, proof.what, proof.target, "; ".join(told))
    return not {"failed", "error"} & set(outcomes.values())


def _outcomes() -> dict[str, str]:
    """module::test -> passed, failed, error or skipped; parameters of a test count one by one."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", f"--junitxml={report}", *PLACES]
        subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False)
        if not report.is_file():
            raise SystemExit("The tests could not be run; their message stands above.")
        cases = ElementTree.parse(report).iter("testcase")
        return {f"{_module(case)}::{case.get('name')}": _outcome(case) for case in cases}


def _module(case: ElementTree.Element) -> str:
    return str(case.get("classname")).rpartition(".")[2]


def _outcome(case: ElementTree.Element) -> str:
    for child in case:
        if child.tag in ("failure", "error", "skipped"):
            return {"failure": "failed"}.get(child.tag, child.tag)
    return "passed"


if __name__ == "__main__":
    sys.exit(not note_proofs(lambda *row: print("| " + " | ".join(row) + " |")))
