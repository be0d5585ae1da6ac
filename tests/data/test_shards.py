"""Shards give back what was written, one by one and in any order, and refuse what is missing, changed or foreign."""

import io
import json
import tarfile

import pytest
from PIL import Image

from blip2.data.sample import Question, Sample
from blip2.data.shards import open_split, pictures_sha256, read_split, verify, write_manifest, write_split
from blip2.errors import BadData, MissingFile


def picture(level: int, kind: str = "WEBP") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 0, 255 - level)).save(buffer, kind)
    return buffer.getvalue()


SAMPLES = [
    Sample(
        id=f"made/{n:05d}",
        image=picture(20 * n, "PNG" if n % 3 else "WEBP"),
        captions=(f"caption {n}", f"überschrift {n}") if n != 4 else (),
        questions=(Question("How many?", "one", "count"),) * (n % 3),
        tags=("tag",) * (n % 2),
        source="made",
        style="plain",
        concept=f"concept {n}",
        licence="MIT",
    )
    for n in range(7)
]


@pytest.fixture
def folder(tmp_path):
    write_manifest(tmp_path, "tiny", {"train": write_split(tmp_path, "train", SAMPLES, per_shard=3)}, seed=0)
    return tmp_path


def test_what_was_written_comes_back(folder):
    assert list(read_split(folder, "train")) == SAMPLES
    assert sorted(path.name for path in folder.glob("*.tar")) == [f"train-0000{n}.tar" for n in range(3)]


@pytest.mark.parametrize("place", [0, 2, 3, 6, -1])
def test_any_sample_is_read_by_its_number(folder, place):
    split = open_split(folder, "train")
    assert len(split) == 7 and split[place] == SAMPLES[place]


def test_slices_and_ends(folder):
    split = open_split(folder, "train")
    assert split[2:6:2] == SAMPLES[2:6:2]
    with pytest.raises(IndexError):
        split[7]


def test_captions_can_be_listed_without_the_shards(folder):
    split = open_split(folder, "train")
    for shard in folder.glob("*.tar"):
        shard.unlink()
    assert [sample.captions for sample in split.described()] == [sample.captions for sample in SAMPLES]


def test_others_read_the_shards_as_plain_tar(folder):
    with tarfile.open(folder / "train-00001.tar") as archive:
        names = archive.getnames()
        assert names[:3] == ["0000100000.webp", "0000100000.txt", "0000100000.json"]
        assert names[3].endswith(".png")
        text = archive.extractfile("0000100000.json")
        assert text is not None and json.load(text)["captions"] == ["caption 3", "überschrift 3"]


def test_the_same_samples_give_the_same_bytes(folder, tmp_path_factory):
    again = tmp_path_factory.mktemp("again")
    write_split(again, "train", SAMPLES, per_shard=3)
    for path in again.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_the_hash_of_the_pictures_does_not_see_texts(folder, tmp_path_factory):
    def hashed(samples):
        other = tmp_path_factory.mktemp("other")
        write_manifest(other, "tiny", {"train": write_split(other, "train", samples, per_shard=3)})
        return pictures_sha256(other, "train")

    first = Sample(**{**vars(SAMPLES[0]), "captions": ("said otherwise",)})
    redrawn = Sample(**{**vars(SAMPLES[0]), "image": picture(99)})
    assert hashed([first, *SAMPLES[1:]]) == pictures_sha256(folder, "train")
    assert hashed([redrawn, *SAMPLES[1:]]) != pictures_sha256(folder, "train")


def test_a_folder_without_manifest_is_no_data_set(tmp_path):
    write_split(tmp_path, "train", SAMPLES)
    with pytest.raises(MissingFile, match=r"no manifest\.json.*blip2 data build"):
        open_split(tmp_path, "train")


def test_an_unknown_split_is_answered_with_those_that_are_there(folder):
    with pytest.raises(MissingFile, match="no split 'test'; it has train"):
        open_split(folder, "test")


def _change_manifest(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.update(version=99), "version 99"),
        (lambda manifest: manifest["splits"]["train"]["shards"][0].pop("sha256"), "another version"),
        (lambda manifest: manifest["splits"]["train"]["shards"][0].update(colour="red"), "another version"),
    ],
)
def test_a_set_of_another_version_is_refused(folder, change, message):
    _change_manifest(folder, change)
    with pytest.raises(BadData, match=message):
        open_split(folder, "train")


def test_a_broken_manifest_is_refused(folder):
    (folder / "manifest.json").write_text('{"name": "ti')
    with pytest.raises(BadData, match="cannot be read"):
        open_split(folder, "train")


def test_a_missing_index_is_refused(folder):
    (folder / "train-00001.idx.json").unlink()
    with pytest.raises(BadData, match="missing or broken"):
        open_split(folder, "train")


def test_checking_finds_a_changed_and_a_missing_shard(folder):
    verify(folder)
    shard = folder / "train-00002.tar"
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    with pytest.raises(BadData, match="was changed"):
        verify(folder)
    shard.unlink()
    with pytest.raises(BadData, match="missing"):
        verify(folder)
