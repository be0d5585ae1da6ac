"""Any source becomes shards that are read back by name, by recipe and by others; bad samples are counted exactly."""

import io
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from blip2.data.layouts import open_source
from blip2.data.packing import Packing, pack
from blip2.data.shards import open_split, read_manifest, verify
from blip2.errors import BadData, UserError
from blip2.preprocessing.images import load_image
from tests.data.written import encoded, put, told


def source_of(folder, count, *, bad=()):
    """A table of pictures, some of them broken in turn: missing, empty, cut short, no picture, without a caption."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        name = f"{number:04d}.jpg"
        data = encoded(number % 250, size=(40, 30))
        if number in bad:
            kind = sorted(bad).index(number) % 5
            data = (None, b"", data[:-200], b"<html>", data)[kind]
        if data is not None:
            (folder / name).write_bytes(data)
        has_text = number not in bad or sorted(bad).index(number) % 5 != 4
        rows.append({"image": name, "caption": [f"caption {number}", "again"] if has_text else " "})
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return open_source(str(folder / "t.jsonl"))


@pytest.mark.parametrize("workers", [0, 2])
def test_one_percent_of_bad_samples_is_counted_exactly_and_named(tmp_path, workers):
    bad = {7, 99, 150, 151, 299}
    source = source_of(tmp_path / "in", 500, bad=bad)
    packed = pack(source, tmp_path / "out", "train", Packing(), decode=load_image, workers=workers, per_shard=100)
    assert packed.count == 495 and packed.summary.startswith("5 of 500 samples were bad")
    lines = [json.loads(line) for line in (tmp_path / "out" / "train-faults.jsonl").read_text().splitlines()]
    assert [line["sample"] for line in lines] == [f"{number:04d}.jpg" for number in sorted(bad)]
    reasons = ["does not exist", "is empty", "broken or cut short", "is not a picture", "has no caption"]
    assert all(reason in line["reason"] for reason, line in zip(reasons, lines, strict=True))
    assert {line["where"] for line in lines} == {str(tmp_path / "in" / f"{number:04d}.jpg") for number in bad}
    again = open_source(str(tmp_path / "out"))
    assert told(again) == [one for n, one in enumerate(told(source)) if n not in bad]
    assert all(one.image == source[int(one.id[:4])].image for one in again)  # kept to the byte
    assert told(open_split(tmp_path / "out", "train")) == told(again)
    verify(tmp_path / "out")


def test_too_many_bad_samples_stop_it(tmp_path):
    source = source_of(tmp_path / "in", 150, bad=set(range(0, 150, 5)))
    with pytest.raises(BadData, match=r"of 100 samples are bad.*train-faults\.jsonl.*More than 10% stop the run"):
        pack(source, tmp_path / "out", "train", Packing(), decode=load_image)
    assert not (tmp_path / "out" / "manifest.json").exists()
    packed = pack(source, tmp_path / "other", "train", Packing(), decode=load_image, stop_share=0.5)
    assert packed.count == 120


def pictures_of(folder, split="train"):
    return [Image.open(io.BytesIO(sample.image)) for sample in open_split(folder, split)]


@pytest.mark.parametrize(
    ("packing", "expected"),
    [
        (
            Packing(),
            [("JPEG", (100, 60)), ("PNG", (60, 100)), ("WEBP", (40, 40)), ("GIF", (90, 90)), ("JPEG", (60, 100))],
        ),
        (
            Packing(size=50),
            [("JPEG", (83, 50)), ("PNG", (50, 83)), ("WEBP", (40, 40)), ("PNG", (50, 50)), ("JPEG", (50, 83))],
        ),
        (
            Packing(size=50, format="webp"),
            [("WEBP", size) for size in ((83, 50), (50, 83), (40, 40), (50, 50), (50, 83))],
        ),
        (Packing(format="jpeg"), [("JPEG", size) for size in ((100, 60), (60, 100), (40, 40), (90, 90), (60, 100))]),
    ],
)
def test_sizes_and_formats(tmp_path, packing, expected):
    sizes = {"a.jpg": (100, 60), "b.png": (60, 100), "c.webp": (40, 40), "d.gif": (90, 90)}
    for level, (name, size) in enumerate(sizes.items()):
        kind = {"jpg": "JPEG"}.get(name[2:], name[2:].upper())
        (tmp_path / name).write_bytes(encoded(level, kind, size))
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    (tmp_path / "e.jpg").write_bytes(encoded(5, "JPEG", (100, 60), exif=turned))
    for name in [*sizes, "e.jpg"]:
        (tmp_path / f"{name[0]}.txt").write_text(name)
    source = open_source(str(tmp_path))
    pack(source, tmp_path / "out", "train", packing, decode=load_image)
    assert [(picture.format, picture.size) for picture in pictures_of(tmp_path / "out")] == expected
    if packing == Packing():
        kept = [sample.image for sample in open_split(tmp_path / "out", "train")][:4]
        assert kept == [sample.image for sample in source][:4]
    assert all(picture.getexif().get(0x0112, 1) == 1 for picture in pictures_of(tmp_path / "out"))


def test_a_reduced_picture_is_near_that_of_an_exact_resize(tmp_path):
    gradient = np.linspace(0, 255, 800, dtype=np.uint8)
    image = Image.fromarray(np.stack([np.tile(gradient, (600, 1))] * 3, axis=-1))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    packed = Packing(size=75, format="webp", quality=100)(buffer.getvalue(), "x", load_image)
    found = np.asarray(Image.open(io.BytesIO(packed)).convert("RGB")).astype(int)
    exact = np.asarray(image.resize((100, 75), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(found - exact).max() <= 6  # 3 measured; JPEG and WebP round


def test_a_second_split_joins_and_none_is_replaced(tmp_path):
    source = source_of(tmp_path / "in", 5)
    for split in ("train", "val"):
        pack(source, tmp_path / "out", split, Packing(), decode=load_image)
    assert list(read_manifest(tmp_path / "out")["splits"]) == ["train", "val"]
    assert read_manifest(tmp_path / "out")["packed"]["val"]["from"].startswith("table:")
    with pytest.raises(UserError, match="has a split 'val' already"):
        pack(source, tmp_path / "out", "val", Packing(), decode=load_image)


KILLED = """
import os, signal, sys
from pathlib import Path
from blip2.data.layouts import open_source
from blip2.data.packing import Packing, pack
from blip2.preprocessing.images import load_image

