"""Folders with texts beside the pictures, and tables in CSV, TSV and JSONL."""

import json
import os

import pytest

from blip2.data.layouts import open_source
from blip2.errors import BadData, BadSample, MissingFile
from tests.data.written import encoded, put, told


def test_a_folder_of_pictures_with_texts_beside_them(tmp_path):
    pictures = [put(tmp_path, name, level) for level, name in enumerate(("a.jpg", "in/b.PNG", "in/c.webp", "d.jpeg"))]
    (tmp_path / "a.txt").write_text("a cat\n\n a  second caption \n")
    (tmp_path / "in" / "b.caption").write_text("eine Katze 🐈")
    (tmp_path / "in" / "c.webp.txt").write_text("\ufeffthird", encoding="utf-8")
    (tmp_path / "notes.md").write_text("no picture")
    (tmp_path / ".hidden.jpg").write_bytes(pictures[0])
    source = open_source(str(tmp_path))
    assert told(source) == [
        ("a.jpg", ("a cat", "a second caption")),
        ("d.jpeg", ()),
        ("in/b.PNG", ("eine Katze 🐈",)),
        ("in/c.webp", ("third",)),
    ]
    assert [source[i].image for i in (0, 2, 3, -1)] == [pictures[0], pictures[1], pictures[2], pictures[2]]
    with pytest.raises(BadSample, match=r"d\.jpeg has no caption") as caught:
        source[1]
    assert caught.value.where == str(tmp_path / "d.jpeg")
    with pytest.raises(IndexError):
        source[4]


def test_texts_may_lie_in_another_folder_than_pictures(tmp_path):
    data = put(tmp_path / "pictures", "in/a.jpg")
    (tmp_path / "texts" / "in").mkdir(parents=True)
    (tmp_path / "texts" / "in" / "a.txt").write_text("a cat")
    source = open_source(f"folder:{tmp_path / 'texts'}", images=str(tmp_path / "pictures"))
    assert told(source) == [("in/a.jpg", ("a cat",))] and source[0].image == data


def test_metadata_as_hugging_face_has_it_and_a_split_folder(tmp_path):
    data = put(tmp_path / "train", "0001.png", kind="PNG")
    rows = [{"file_name": "0001.png", "text": "a cat"}, {"file_name": "0002.png", "text": "a dog"}]
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(f"folder:{tmp_path}", split="train")
    assert told(source) == [("0001.png", ("a cat",)), ("0002.png", ("a dog",))]
    assert source[0].image == data
    with pytest.raises(BadSample, match=r"0002\.png does not exist"):
        source[1]
    with pytest.raises(MissingFile, match="has no folder 'test'; it has train"):
        open_source(f"folder:{tmp_path}", split="test")


def test_a_folder_without_texts_says_what_was_expected(tmp_path):
    put(tmp_path, "a.jpg")
    with pytest.raises(BadData, match=r"1 pictures and a text to none.*a\.txt or a\.caption.*metadata\.jsonl"):
        open_source(str(tmp_path))


CSV = {
    "usual.csv": 'image,caption\na.jpg,"a cat, black"\nb.jpg,a dog\na.jpg,a pet\n',
    "usual.tsv": 'caption\tfilepath\n"a cat, black"\ta.jpg\na dog\tb.jpg\na pet\ta.jpg\n',
    "semicolons.csv": '\ufeffTitle;Image_Path\n"a cat, black";a.jpg\na dog;b.jpg\na pet;a.jpg\n',
    "flickr.csv": "image_name| comment_number| comment\na.jpg| 0| a cat, black\nb.jpg| 0| a dog\na.jpg| 1| a pet\n",
    "lines.jsonl": "\n".join(
        [
            '{"image": "a.jpg", "caption": ["a cat, black", "a pet"]}',
            "",
            '{"image": {"path": "b.jpg"}, "caption": "a dog"}',
        ]
    ),
    "windows.csv": 'image,caption\r\na.jpg,"a cat, black"\r\nb.jpg,a dog\r\na.jpg,a pet\r\n',
    "lists.csv": 'filename,raw\na.jpg,"[""a cat, black"", ""a pet""]"\nb.jpg,"[""a dog""]"\n',
}


