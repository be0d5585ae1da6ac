"""Names lead nowhere but below their folder; patterns, URLs and local paths are read alike."""

import os

import pytest

from blip2.data import places
from blip2.data.pictures import FilePictures
from blip2.errors import BadData, BadSample, MissingFile, MissingPart
from tests.data.written import encoded, put

fsspec = pytest.importorskip("fsspec", reason="fsspec comes with the extra data")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("{0..2}.tar", ["0.tar", "1.tar", "2.tar"]),
        ("{008..011}.tar", ["008.tar", "009.tar", "010.tar", "011.tar"]),
        ("s3://b/{a,b}/{0..1}.tar", ["s3://b/a/0.tar", "s3://b/a/1.tar", "s3://b/b/0.tar", "s3://b/b/1.tar"]),
    ],
)
def test_braces_stand_for_files(pattern, expected):
    assert places.expand(pattern) == expected


@pytest.mark.parametrize("pattern", ["{5..2}.tar", "{a}.tar", "{0..99999999999}.tar", "{0..9999}{0..9999}.tar"])
def test_braces_that_cannot_be_meant_are_refused(pattern):
    with pytest.raises(BadData, match=r"is no range|neither a range|more than 100,000"):
        places.expand(pattern)


def test_wildcards_give_sorted_files_or_an_error(tmp_path):
    for name in ("b.tar", "a.tar", "c.txt"):
        (tmp_path / name).touch()
    assert places.expand(f"{tmp_path}/*.tar") == [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]
    with pytest.raises(MissingFile, match="No file fits"):
        places.expand(f"{tmp_path}/*.zip")


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "a/../../secret",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a\0b",
        "./../secret",
        "s3://bucket/x",
        "file:///etc/passwd",
    ],
)
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(encoded(1))
    place = places.below(str(folder), name)
    assert place is None or place.startswith(f"{folder}{os.sep}")
    with pytest.raises(BadSample):
        FilePictures(str(folder)).read(name, "x")
    assert places.below("memory://images", name) is None or "secret" not in str(places.below("memory://images", name))


def test_a_whole_path_below_the_folder_is_taken(tmp_path):
    data = put(tmp_path, "in/a.jpg")
    assert FilePictures(str(tmp_path)).read(str(tmp_path / "in" / "a.jpg"), "x") == data
    assert FilePictures(str(tmp_path)).read("in/../in/a.jpg", "x") == data
    with pytest.raises(BadSample, match="lies outside of the images folder"):
        FilePictures(str(tmp_path / "in")).read(str(tmp_path / "b.jpg"), "x")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.touch(), "is empty"),
        (lambda path: path.write_bytes(b"root:x:0:0"), "is not a picture"),
        (lambda path: path.mkdir(), "cannot be read"),
        (lambda path: os.mkfifo(path), "cannot be read"),  # opening it would wait for ever
        (lambda path: path.symlink_to("/etc/passwd"), "is not a picture"),
        (lambda path: path.symlink_to(path), "cannot be read"),
        (lambda path: path.symlink_to("nowhere"), "does not exist"),
        (lambda path: None, "does not exist"),
    ],
)
def test_what_is_no_picture_file_is_a_bad_sample_that_names_it(tmp_path, make, reason):
    make(tmp_path / "a.jpg")
    with pytest.raises(BadSample, match=reason) as caught:
        FilePictures(str(tmp_path)).read("a.jpg", "x")
    assert caught.value.where == str(tmp_path / "a.jpg") and caught.value.sample_id == "x"


def test_a_link_to_a_picture_is_followed_as_in_folders_that_others_link_together(tmp_path):
    data = put(tmp_path, "blobs/1f")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").symlink_to("../blobs/1f")
    assert FilePictures(str(tmp_path / "images")).read("a.jpg", "x") == data


def test_a_link_that_leads_back_up_is_gone_through_once(tmp_path):
    put(tmp_path, "a/b.jpg")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert list(places.files_below(str(tmp_path))) == ["a/b.jpg"]


def test_urls_are_read_as_paths_are(tmp_path):
    data = put(tmp_path, "in/a.jpg")
    files = fsspec.filesystem("memory")
    files.pipe("/places/in/a.jpg", data)
    for root in ("memory://places", f"file://{tmp_path}", str(tmp_path)):
        root = places.plain(root)
        place = places.join(root, "in", "a.jpg")
        assert places.read_bytes(place) == data
        assert places.read_bytes(place, offset=3, size=5) == data[3:8]
        assert places.is_file(place) and places.is_folder(root) and not places.is_file(places.join(root, "b"))
        assert list(places.files_below(root)) == ["in/a.jpg"] and places.names_in(root) == ["in"]
        assert places.name_of(place) == "a.jpg" and places.is_folder(places.folder_of(place))
        assert places.stamp(place)[0] == len(data)
        assert FilePictures(root).read("in/a.jpg", "x") == data
        with pytest.raises(MissingFile, match="There is no file"):
            places.read_bytes(places.join(root, "b.jpg"))


def test_a_store_that_lacks_its_package_or_its_protocol_is_explained():
    with pytest.raises(BadData, match="knows no protocol 'nonsense'"):
        places.read_bytes("nonsense://a/b")
    try:
        import s3fs  # noqa: F401
    except ImportError:
        with pytest.raises(MissingPart, match="needs a further package"):
            places.read_bytes("s3://bucket/a.json")


def test_names_with_newlines_are_spelled_in_messages(tmp_path):
    with pytest.raises(BadSample) as caught:
        FilePictures(str(tmp_path)).read("a\nb.jpg", "a\nb")
    assert "\n" not in str(caught.value) and "a\\nb.jpg" in str(caught.value)
