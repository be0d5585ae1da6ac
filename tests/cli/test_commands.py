"""What people type and what comes out: the forms of results, exit codes, and refusals in one line."""

import json

import numpy as np
import pytest
from PIL import Image

import blip2

GOOD = ["pictures/a.png", "pictures/b.JPG", "pictures/inside/c.webp"]


@pytest.fixture(scope="module")
def model(tiny):
    return blip2.load(tiny)


def said(text):
    """A caption as a line shows it."""
    return "".join(character if character.isprintable() else " " for character in text)


def test_one_file_gives_the_bare_caption(run, folder, tiny, model):
    result = run("caption", GOOD[0], "--model", tiny)
    assert (result.code, result.out) == (0, said(model.caption(GOOD[0])) + "\n")


def test_several_files_give_a_line_each_with_the_path(run, folder, tiny, model):
    expected = "".join(f"{path}\t{said(model.caption(path))}\n" for path in GOOD)
    for arguments in (GOOD, ["pictures"], ["-"]):
        result = run("caption", *arguments, "--model", tiny, "--batch-size", 2, stdin="\n".join(GOOD).encode())
        assert (result.code, result.out) == (0, expected)


def test_a_folder_with_one_picture_still_gives_its_path(run, folder, tiny):
    assert run("caption", "pictures/inside", "-m", tiny).out.startswith("pictures/inside/c.webp\t")


def test_json_gives_an_object_a_line_with_the_text_as_it_is(run, folder, tiny, model):
    result = run("caption", *GOOD, "--model", tiny, "--json")
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert rows == [{"path": path, "caption": model.caption(path)} for path in GOOD]


def test_a_picture_through_standard_input(run, folder, tiny, model):
    result = run("caption", "-", "--model", tiny, stdin=(folder / GOOD[0]).read_bytes())
    assert result.out == said(model.caption(GOOD[0])) + "\n"


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_bad_pictures_are_listed_and_the_good_ones_answered_in_order(run, folder, tiny, batch_size):
    named = ["bad.png", GOOD[0], "nowhere.png", *GOOD[1:]]
    result = run("caption", *named, "--model", tiny, "--batch-size", batch_size)
    assert result.code == 1
    assert [line.split("\t")[0] for line in result.out.splitlines()] == GOOD
    assert [line for line in result.err.splitlines() if line.startswith("blip2:")] == [
        "blip2: bad.png is not a picture that can be read (JPEG, PNG, WEBP, GIF, BMP can).",
        "blip2: There is no file 'nowhere.png'.",
    ]
    rows = [json.loads(line) for line in run("caption", *named, "--model", tiny, "--json").out.splitlines()]
    assert [row["path"] for row in rows] == named
    assert ["error" in row for row in rows] == [True, False, True, False, False]


def test_where_all_pictures_are_bad_nothing_is_loaded_and_the_exit_code_is_2(run, folder):
    result = run("caption", "bad.png", "nowhere.png", "--model", "no-such-model")
    assert (result.code, result.out) == (2, "")
    assert len(result.err.splitlines()) == 2


def test_options_of_decoding_reach_the_model(run, folder, tiny, model):
    path = GOOD[0]
    result = run("caption", path, "-m", tiny, "--beams", 3, "--max-new-tokens", 5, "--prompt", "this is")
    assert result.out == said(model.caption(path, "this is", num_beams=3, max_new_tokens=5)) + "\n"


def test_captions_are_chosen_among_several(run, folder, tiny, model):
    result = run("caption", GOOD[0], "-m", tiny, "--best-of", 6)
    assert result.out == said(model.caption(GOOD[0], best_of=6)) + "\n"


def test_ask_answers_freely_or_from_a_list(run, folder, tiny, model):
    free = run("ask", GOOD[0], "what is this ?", "-m", tiny)
    assert free.out == said(model.ask(GOOD[0], "what is this ?")) + "\n"
    several = run("ask", *GOOD, "what is this ?", "-m", tiny).out.splitlines()
    assert several[0] == f"{GOOD[0]}\t{free.out.rstrip()}" and len(several) == len(GOOD)
    chosen = run("ask", GOOD[0], "which colour ?", "--answers", "red, blue,green", "-m", tiny)
    assert chosen.out.strip() == model.ask(GOOD[0], "which colour ?", ["red", "blue", "green"])
    rows = run("ask", "pictures", "which colour ?", "--answers", "red,blue", "--json", "-m", tiny).out.splitlines()
    first = json.loads(rows[0])
    assert len(rows) == 3 and list(first) == ["path", "question", "answer", "ranking"]
    assert sum(row["share"] for row in first["ranking"]) == pytest.approx(1, abs=1e-3)
    plain = json.loads(run("ask", GOOD[0], "what ?", "--json", "-m", tiny).out)
    assert plain == {"path": GOOD[0], "question": "what ?", "answer": model.ask(GOOD[0], "what ?")}


def test_match_puts_the_best_first_and_json_keeps_the_order(run, folder, tiny, model):
    texts = ["a red cup", "a blue star", "two"]
    matches = model.match(GOOD[0], texts)
    result = run("match", GOOD[0], *texts, "-m", tiny)
    best = sorted(matches, key=lambda match: -match.itm)
    assert result.out.splitlines() == [f"{row.text}\t{row.itc:.3f}\t{row.itm:.3f}" for row in best]
    record = json.loads(run("match", GOOD[0], *texts, "-m", tiny, "--json").out)
    assert record["path"] == GOOD[0]
    assert [row["text"] for row in record["matches"]] == texts
    assert record["matches"][0]["itm"] == pytest.approx(matches[0].itm, abs=1e-4)


