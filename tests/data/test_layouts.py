"""Which layout a text means, and the answers to a text that means none."""

import pytest

from blip2.data.layouts import LAYOUTS, open_source, split_layout
from blip2.data.shards import write_manifest, write_split
from blip2.errors import BadData, MissingFile
from tests.data.test_shards import SAMPLES
from tests.data.written import put, put_json, told


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("coco:a.json", ("coco", "a.json")),
        ("COCO:/x/a.json", ("coco", "/x/a.json")),
        ("visual_genome:a.json", ("visual-genome", "a.json")),
        ("coco:s3://bucket/a.json", ("coco", "s3://bucket/a.json")),
        ("vqa:q.json,a.json", ("vqa", "q.json,a.json")),
        ("s3://bucket/a", (None, "s3://bucket/a")),
        ("memory://a", (None, "memory://a")),
        ("C:\\data\\a.csv", (None, "C:\\data\\a.csv")),
        ("a.csv", (None, "a.csv")),
    ],
)
def test_a_layout_in_front_is_told_from_a_url_and_a_drive(text, expected):
    assert split_layout(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("coc:a.json", r"'coc' is no layout\. Did you mean coco\? Layouts are: blip2, folder, table"),
        ("web_dataset:a.tar", "'web_dataset' is no layout. Did you mean webdataset"),
        ("zzz:a.tar", r"'zzz' is no layout\. Layouts are"),
    ],
)
def test_an_unknown_layout_is_answered_with_the_nearest(text, message):
    with pytest.raises(BadData, match=message):
        open_source(text)


def test_a_file_with_a_colon_in_its_name_is_a_file(tmp_path, monkeypatch):
    put(tmp_path, "a.jpg")
    (tmp_path / "set:one.csv").write_text("image,caption\na.jpg,x\n")
    monkeypatch.chdir(tmp_path)
    assert told(open_source("set:one.csv")) == [("a.jpg", ("x",))]


def test_nothing_there_and_nothing_known(tmp_path):
    with pytest.raises(MissingFile, match="There is nothing at"):
        open_source(str(tmp_path / "gone"))
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(BadData, match=r"no layout is known by the ending '\.xlsx'.*\.csv.*one of: blip2, folder"):
        open_source(str(tmp_path / "a.xlsx"))
    with pytest.raises(MissingFile):
        open_source(f"coco:{tmp_path / 'gone.json'}")


def test_our_own_folder_by_path_and_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("BLIP2_HOME", str(tmp_path))
    folder = tmp_path / "data" / "mine"
    folder.mkdir(parents=True)
    write_manifest(folder, "mine", {split: write_split(folder, split, SAMPLES) for split in ("one", "two")})
    for text in (str(folder), f"blip2:{folder}", "mine"):
        assert list(open_source(text, split="two")) == SAMPLES
    with pytest.raises(MissingFile, match=r"several splits: one, two\. Choose one"):
        open_source("mine")
    with pytest.raises(MissingFile, match="no split 'three'; it has one, two"):
        open_source("mine", split="three")
    with pytest.raises(BadData, match="holds its pictures"):
        open_source("mine", split="one", images=str(tmp_path))


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"folder", "table", "datasets"}))
def test_columns_are_refused_where_there_are_none(tmp_path, layout):
    with pytest.raises(BadData, match=f"layout {layout} has no columns"):
        open_source(f"{layout}:{tmp_path}", columns={"image": "x"})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_answers_an_empty_folder_and_an_empty_file_with_an_error_of_ours(tmp_path, layout):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a").touch()
    put_json(tmp_path / "b.json", 3)
    for place in ("empty", "a", "b.json", "gone"):
        with pytest.raises((BadData, MissingFile)):
            open_source(f"{layout}:{tmp_path / place}")