def die(done, total):
    if done > int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

options = {"decode": load_image, "per_shard": 10, "progress": die}
pack(open_source(sys.argv[1]), Path(sys.argv[2]), "train", Packing(size=20), **options)
"""


def test_a_killed_packing_goes_on_and_ends_in_the_same_bytes(tmp_path):
    source = source_of(tmp_path / "in", 45, bad={3, 12})
    options = {"decode": load_image, "per_shard": 10}
    pack(source, tmp_path / "whole", "train", Packing(size=20), **options)
    arguments = [str(tmp_path / "in" / "t.jsonl"), str(tmp_path / "out"), "25"]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False, env=os.environ)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "manifest.json").exists()
    (tmp_path / "out" / "train-00003.tar.partial").write_bytes(b"a shard that was begun")
    with pytest.raises(UserError, match="unfinished split of other pictures or settings"):
        pack(source, tmp_path / "out", "train", Packing(size=24), **options)
    packed = pack(source, tmp_path / "out", "train", Packing(size=20), **options)
    assert packed.count == 43
    whole, resumed = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "out")
    )
    whole.pop("manifest.json"), resumed.pop("manifest.json")
    assert whole == resumed
    assert read_manifest(tmp_path / "whole")["splits"] == read_manifest(tmp_path / "out")["splits"]


def test_a_source_of_which_nothing_is_good_makes_no_data_set(tmp_path):
    put(tmp_path, "x.jpg")
    (tmp_path / "t.csv").write_text("image,caption\ngone.jpg,x\n")
    with pytest.raises(UserError, match="no sample that can be packed: 1 of 1 samples were bad: does not exist"):
        pack(open_source(str(tmp_path / "t.csv")), tmp_path / "out", "train", Packing(), decode=load_image)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_questions_with_all_their_answers_survive(tmp_path):
    put(tmp_path, "a.jpg")
    row = {"image": "a.jpg", "question": "What?", "answers": ["cat", "cat", "dog"]}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    source = open_source(str(tmp_path / "t.jsonl"))
    pack(source, tmp_path / "out", "train", Packing(), decode=load_image)
    (sample,) = open_source(str(tmp_path / "out"))
    assert sample == source[0]
    (as_others,) = open_source(f"webdataset:{tmp_path / 'out'}")
    assert as_others.questions == source[0].questions
