"""The house rules that a machine can check: who imports whom, how large files grow, what may stand in them."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "blip2"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
TEXTS = sorted(
    path
    for place in ("src/blip2", "tests", "docs", "examples", "benchmarks", ".ci")
    for path in (ROOT / place).rglob("*")
    if path.suffix in {".py", ".md", ".yaml", ".toml", ".html", ".json", ""} and path.is_file()
) + sorted(path for pattern in ("*.md", "*.toml", "Makefile") for path in ROOT.glob(pattern))

MOST_LINES = 450
MOST_LINES_OF_A_FUNCTION = 100  # the longest, a training loop; the median is about ten
TODO = re.compile(r"\b(?:TODO|FIXME|XXX)\b")
CONDITION = re.compile(r"\b(?:when|once|until|as soon as)\b")
# a path that exists on one machine only
MACHINE_PATH = re.compile(r"(?<![\w.}~])/(?:root|Users|mnt|home/\w+|work/\w+|tmp/\w+)/")
VAGUE_NAMES = {"utils", "util", "helpers", "common", "misc", "base"}


def relative(path):
    """A test's name for a file."""
    return str(path.relative_to(ROOT))


def test_imports_point_down_the_house():
    linter = Path(sys.executable).with_name("lint-imports")
    if not linter.is_file():
        pytest.skip("import-linter is not installed; make lint runs it")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("module", ["blip2", "blip2.cli.main"])
def test_nothing_heavy_is_imported_before_it_is_needed(module):
    code = f"import sys, {module}; print(*sorted({{'torch', 'transformers', 'PIL', 'numpy'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=relative)
def test_files_and_functions_stay_small_enough_to_read(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MOST_LINES
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in functions if (f.end_lineno or 0) - f.lineno >= MOST_LINES_OF_A_FUNCTION] == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_file_opens_by_saying_what_it_is(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not tree.body or ast.get_docstring(tree)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_public_functions_and_classes_are_explained(path):
    kinds = (ast.FunctionDef, ast.ClassDef)
    public = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, kinds)]
    assert [node.name for node in public if not node.name.startswith("_") and not ast.get_docstring(node)] == []


def test_no_file_is_named_for_no_purpose():
    assert [relative(path) for path in SOURCES if path.stem in VAGUE_NAMES or path.parent.name in VAGUE_NAMES] == []


def test_what_is_left_to_do_names_the_condition_that_ends_it():
    found = [
        f"{relative(path)}:{number}: {line.strip()}"
        for path in SOURCES + [path for path in TESTS if path != Path(__file__)]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if TODO.search(line) and not CONDITION.search(line)
    ]
    assert found == []


def test_no_text_names_a_place_on_one_machine():
    found = [
        f"{relative(path)}:{number}: {line.strip()}"
        for path in TEXTS
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("line", "is_machine_path"),
    [
        ("open('/root/data/x')", True),
        ("cd /home/anna/blip2", True),
        ("/tmp/run/metrics.jsonl", True),
        ("~/.cache/blip2/data", False),
        ("https://example.org/home/x/y", False),
        ("$HOME/work/x", False),
        ("bin/tmp", False),
    ],
)
def test_a_machines_path_is_told_from_a_web_address(line, is_machine_path):
    assert bool(MACHINE_PATH.search(line)) == is_machine_path
