"""The whole build on tiny packages: its splits, its bytes, and what is left of a build that was killed."""

import multiprocessing
import os
import signal

import pytest

from blip2.cli.data import inspect
from blip2.data.inspection import contact_sheet, describe
from blip2.data.open_pairs import build
from blip2.data.open_pairs.picture import is_held_out
from blip2.data.shards import open_split, read_manifest, verify
from blip2.errors import DownloadFailed, MissingFile, UserError
from tests.data import tiny_packages

SCENES = 12


@pytest.fixture
def packages(monkeypatch, tmp_path):
    tiny_packages.install(monkeypatch, tmp_path / "home")
    monkeypatch.setattr(build, "TRAINING_STYLES", ("fluent-3d", "fluent-flat"))  # a colour font cannot be made tiny
    monkeypatch.setattr(build, "SCENES", {"new_scenes": 3, "new_noun_pairs": 3})
    return tmp_path


def built(folder, **options):
    build.build_open_pairs(folder, num_scenes=SCENES, say=lambda text: None, **options)
    return folder


def test_the_splits_hold_what_they_promise(packages):
    folder = built(packages / "set")
    splits = {split: list(open_split(folder, split)) for split in read_manifest(folder)["splits"]}
    assert {split: len(samples) for split, samples in splits.items() if "scenes" in split or "vqa" in split} == {
        "train_scenes": SCENES, "new_scenes": 3, "easy_vqa_train": 2, "easy_vqa_test": 2,
    }  # fmt: skip
    assert not any(is_held_out(sample.concept) for sample in splits["train_pairs"])
    assert all(is_held_out(sample.concept) for sample in splits["held_out_concepts"])
    assert {sample.style for sample in splits["held_out_style"]} == {"twemoji"}
    assert {sample.concept for sample in splits["held_out_style"]} == set(tiny_packages.NOUNS)
    assert all("twemoji" not in sample.style for sample in splits["train_pairs"] + splits["held_out_concepts"])
    styles = splits["train_styles"]
    assert {sample.style for sample in styles} == {"openmoji", "emojione", "fxemoji", "noto-v1"}
    assert {sample.concept for sample in styles} == {sample.concept for sample in splits["train_pairs"]} - {"green cat"}
    pairs = splits["train_pairs"] + splits["held_out_concepts"]
    assert len(pairs) == 3 * len(tiny_packages.NOUNS) + 1  # a stamp and two emoji each; one sound clip-art title
    assert sorted(s.captions[0] for s in pairs if s.source == "clipart") == ["green cat"]
    assert {q.question for s in splits["easy_vqa_test"] for q in s.questions} == {
        "What shape is present?", "What colour is it?", "Is it red?",
    }  # fmt: skip
    verify(folder)


def test_the_manifest_names_the_licence_and_hash_of_each_source(packages):
    sources = read_manifest(built(packages / "set"))["sources"]
    assert set(sources) >= {"stamps", "openclipart-png", "fluent-3d", "twemoji", "easy-vqa"}
    assert all(source["licence"] and len(source["sha256"]) == 64 for source in sources.values())


def test_the_same_packages_and_seed_give_the_same_bytes(packages):
    first, second = built(packages / "first"), built(packages / "second")
    assert [(path.name, path.read_bytes()) for path in sorted(first.iterdir())] == [
        (path.name, path.read_bytes()) for path in sorted(second.iterdir())
    ]
    other = read_manifest(built(packages / "other", seed=1))["splits"]
    same = read_manifest(first)["splits"]
    assert other["train_scenes"] != same["train_scenes"] and other["train_pairs"] == same["train_pairs"]


def test_a_set_that_is_there_is_replaced_only_with_force(packages):
    folder = built(packages / "set")
    with pytest.raises(UserError, match="--force"):
        built(folder)
    (folder / "mark").touch()
    built(folder, force=True)
    assert not (folder / "mark").exists()
    assert [path.name for path in packages.iterdir() if path.name.startswith(".")] == []


def test_force_never_deletes_a_folder_that_is_no_data_set(packages):
    folder = packages / "papers"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="no data set"):
        built(folder, force=True)
    assert (folder / "thesis.txt").read_text() == "years"


def _build_and_die(folder):
    def say(text: str) -> None:
        if text.startswith("train_scenes"):
            os.kill(os.getpid(), signal.SIGKILL)

    build.build_open_pairs(folder, num_scenes=SCENES, say=say)


def test_a_killed_build_leaves_nothing_that_looks_complete(packages):
    child = multiprocessing.get_context("fork").Process(target=_build_and_die, args=(packages / "set",))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert not (packages / "set").exists()
    assert list(packages.rglob("manifest.json")) == []
    built(packages / "set")


def test_a_failed_build_cleans_up_and_keeps_the_old_set(packages):
    folder = built(packages / "set")
    before = (folder / "manifest.json").read_bytes()

    def fail(text: str) -> None:
        if text.startswith("train_pairs"):
            raise DownloadFailed("the network is down")

    with pytest.raises(DownloadFailed):
        build.build_open_pairs(folder, num_scenes=SCENES, force=True, say=fail)
    assert (folder / "manifest.json").read_bytes() == before
    assert [path.name for path in packages.iterdir() if path.name.startswith(".")] == []


def test_a_set_can_be_looked_into(packages):
    folder = built(packages / "set")
    scenes, pairs = (open_split(folder, split) for split in ("train_scenes", "train_pairs"))
    assert "12 pictures" in describe(scenes) and "count" in describe(scenes)
    assert "stamps/stamp-photo" in describe(pairs)
    contact_sheet(scenes, packages / "sheet.png")
    assert (packages / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_looking_into_nothing_says_how_to_make_a_set(tmp_path, monkeypatch):
    monkeypatch.setenv("BLIP2_HOME", str(tmp_path))
    with pytest.raises(MissingFile, match="blip2 data build"):
        inspect()