@pytest.mark.parametrize("name", CSV)
def test_tables_of_every_form_give_the_same_samples(tmp_path, name):
    first, second = put(tmp_path, "a.jpg", 1), put(tmp_path, "b.jpg", 2)
    (tmp_path / name).write_text(CSV[name], encoding="utf-8", newline="")
    source = open_source(str(tmp_path / name))
    assert told(source) == [("a.jpg", ("a cat, black", "a pet")), ("b.jpg", ("a dog",))]
    assert [sample.image for sample in source] == [first, second]
    assert source.faults == ()


def test_columns_can_be_chosen(tmp_path):
    put(tmp_path / "pictures", "a.jpg")
    (tmp_path / "t.csv").write_text("file,image,words\na.jpg,7,a cat\n")
    source = open_source(
        str(tmp_path / "t.csv"), images=str(tmp_path / "pictures"), columns={"image": "file", "caption": "words"}
    )
    assert told(source) == [("a.jpg", ("a cat",))] and source[0].image


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("image,words\na.jpg,x\n", None, r"no column with a usual name for the caption.*It has: 'image', 'words'"),
        ("photo,caption\na.jpg,x\n", None, r"for the image \(image, image_path.*It has: 'photo', 'caption'.*--column"),
        ("image,caption\na.jpg,x\n", {"caption": "captain"}, "no column 'captain' for caption. Did you mean 'caption'"),
        ("image,caption\na.jpg,x\n", {"words": "caption"}, "'words' is no role of a column. Roles are: image, caption"),
        ("image,caption\n", None, "no rows that can be read"),
        ("", None, "names no columns: its first line"),
        ("image,caption\nhttps://x.org/a.jpg,x\n", None, "names web addresses.*img2dataset"),
    ],
)
def test_a_table_that_does_not_fit_says_what_it_has(tmp_path, text, columns, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(BadData, match=message):
        open_source(str(tmp_path / "t.csv"), columns=columns)


def test_questions_and_several_answers(tmp_path):
    put(tmp_path, "a.jpg")
    rows = [
        {"image": "a.jpg", "question": "What?", "answers": ["dog", "cat", "cat"]},
        {"image": "a.jpg", "question": "How many?", "answers": "two"},
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (sample,) = open_source(str(tmp_path / "q.jsonl"))
    assert [(q.question, q.answer, q.answers) for q in sample.questions] == [
        ("What?", "cat", ("dog", "cat", "cat")),
        ("How many?", "two", ()),
    ]


def test_a_split_column_chooses_rows(tmp_path):
    (tmp_path / "t.csv").write_text("image,caption,split\na.jpg,x,train\nb.jpg,y,val\n")
    assert [name for name, _ in told(open_source(str(tmp_path / "t.csv"), split="val"))] == ["b.jpg"]
    assert len(open_source(str(tmp_path / "t.csv"))) == 2
    with pytest.raises(BadData, match="no rows of the split 'test'"):
        open_source(str(tmp_path / "t.csv"), split="test")
    (tmp_path / "u.csv").write_text("image,caption\na.jpg,x\n")
    with pytest.raises(BadData, match="no column 'split' to choose 'val' by"):
        open_source(str(tmp_path / "u.csv"), split="val")


def test_rows_that_cannot_be_read_are_counted_and_those_without_picture_or_text_are_bad_samples(tmp_path):
    put(tmp_path, "a.jpg")
    (tmp_path / "t.jsonl").write_text(
        '{"image": "a.jpg", "caption": "x"}\n{"image": "a\n[1]\n{"caption": "y"}\n{"image": "c.jpg"}\n'
    )
    source = open_source(str(tmp_path / "t.jsonl"))
    assert [(fault.sample, fault.reason) for fault in source.faults] == [
        ("line 2", "is no JSON object"),
        ("line 3", "is no JSON object"),
    ]
    assert told(source) == [("a.jpg", ("x",)), ("line 4", ("y",)), ("c.jpg", ())]
    assert source[0].captions == ("x",)
    with pytest.raises(BadSample, match="no picture is named"):
        source[1]
    with pytest.raises(BadSample, match="has no caption"):
        source[2]


def test_a_lone_quote_in_a_tab_separated_file_swallows_nothing(tmp_path):
    (tmp_path / "t.tsv").write_text('caption\timage\n"Hello\ta.jpg\n6" pipe\tb.jpg\nthree\tcells\tc.jpg\n')
    source = open_source(str(tmp_path / "t.tsv"))
    assert told(source) == [("a.jpg", ('"Hello',)), ("b.jpg", ('6" pipe',))]
    assert [(fault.sample, fault.reason) for fault in source.faults] == [
        ("line 4", "has 3 fields, where the first line has 2")
    ]


LATIN1 = {
    "t.csv": b"image,caption\na.jpg,\xe9t\xe9\nb.jpg,\xc3\xa9t\xc3\xa9\n",
    "t.tsv": b"image\tcaption\na.jpg\t\xe9t\xe9\nb.jpg\t\xc3\xa9t\xc3\xa9\n",
    "t.jsonl": b'{"image": "a.jpg", "caption": "\xe9t\xe9"}\n{"image": "b.jpg", "caption": "\xc3\xa9t\xc3\xa9"}\n',
    "flickr30k:t.token": b"a.jpg#0\t\xe9t\xe9\nb.jpg#0\t\xc3\xa9t\xc3\xa9\n",
}


@pytest.mark.parametrize("name", LATIN1)
def test_a_text_that_is_no_utf8_is_left_out_and_told(tmp_path, name):
    put(tmp_path, "b.jpg")
    layout, colon, file = name.rpartition(":")
    (tmp_path / file).write_bytes(LATIN1[name])
    source = open_source(f"{layout}{colon}{tmp_path / file}")
    assert told(source) == [("b.jpg", ("été",))]
    (fault,) = source.faults
    assert fault.reason == "is not UTF-8" and fault.sample in ("line 1", "line 2") and file in fault.where


def test_a_sidecar_that_is_no_utf8_is_told(tmp_path):
    for name in ("a", "b", "c"):
        put(tmp_path, f"{name}.jpg")
    (tmp_path / "a.txt").write_bytes(b"\xe9t\xe9")
    (tmp_path / "b.txt").write_text("été", encoding="utf-8")
    (tmp_path / "c.txt").write_text("x " * (1 << 20), encoding="utf-8")
    source = open_source(str(tmp_path))
    assert told(source) == [("a.jpg", ()), ("b.jpg", ("été",)), ("c.jpg", ())]
    assert [(fault.sample, fault.reason) for fault in source.faults] == [
        ("a.jpg", "is not UTF-8"),
        ("c.jpg", "is too long to be the text of one picture"),
    ]


def test_a_table_of_another_encoding_is_named(tmp_path):
    (tmp_path / "t.csv").write_text("image,caption\na.jpg,x\n", encoding="utf-16")
    with pytest.raises(BadData, match=r"t.csv is UTF-16. Write it as UTF-8"):
        open_source(str(tmp_path / "t.csv"))
    (tmp_path / "t.csv").write_bytes(b"image,caption\na.jpg,\xe9t\xe9\n")
    with pytest.raises(BadData, match="no rows that can be read: line 2 is not UTF-8"):
        open_source(str(tmp_path / "t.csv"))
    (tmp_path / "t.jsonl").write_bytes(b'{"image": "a.jpg", "caption": "\xe9t\xe9"}\n')
    with pytest.raises(BadData, match="no rows that can be read: line 1 is not UTF-8"):
        open_source(str(tmp_path / "t.jsonl"))
    put(tmp_path, "in/a.jpg")
    (tmp_path / "in" / "a.txt").write_bytes(b"\xe9t\xe9")
    with pytest.raises(BadData, match=r"has no text that can be read: .*a\.txt is not UTF-8"):
        open_source(str(tmp_path / "in"))


def test_a_quote_that_is_not_closed_is_told_and_swallows_no_file(tmp_path):
    rows = [f"{number}.jpg,a cat" for number in range(40)]
    rows[5] = '5.jpg,"broken here'
    (tmp_path / "t.csv").write_text("\n".join(["image,caption", *rows]) + "\n")
    with pytest.raises(BadData, match=r"t.csv, line 7: a quoted text goes on for 35 lines"):
        open_source(str(tmp_path / "t.csv"))
    rows[5] = '5.jpg,"a cat\non two lines"'
    (tmp_path / "t.csv").write_text("\n".join(["image,caption", *rows]) + "\n")
    assert told(open_source(str(tmp_path / "t.csv")))[5] == ("5.jpg", ("a cat on two lines",))


def test_names_that_lead_out_of_the_folder_are_bad_samples_and_nothing_else_is(tmp_path):
    folder = tmp_path / "set"
    put(folder, "good.jpg")
    (tmp_path / "secret.jpg").write_bytes(encoded(9))
    names = ["../secret.jpg", str(tmp_path / "secret.jpg"), "x/../../secret.jpg", "../../etc/passwd", "good.jpg"]
    lines = [json.dumps({"file_name": name, "text": "x"}) for name in names]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    source = open_source(str(folder))
    for number in range(4):
        with pytest.raises(BadSample, match="lies outside of the images folder"):
            source[number]
    assert source[4].image
    # beside a table further up the folder of the images is that of the table
    assert open_source(f"table:{folder / 'metadata.jsonl'}", images=str(tmp_path))[1].image


@pytest.mark.parametrize("name", ["line\nbreak.jpg", "🦁 löwe.jpg", "a b'\"c.jpg", "-rf.jpg", "ü" * 120 + ".jpg"])
def test_odd_names_are_names(tmp_path, name):
    data = put(tmp_path, name)
    (tmp_path / f"{name[:-4]}.txt").write_text("x")
    (tmp_path / "t.jsonl").write_text(json.dumps({"image": name, "caption": "x"}))
    for source in (open_source(str(tmp_path)), open_source(str(tmp_path / "t.jsonl"))):
        assert source[0].image == data and source[0].captions == ("x",)


def test_names_that_are_no_utf8_are_read(tmp_path):
    folder = os.fsencode(tmp_path)
    try:
        with open(os.path.join(folder, b"\xe9t\xe9.jpg"), "wb") as file:
            file.write(encoded(1))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with open(os.path.join(folder, b"\xe9t\xe9.txt"), "w", encoding="utf-8") as file:
        file.write("été")
    source = open_source(str(tmp_path))
    assert source[0].image == encoded(1)
    assert source[0].id == "?t?.jpg" and source[0].captions == ("été",)


def test_the_hash_of_the_pictures_sees_pictures_and_not_texts(tmp_path):
    put(tmp_path, "a.jpg", 1)
    (tmp_path / "t.csv").write_text("image,caption\na.jpg,x\n")
    before = open_source(str(tmp_path / "t.csv")).pictures_sha256()
    (tmp_path / "t.csv").write_text("image,caption\na.jpg,another text\n")
    assert open_source(str(tmp_path / "t.csv")).pictures_sha256() == before
    (tmp_path / "a.jpg").write_bytes(encoded(1) + b"\0")
    assert open_source(str(tmp_path / "t.csv")).pictures_sha256() != before


def test_a_url_is_read_as_a_path_is(tmp_path):
    fsspec = pytest.importorskip("fsspec", reason="fsspec comes with the extra data")
    data = encoded(3)
    memory = fsspec.filesystem("memory")
    memory.pipe("/tables/t.csv", b"image,caption\nin/a.jpg,x\n../a.jpg,y\n")
    memory.pipe("/tables/images/in/a.jpg", data)
    memory.pipe("/tables/a.jpg", data)
    source = open_source("memory://tables/t.csv")
    assert source[0].image == data
    with pytest.raises(BadSample, match="lies outside of the images folder memory://tables/images"):
        source[1]
    (tmp_path / "t.csv").write_text("image,caption\na.jpg,x\n")
    put(tmp_path, "a.jpg")
    assert open_source(f"file://{tmp_path}/t.csv")[0].image
