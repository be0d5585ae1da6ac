"""`blip2 chat` through a pipe: questions in, answers out, commands obeyed."""

import json

import blip2


def spoken(text):
    return "".join(character if character.isprintable() else " " for character in text)


def chat(run, tiny, text, *arguments):
    result = run("chat", *arguments, "--model", tiny, "--max-new-tokens", 8, stdin=text.encode())
    return result.code, result.out.splitlines(), result.err


def test_each_question_is_answered_on_a_line_and_remembered(run, folder, tiny):
    questions = ["what is this ?", "which colour ?", "how many ?"]
    conversation = blip2.load(tiny).chat("pictures/a.png")
    expected = [spoken(conversation.ask(question, max_new_tokens=8)) for question in questions]
    assert chat(run, tiny, "\n".join(questions), "pictures/a.png") == (0, expected, "")


def test_commands_change_the_picture_forget_and_leave(run, folder, tiny):
    model = blip2.load(tiny)
    first, second = (
        spoken(model.ask(f"pictures/{name}", "what ?", max_new_tokens=8)) for name in ("a.png", "inside/c.webp")
    )
    text = "/image pictures/a.png\nwhat ?\n/reset\nwhat ?\n/image 'pictures/inside/c.webp'\nwhat ?\n/quit\nwhat ?\n"
    assert chat(run, tiny, text) == (0, [first, first, second], "")


def test_mistakes_are_told_and_the_dialogue_goes_on(run, folder, tiny):
    text = "what ?\n/reset\n/image nowhere.png\n/dance\n/image pictures/a.png\nwhat ?\n"
    code, out, err = chat(run, tiny, text)
    assert code == 1 and len(out) == 1
    messages = err.splitlines()
    assert messages[0] == messages[1] == "blip2: There is no picture yet. Show one: /image PATH"
    assert messages[2] == "blip2: There is no file 'nowhere.png'."
    assert messages[3].startswith("blip2: There is no command /dance.")


def test_a_picture_that_cannot_be_shown_leaves_the_old_one(run, folder, tiny):
    _, out, _ = chat(run, tiny, "what ?\n/reset\n/image bad.png\nwhat ?\n", "pictures/a.png")
    assert len(out) == 2 and out[0] == out[1]


def test_a_dialogue_is_saved_as_json_and_as_markdown_and_no_file_is_overwritten(run, folder, tiny):
    text = "what ?\n/save said.json\n/save said.md\n/save said.md\n/save\n/save no-such-folder/said.md\n"
    code, (answer,), err = chat(run, tiny, text, "pictures/a.png")
    assert code == 1 and err.count("blip2: ") == 3 and "Saved 1 turns to said.json." in err
    saved = json.loads((folder / "said.json").read_text(encoding="utf-8"))
    assert saved["image"] == "pictures/a.png" and spoken(saved["turns"][0]["answer"]) == answer
    assert saved["turns"][0]["question"] == "what ?"
    assert "**what ?**" in (folder / "said.md").read_text(encoding="utf-8")
