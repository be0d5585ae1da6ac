"""`blip2 data shard` and `blip2 data inspect`, as typed."""

import pytest
from typer.testing import CliRunner

from blip2.cli.data import app
from blip2.data.inspection import check_pictures, contact_sheet
from blip2.data.layouts import open_source
from blip2.data.shards import open_split
from blip2.errors import UserError
from blip2.preprocessing.images import load_image
from tests.data.written import encoded, put


@pytest.fixture
def table(tmp_path):
    for number in range(8):
        put(tmp_path / "pictures", f"{number}.jpg", number)
    (tmp_path / "pictures" / "8.jpg").write_bytes((tmp_path / "pictures" / "7.jpg").read_bytes())
    (tmp_path / "pictures" / "9.jpg").write_bytes(encoded(9)[:300])
    rows = [f"{number}.jpg,a caption of {'very ' * number}many words" for number in range(9)]
    (tmp_path / "t.csv").write_text("\n".join(["file,words", *rows, "9.jpg,a caption of many words", "0.jpg,second"]))
    return tmp_path / "t.csv"


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


COLUMNS = ["--column", "image=file", "--column", "caption=words"]


def test_shard_then_inspect(table, tmp_path):
    options = ["--images", tmp_path / "pictures", *COLUMNS, "--stop-share", 0.5, "--workers", 2]
    done = run("shard", table, tmp_path / "out", *options, "--size", 16, "--format", "webp", "--as", "mine")
    assert done.exit_code == 0 and str(tmp_path / "out") in done.stdout and "9 samples packed" in done.stderr
    samples = open_split(tmp_path / "out", "mine")
    assert len(samples) == 9 and samples[0].image.startswith(b"RIFF")
    told_of = run("inspect", tmp_path / "out", "--verify", "--sheet", tmp_path / "sheet.png", "--workers", 0)
    assert "mine: 9 pictures, 10 captions" in told_of.stdout and "9 read, 0 of them bad, 1 repeat" in told_of.stdout
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_tells_of_any_source(table, tmp_path):
    found = run("inspect", table, "--images", tmp_path / "pictures", *COLUMNS, "--workers", 0).stdout
    assert "10 pictures, 11 captions, 0 questions" in found
    assert "captions an image: 1: 9, 2: 1" in found
    assert "10 different, 9.1% repeat another one" in found
    assert "words a caption: 1-13, median 8" in found
    assert "10 read, 1 of them bad, 1 repeat another" in found and "9.jpg" in found
    assert "#" in found


def test_wrong_options_are_explained(table, tmp_path):
    for arguments, message in (
        (["--format", "tiff"], "--format is one of keep, jpeg, webp"),
        (["--column", "image"], "--column is ROLE=NAME"),
    ):
        with pytest.raises(UserError, match=message):
            run("shard", table, tmp_path / "out", *arguments)


def test_a_sheet_shows_what_is_bad_and_goes_on(table, tmp_path):
    source = open_source(str(table), images=str(tmp_path / "pictures"), columns={"image": "file", "caption": "words"})
    contact_sheet(source, tmp_path / "sheet.png", load_image)
    assert load_image(tmp_path / "sheet.png").size[0] > 0


def test_of_a_large_source_some_pictures_all_over_it_are_decoded_and_with_verify_all(tmp_path):
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"{number}.jpg,x\n" for number in range(450)))
    source = open_source(str(tmp_path / "t.csv"))
    some, every = (check_pictures(source, load_image, every=every) for every in (False, True))
    assert (some.num_checked, len(some.bad), every.num_checked) == (150, 150, 450)
    assert "447.jpg does not exist" in some.bad[-1] and "and 145 more" in str(some)