def test_match_takes_one_picture(run, folder, tiny):
    result = run("match", "pictures", "a cup", "-m", tiny)
    assert (result.code, result.err) == (2, "blip2: pictures names 3 pictures; match takes one.\n")


def test_embed_writes_pictures_and_texts(run, folder, tiny, model):
    result = run("embed", "pictures", "a red cup", "two", "--out", "vectors.npz", "-m", tiny)
    assert result.code == 0
    with np.load("vectors.npz") as file:
        assert file["image_paths"].tolist() == GOOD and file["texts"].tolist() == ["a red cup", "two"]
        assert np.allclose(file["image_embeds"], model.embed_images(GOOD), atol=1e-5)
        assert np.allclose(file["text_embeds"], model.embed_texts(["a red cup", "two"]), atol=1e-5)


def test_embed_lists_bad_pictures_and_takes_no_misspelt_file_for_a_text(run, folder, tiny):
    for pattern in ("pictures/in*/c*", "pictures/inside/?.we*"):
        assert run("embed", pattern, "a cup?", "--out", "vectors.npz", "-m", tiny, "-q").code == 0
        with np.load("vectors.npz") as file:
            assert len(file["image_paths"]) == 1 and list(file["texts"]) == ["a cup?"]
    result = run("embed", "pictuers/a", "--out", "vectors.npz", "-m", tiny)
    assert result.code == 2 and "There is no file 'pictuers/a'" in result.err
    result = run("embed", GOOD[0], "pictures/d.png", "--out", "vectors.npz", "-m", tiny)
    assert result.code == 1 and "There is no file 'pictures/d.png'" in result.err
    with np.load("vectors.npz") as file:
        assert file["image_paths"].tolist() == GOOD[:1] and "texts" not in file


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("vectors.csv", "does not end in .npz"),
        ("nowhere/vectors.npz", "The folder of nowhere/vectors.npz does not exist"),
    ],
)
def test_embed_refuses_a_place_it_cannot_write_before_it_works(run, folder, out, message):
    result = run("embed", GOOD[0], "--out", out)
    assert result.code == 2 and message in result.err


def test_embed_leaves_nothing_half_written(run, folder, tiny, monkeypatch):
    def fail(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    result = run("embed", "a cup", "--out", "vectors.npz", "-m", tiny)
    assert result.code == 2 and result.err.splitlines()[-1].endswith(": No space left on device")
    assert not [path.name for path in folder.iterdir() if "vectors" in path.name]


def test_info_lists_models_and_tells_of_one(run, folder, tiny, monkeypatch):
    monkeypatch.setenv("BLIP2_HOME", str(folder / "home"))
    result = run("info", "--model", tiny)
    assert result.code == 0 and result.out.startswith("tiny\n") and "4 queries, 32 px" in result.out
    record = json.loads(run("info", "--model", tiny, "--json").out)
    assert set(record["trained"]) == {"stage1", "generation"}
    assert record["trained"]["stage1"]["parameters"] == sum(
        parameter.numel()
        for name, parameter in blip2.load(tiny).retriever.model.named_parameters()
        if name != "embeddings.word_embeddings.weight"
    )
    assert record["frozen"]["text start"]["name"].endswith("text")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["caption", "pictures/a.png", "--model", "no-such-model"], "No model is called 'no-such-model'"),
        (["caption", "pictures/a.png", "--model", "pictures"], "pictures is no model folder: it has no blip2.json"),
        (["caption", "pictures/a.png", "-m", "TINY", "--top-p", "0.5"], "top_p has no effect without sampling"),
        (["caption", "pictures/a.png", "-m", "TINY", "--device", "tpu"], "There is no device 'tpu' here"),
        (["ask", "pictures/a.png", " ", "-m", "TINY"], "The question is empty"),
        (["ask", "pictures/a.png"], "Name a picture and ask something about it"),
        (["ask"], "Name a picture and ask something about it"),
        (["ask", "pictures/a.png", "pictures/inside/c.webp"], "The question comes last, and pictures/inside/c.webp"),
        (["match", "pictures/a.png", "a cup", " "], "One of the texts is empty"),
        (["ask", "pictures/a.png", "what ?", "--answers", "a,,b", "-m", "TINY"], "holds an empty answer"),
        (["ask", "pictures/a.png", "what ?", "--answers", "a", "--beams", "2"], "--answers chooses from a list"),
        (["match", "nowhere.png", "a"], "There is no file 'nowhere.png'"),
        (["info", "--model", "no-such-model"], "No model is called"),
        (["caption", "-", "-m", "TINY"], "Standard input is empty"),
        (["chat", "bad.png", "-m", "TINY"], "bad.png is not a picture"),
    ],
)
def test_mistakes_are_one_clear_line_and_exit_code_2(run, folder, tiny, arguments, message):
    result = run(*[tiny if argument == "TINY" else argument for argument in arguments])
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("blip2: ") and message in result.err
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize("typed", ["caption", "capton a.png", "caption a.png --beam 3", "embed a"])
def test_wrong_usage_leaves_with_exit_code_2(run, typed):
    assert run(*typed.split()).code == 2


def test_what_the_model_looked_at_is_drawn_over_the_picture(run, folder, tiny):
    result = run("ask", "pictures/a.png", "what ?", "--attention", "seen.png", "--model", tiny, "--quiet")
    assert result.code == 0 and result.out
    with Image.open("seen.png") as drawn, Image.open("pictures/a.png") as picture:
        assert drawn.size == picture.size and len(drawn.getcolors(10**6)) > 2
    result = run("ask", "pictures", "what ?", "--attention", "seen.png", "--model", tiny)
    assert result.code == 2 and "one picture" in result.err
