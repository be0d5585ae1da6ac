"""Tar shards of others: read by offset, indexed once, and as far as they are sound."""

import io
import json
import tarfile

import pytest

from blip2.data import webdataset
from blip2.data.layouts import open_source
from blip2.errors import BadData, BadSample, MissingFile
from tests.data.written import encoded, put_tar, told


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("BLIP2_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def members(first, count):
    """As img2dataset writes them."""
    for number in range(first, first + count):
        key = f"{number:09d}"
        notes = {"caption": f"from json {number}", "url": "https://x.org", "key": key, "status": "success"}
        yield f"{key}.jpg", encoded(number)
        yield f"{key}.json", json.dumps(notes).encode()
        yield f"{key}.txt", f"caption {number}\n".encode()


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "cc3m"
    for number in range(3):
        put_tar(folder / f"{number:05d}.tar", list(members(10 * number, 4)))
    return folder


@pytest.mark.parametrize(
    "form", ["{}", "webdataset:{}", "{}/{{00000..00002}}.tar", "{}/*.tar", "webdataset:{}/0000{{0,1,2}}.tar"]
)
def test_shards_by_folder_braces_and_wildcards(shards, form):
    source = open_source(form.format(shards))
    assert [name for name, _ in told(source)] == [f"{n:05d}/{10 * n + i:09d}" for n in range(3) for i in range(4)]
    assert source[5].captions == ("caption 11",) and source[5].image == encoded(11)
    assert source.faults == ()


def test_samples_are_read_by_offset_in_any_order(tmp_path):
    written = list(members(0, 6))
    place = put_tar(tmp_path / "a.tar", written)
    source = open_source(str(place))
    pictures = [data for name, data in written if name.endswith(".jpg")]
    assert [source[i].image for i in (5, 0, 3, -1)] == [pictures[i] for i in (5, 0, 3, 5)]


def test_an_index_is_kept_beside_and_made_anew_when_the_shard_changes(shards, monkeypatch):
    first = told(open_source(str(shards)))
    index = shards / "00001.tar.blip2-index"
    assert index.is_file()
    monkeypatch.setattr(webdataset, "_go_through", lambda *_: pytest.fail("the index was there"))
    assert told(open_source(str(shards))) == first
    monkeypatch.undo()
    put_tar(shards / "00001.tar", list(members(50, 2)))
    assert [name for name, _ in told(open_source(str(shards)))][4:6] == ["00001/000000050", "00001/000000051"]


@pytest.mark.parametrize("text", [b"", b"{}", b"nonsense\n", b'{"version": 1, "size": 0}\n[[0,1,2]]', b"\xff" * 99])
def test_a_broken_index_is_made_anew(shards, text):
    expected = told(open_source(str(shards)))
    (shards / "00000.tar.blip2-index").write_bytes(text)
    assert told(open_source(str(shards))) == expected


def test_of_a_folder_that_cannot_be_written_the_index_is_in_the_cache_folder(shards, home, monkeypatch):
    real = webdataset.os.replace

    def refuse(source, target):
        if str(target).startswith(str(shards)):
            raise PermissionError("read-only")
        real(source, target)

    monkeypatch.setattr(webdataset.os, "replace", refuse)
    assert len(open_source(str(shards))) == 12
    assert len(list((home / "indexes").iterdir())) == 3
    assert [path.name for path in shards.iterdir() if not path.name.endswith(".tar")] == []


def test_many_shards_are_indexed_in_processes_and_give_the_same(shards, monkeypatch):
    one_by_one = told(open_source(str(shards)))
    for index in shards.glob("*.blip2-index"):
        index.unlink()
    for number in range(3, 6):
        put_tar(shards / f"{number:05d}.tar", list(members(10 * number, 4)))
    monkeypatch.setattr(webdataset.os, "cpu_count", lambda: 3)
    source = open_source(str(shards))
    assert told(source)[:12] == one_by_one and len(source) == 24
    assert len(list(shards.glob("*.blip2-index"))) == 6


@pytest.mark.parametrize("cut", [1, 512, 700, 1024, 5000])
def test_a_truncated_shard_gives_what_is_before_the_damage_and_tells(tmp_path, cut):
    written = list(members(0, 5))
    place = put_tar(tmp_path / "a.tar", written)
    whole = place.read_bytes().rstrip(b"\0")
    place.write_bytes(whole[: len(whole) - cut])
    source = open_source(str(place))
    (fault,) = source.faults
    assert fault.where == str(place) and "is cut short or damaged after byte" in fault.reason
    sound = [sample for sample in source.described() if sample.captions]
    assert 3 <= len(sound) <= 5
    assert source[0].image == written[0][1] and source[2].image == written[6][1]


def test_damage_in_the_middle_is_no_quiet_end(tmp_path):
    place = put_tar(tmp_path / "a.tar", list(members(0, 5)))
    data = bytearray(place.read_bytes())
    middle = bytes(data).index(b"000000003.jpg")
    data[middle : middle + 200] = b"\x99" * 200
    place.write_bytes(data)
    source = open_source(str(place))
    assert len(source) == 3 and "after byte" in source.faults[0].reason
    assert "9 files before that" in source.faults[0].reason


@pytest.mark.parametrize("data", [b"", b"x" * 5000, encoded(1), b"\0" * 10240])
def test_what_is_no_tar_is_refused(tmp_path, data):
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(BadData, match=r"holds no KEY\.jpg"):
        open_source(str(tmp_path / "a.tar"))


def test_doubled_keys_missing_pictures_and_texts(tmp_path):
    first, second = encoded(1), encoded(2)
    place = put_tar(
        tmp_path / "a.tar",
        [
            ("a.jpg", first),
            ("a.txt", b"one"),
            ("a.png", second),  # a second picture of the key
            ("a.txt", b"again"),
            ("b.txt", b"a text alone"),
            ("c.jpg", first),
            ("d.jpg", b""),
            ("d.txt", b"empty"),
            ("e.jpg", b"<html>not found</html>"),
            ("e.json", b'{"caption": "a page"}'),
            ("../../f.jpg", second),
            ("../../f.txt", b"outside"),
            ("._a.jpg", b"of a Mac"),
            ("g.jpg", second),
            ("g.json", b"not json"),
            ("line\nbreak 🦁.jpg", second),
            ("line\nbreak 🦁.txt", "löwe".encode()),
            ("h.jpg", second),
            ("h.txt", "löwe".encode("latin-1")),
            ("i.jpg", second),
            ("i.json", '{"caption": "löwe"}'.encode("latin-1")),
        ],
    )
    source = open_source(str(place))
    assert told(source) == [
        ("a/a", ("one",)),
        ("a/b", ("a text alone",)),
        ("a/c", ()),
        ("a/d", ("empty",)),
        ("a/e", ("a page",)),
        ("a/../../f", ("outside",)),
        ("a/g", ()),
        ("a/line break 🦁", ("löwe",)),
        ("a/h", ()),
        ("a/i", ()),
    ]
    assert [fault.sample for fault in source.faults] == ["a", "a/h", "a/i"]
    assert "second picture" in source.faults[0].reason
    assert {fault.reason for fault in source.faults[1:]} == {"has a text for it that is not UTF-8"}
    assert source[0].image == first and source[5].image == second and source[7].image == second
    reasons = {1: "but no picture", 2: "has no caption", 3: "empty file", 4: "not a picture", 6: "has no caption"}
    for number, reason in reasons.items():
        with pytest.raises(BadSample, match=reason):
            source[number]


def test_long_names_are_read(tmp_path):
    name = "x" * 180
    place = put_tar(tmp_path / "a.tar", [(f"{name}.jpg", encoded(1)), (f"{name}.txt", b"long")])
    assert told(open_source(str(place))) == [(f"a/{name}", ("long",))]


def test_what_is_not_there_or_compressed_is_refused(shards, tmp_path):
    with pytest.raises(MissingFile, match=r"no archive .*00003\.tar"):
        open_source(f"webdataset:{shards}/{{00000..00003}}.tar")
    (tmp_path / "a.tar.gz").touch()
    with pytest.raises(BadData, match="is compressed"):
        open_source(f"webdataset:{tmp_path / 'a.tar.gz'}")
    with pytest.raises(BadData, match="hold their pictures"):
        open_source(str(shards), images=str(tmp_path))


def test_shards_in_a_store_are_indexed_in_the_cache_folder(home):
    fsspec = pytest.importorskip("fsspec", reason="fsspec comes with the extra data")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in (("a.jpg", encoded(1)), ("a.txt", b"one")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    fsspec.filesystem("memory").pipe("/shards/00000.tar", buffer.getvalue())
    for form in ("memory://shards/*.tar", "memory:///shards", "webdataset:memory:///shards/{00000..00000}.tar"):
        source = open_source(form)
        assert told(source) == [("00000/a", ("one",))] and source[0].image == encoded(1)
    assert len(list((home / "indexes").iterdir())) == 1


def test_the_hash_of_the_pictures_changes_with_a_shard(shards):
    before = open_source(str(shards)).pictures_sha256()
    assert open_source(str(shards)).pictures_sha256() == before
    put_tar(shards / "00002.tar", list(members(90, 4)))
    assert open_source(str(shards)).pictures_sha256() != before
