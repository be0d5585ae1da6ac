"""Parquet and saved Hugging Face data sets, with pictures inside and beside."""

import json

import pytest

from blip2.data.layouts import open_source
from blip2.errors import BadData, BadSample, MissingFile
from tests.data.written import encoded, put, told

pa = pytest.importorskip("pyarrow", reason="pyarrow comes with the extra data")
pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow comes with the extra data")

PICTURES = [encoded(level) for level in range(7)]


def table(first=0, end=7):
    """As Hugging Face writes captions: {bytes, path} and a list of texts."""
    images = [{"bytes": PICTURES[n], "path": f"{n}.jpg"} for n in range(first, end)]
    return pa.table({"image": images, "caption": [[f"caption {n}", "again"] for n in range(first, end)]})


def test_pictures_inside_are_read_in_any_order(tmp_path):
    pq.write_table(table(), tmp_path / "a.parquet", row_group_size=2)
    source = open_source(str(tmp_path / "a.parquet"))
    assert [source[i].image for i in (6, 0, 3, 5, 1)] == [PICTURES[i] for i in (6, 0, 3, 5, 1)]
    assert source[3].captions == ("caption 3", "again") and len(source) == 7
    assert source.pictures_sha256() == open_source(str(tmp_path / "a.parquet")).pictures_sha256()


@pytest.mark.parametrize("form", ["{}", "table:{}", "table:{}/data/train-*.parquet"])
def test_parts_of_a_split_are_one_source(tmp_path, form):
    (tmp_path / "data").mkdir()
    for part, (first, end) in enumerate(((0, 3), (3, 7))):
        pq.write_table(table(first, end), tmp_path / "data" / f"train-0000{part}-of-00002.parquet")
    pq.write_table(table(0, 1), tmp_path / "data" / "test-00000-of-00001-3f2a.parquet")
    source = open_source(form.format(tmp_path))
    assert [sample.image for sample in source] == PICTURES
    if "*" not in form:
        assert len(open_source(form.format(tmp_path), split="test")) == 1
        with pytest.raises(MissingFile, match="no split 'val'; it has test, train"):
            open_source(form.format(tmp_path), split="val")


def test_pictures_beside_are_named(tmp_path):
    data = put(tmp_path / "images", "a.jpg")
    rows = {"file_name": ["a.jpg", "a.jpg", "b.jpg", "../c.jpg"], "title": ["one", "two", None, "x"]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    source = open_source(str(tmp_path / "t.parquet"))
    assert told(source)[0] == ("a.jpg", ("one", "two")) and source[0].image == data
    for number, reason in ((1, "has no caption"), (2, "lies outside")):
        with pytest.raises(BadSample, match=reason):
            source[number]


def test_a_cell_without_bytes_is_read_by_its_path_below_the_folder(tmp_path):
    data = put(tmp_path, "a.jpg")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [{"bytes": None, "path": "a.jpg"}, {"bytes": None, "path": None}, {"bytes": b"", "path": None}, None]
    cells.append({"bytes": None, "path": "/etc/passwd"})
    pq.write_table(pa.table({"image": pa.array(cells, kind), "text": ["x"] * 5}), tmp_path / "t.parquet")
    source = open_source(str(tmp_path / "t.parquet"))
    assert source[0].image == data
    for number in range(1, 5):
        with pytest.raises(BadSample, match=r"is empty|lies outside"):
            source[number]


def test_questions_in_parquet(tmp_path):
    rows = {
        "image": [{"bytes": PICTURES[0], "path": None}],
        "question": ["What?"],
        "answers": [
            [{"answer": "cat", "answer_id": 1}, {"answer": "dog", "answer_id": 2}, {"answer": "dog", "answer_id": 3}]
        ],
        "image_id": [42],
    }
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    (sample,) = open_source(str(tmp_path / "t.parquet"))
    assert (sample.id, sample.questions[0].answer, sample.questions[0].answers) == ("42", "dog", ("cat", "dog", "dog"))


def test_a_damaged_file_and_unusable_columns_are_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + b"x" * 100)
    with pytest.raises(BadData, match=r"a\.parquet is no parquet file, or it is damaged"):
        open_source(str(tmp_path / "a.parquet"))
    pq.write_table(pa.table({"jpg": [b"x"], "label": [3]}), tmp_path / "b.parquet")
    with pytest.raises(BadData, match="It has: 'jpg', 'label'"):
        open_source(str(tmp_path / "b.parquet"))


def save_as_datasets_does(folder, rows):
    folder.mkdir(parents=True)
    with (
        pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, rows.schema) as writer,
    ):
        writer.write_table(rows, max_chunksize=2)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))


def test_a_saved_data_set_and_its_splits(tmp_path):
    save_as_datasets_does(tmp_path / "train", table())
    save_as_datasets_does(tmp_path / "validation", table(0, 2))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    source = open_source(str(tmp_path))
    assert [source[i].image for i in (6, 0, 3)] == [PICTURES[i] for i in (6, 0, 3)]
    assert source[6].captions == ("caption 6", "again")
    assert len(open_source(f"datasets:{tmp_path}", split="validation")) == 2
    assert len(open_source(str(tmp_path / "validation"))) == 2
    with pytest.raises(MissingFile, match="no split 'test'; it has train, validation"):
        open_source(str(tmp_path), split="test")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ('{"_data_files": [{"filename": "../../x.arrow"}]}', "names no file within the folder"),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', "There is no file"),
        ('{"_data_files": []}', "holds no rows"),
        ("[]", "is not the JSON"),
        ('{"_data_files": [{"filename": "broken.arrow"}]}', "is no Arrow stream"),
    ],
)
def test_a_hostile_or_damaged_saved_data_set_is_refused(tmp_path, state, message):
    (tmp_path / "state.json").write_text(state)
    (tmp_path / "broken.arrow").write_bytes(b"\xff" * 64)
    with pytest.raises((BadData, MissingFile), match=message):
        open_source(str(tmp_path))


def test_what_the_library_itself_saved(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the library datasets is not installed")
    for number in range(3):
        put(tmp_path / "pictures", f"{number}.jpg", number)
    paths = [str(tmp_path / "pictures" / f"{number}.jpg") for number in range(3)]
    rows = datasets.Dataset.from_dict({"image": paths, "caption": ["a", "b", "c"]}).cast_column(
        "image", datasets.Image()
    )
    datasets.DatasetDict({"train": rows, "test": rows.select([2])}).save_to_disk(str(tmp_path / "saved"))
    source = open_source(str(tmp_path / "saved"))
    assert [sample.image for sample in source] == [(tmp_path / "pictures" / f"{n}.jpg").read_bytes() for n in range(3)]
    assert [sample.captions for sample in open_source(str(tmp_path / "saved"), split="test")] == [("c",)]
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    assert [sample.captions for sample in open_source(str(tmp_path / "rows.parquet"))] == [("a",), ("b",), ("c",)]
