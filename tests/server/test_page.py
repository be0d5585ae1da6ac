"""What the page does, in a real browser: `server_url` is a running server's address, the mini model answers."""

import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from .page_in_browser import (
    ANSWER_MS,
    CHAT,
    PICTURES,
    Open,
    answered,
    ask,
    choose_example,
    chromium,
    expect,
    parts,
    picture_bytes,
    sent_messages,
    upload,
    watched_pages,
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_page(browser: Any, server_url: str) -> Iterator[Open]:
    with watched_pages(browser, server_url) as open_page:
        yield open_page


def test_the_page_opens_and_guides_a_newcomer(open_page: Open):
    page = open_page()
    expect(page.get_by_role("button", name="Choose a picture")).to_be_visible()
    expect(page.locator(".example").first).to_be_visible()
    ask(page, "What is it?")
    expect(page.get_by_role("alert")).to_contain_text("Show it a picture first")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["choose", "drop", "paste"])
def test_a_picture_comes_by_choosing_dropping_or_pasting(open_page: Open, way: str):
    page = open_page()
    content = (PICTURES / "photo-cat.jpg").read_bytes()
    if way == "choose":
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Choose a picture").click()
        chooser.value.set_files(PICTURES / "photo-cat.jpg")
    else:
        page.evaluate(
            """([way, content]) => {
              const transfer = new DataTransfer();
              const bytes = Uint8Array.from(atob(content), (one) => one.charCodeAt(0));
              transfer.items.add(new File([bytes], "photo-cat.jpg", { type: "image/jpeg" }));
              const how = { bubbles: true, cancelable: true };
              document.body.dispatchEvent(way === "drop"
                ? new DragEvent("drop", { ...how, dataTransfer: transfer })
                : new ClipboardEvent("paste", { ...how, clipboardData: transfer }));
            }""",
            [way, base64.b64encode(content).decode()],
        )
    expect(page.locator("#picture-name")).to_have_text("photo-cat.jpg")
    expect(page.locator("#picture-facts")).to_have_text("451 × 300")
    expect(page.locator("#question")).to_be_focused()


@pytest.mark.slow
def test_what_is_no_picture_is_refused_in_plain_words(open_page: Open):
    page = open_page()
    upload(page, "notes.txt", b"no picture", "text/plain")
    expect(page.get_by_role("alert")).to_contain_text("notes.txt cannot be opened as a picture")


@pytest.mark.slow
def test_a_large_picture_is_sent_small_and_upright(open_page: Open):
    page = open_page()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    upload(page, "phone.jpg", picture_bytes((3000, 1500), "JPEG", exif=exif), "image/jpeg")
    expect(page.locator("#picture-facts")).to_have_text("512 × 1024")
    with page.expect_request(CHAT) as request:
        ask(page, "What is it?")
    url = sent_messages(request.value)[-1]["content"][0]["image_url"]["url"]
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as sent:
        assert sent.size == (512, 1024)
        assert sent.getexif().get(0x0112, 1) == 1
    answered(page)


@pytest.mark.slow
def test_an_answer_streams_stops_and_the_conversation_goes_on(open_page: Open):
    page = open_page(long=True)
    choose_example(page)
    ask(page, "What is in the picture?")
    turn = page.locator(".turn").first
    expect(turn).to_have_attribute("data-state", "waiting")
    expect(turn).to_have_attribute("data-state", "streaming", timeout=ANSWER_MS)
    # a screen reader hears the whole answer once, not every piece
    expect(turn.locator(".answer")).to_have_attribute("aria-hidden", "true")
    page.keyboard.press("Escape")
    expect(turn).to_have_attribute("data-state", "stopped")
    expect(turn).to_contain_text("Stopped.")
    ask(page, "Is there a cat?")
    second = answered(page, 2)
    expect(second.locator(".answer")).to_have_text(re.compile(r"\w"))
    assert second.locator(".answer").get_attribute("aria-hidden") is None


@pytest.mark.slow
def test_the_stop_button_stops_and_the_turn_can_be_tried_again(open_page: Open):
    page = open_page(long=True)
    choose_example(page)
    ask(page, "What is in the picture?")
    page.get_by_role("button", name="Stop").click()
    turn = page.locator(".turn").first
    expect(turn).to_have_attribute("data-state", "stopped")
    turn.get_by_role("button", name="Try again").click()
    answered(page)


@pytest.mark.slow
def test_beginning_anew_ends_what_is_being_answered(open_page: Open):
    page = open_page(long=True)
    choose_example(page)
    ask(page, "What is in the picture?")
    page.get_by_role("button", name="New conversation").click()
    expect(page.get_by_role("button", name="Ask")).to_be_visible()
    expect(page.locator(".turn")).to_have_count(0)
    page.get_by_role("button", name="Conversations").click()
    page.locator(".conversation-open").click()
    expect(page.locator(".turn")).to_have_attribute("data-state", "stopped")


@pytest.mark.slow
def test_the_oldest_turns_are_left_out_where_the_server_takes_no_more_and_the_page_says_so(open_page: Open):
    page = open_page()

    def takes_little(route: Any) -> None:
        info = route.fetch().json()
        route.fulfill(json={**info, "limits": {**info["limits"], "messages": 3}})

    page.route("**/page.json", takes_little)
    page.reload()
    choose_example(page)
    for at in (1, 2):
        ask(page, "Is there a cat?")
        answered(page, at)
    with page.expect_request(CHAT) as request:
        ask(page, "What colour is it?")
    sent = sent_messages(request.value)
    assert [one["role"] for one in sent] == ["user", "assistant", "user"]
    assert parts(sent[0]) == ["image_url", "text"]  # the picture goes with the first turn that is left
    expect(answered(page, 3).locator(".note")).to_contain_text("The oldest question was left out")


@pytest.mark.slow
def test_settings_are_sent_and_outlive_a_reload(open_page: Open):
    page = open_page()
    choose_example(page)
    page.get_by_text("Advanced").click()
    page.get_by_label("System line").fill("Answer in one word.")
    page.get_by_label("Longest answer").fill("7")
    page.get_by_label("Temperature").fill("0.5")
    page.reload()
    expect(page.locator("#picture")).to_be_visible()
    with page.expect_request(CHAT) as request:
        ask(page, "Is there a cat?")
    body = json.loads(request.value.post_data)
    assert body["messages"][0] == {"role": "system", "content": "Answer in one word."}
    assert (body["max_tokens"], body["temperature"], body["stream"]) == (7, 0.5, True)
    answered(page)


@pytest.mark.slow
def test_a_picture_is_sent_once_and_another_in_its_own_turn(open_page: Open):
    page = open_page()
    choose_example(page)
    ask(page, "What is in the picture?")
    answered(page)
    with page.expect_request(CHAT) as request:
        ask(page, "What colour is it?")
    assert [parts(one) for one in sent_messages(request.value)[::2]] == [["image_url", "text"], ["text"]]
    answered(page, 2)
    page.locator("#file").set_input_files(PICTURES / "llama-and-castle.webp")
    expect(page.locator("#picture-name")).to_have_text("llama-and-castle.webp")
    with page.expect_request(CHAT) as request:
        ask(page, "What is to the left of the castle?")
    sent = sent_messages(request.value)
    assert [one["role"] for one in sent] == ["user", "assistant", "user", "assistant", "user"]
    assert [parts(one) for one in sent[::2]] == [["image_url", "text"], ["text"], ["image_url", "text"]]
    third = answered(page, 3)
    # each question shows its picture, and brings it back
    page.locator(".turn").first.get_by_role("button", name="About photo-cat.jpg").click()
    expect(page.locator("#picture-name")).to_have_text("photo-cat.jpg")
    expect(page.locator("#picture-facts")).to_contain_text("questions are about llama-and-castle.webp")
    third.get_by_role("button", name="About llama-and-castle.webp").click()
    expect(page.locator("#picture-name")).to_have_text("llama-and-castle.webp")


@pytest.mark.slow
def test_captions_and_alt_texts_are_asked_for_by_the_picture_alone(open_page: Open):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    choose_example(page)
    for at, name in enumerate(("Caption", "Alt text"), start=1):
        with page.expect_request(CHAT) as request:
            page.get_by_role("button", name=name, exact=True).click()
        body = json.loads(request.value.post_data)
        assert [parts(one) for one in body["messages"]] == [["image_url"]]
        assert not body.get("stream")
        answered(page, at)
    alt = page.locator(".turn").nth(1)
    text = alt.locator(".answer").inner_text()
    assert re.fullmatch(r"[^a-z].{0,123}[.!?…]", text)
    alt.get_by_role("button", name="Copy", exact=True).click()
    assert page.evaluate("navigator.clipboard.readText()") == text
    alt.get_by_role("button", name="Copy as alt").click()
    assert page.evaluate("navigator.clipboard.readText()").startswith('alt="')


@pytest.mark.slow
def test_an_alt_text_is_cut_at_a_word_and_escaped_as_an_attribute(open_page: Open):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    caption = 'a "sign" & a <b>cat</b> ' + "very " * 40 + "big"
    message = {"role": "assistant", "content": caption}
    answer = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    page.route(CHAT, lambda route: route.fulfill(json=answer))
    choose_example(page)
    page.get_by_role("button", name="Alt text").click()
    turn = answered(page)
    text = turn.locator(".answer").inner_text()
    assert text.startswith('A "sign" & a <b>cat</b> very') and text.endswith(" very.") and len(text) <= 125
    turn.get_by_role("button", name="Copy as alt").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith('alt="A &quot;sign&quot; &amp; a &lt;b&gt;cat&lt;/b&gt; very')


@pytest.mark.slow
def test_what_it_looked_at_shows_average_query_and_word(open_page: Open):
    page = open_page()
    choose_example(page)
    ask(page, "What is in the picture?")
    turn = answered(page)
    with page.expect_request("**/v1/attention") as request:
        turn.get_by_role("button", name="What it looked at").click()
    body = json.loads(request.value.post_data)
    assert body["answer"].strip() == turn.locator(".answer").inner_text() and not body["by_word"]
    heat, said = page.locator("#heat"), page.locator("#attention-said")
    expect(said).to_contain_text("On average it looked mostly", timeout=ANSWER_MS)
    expect(heat).to_be_visible()
    average = heat.evaluate("canvas => canvas.toDataURL()")
    page.get_by_label("By query").check()
    page.get_by_label("Query", exact=True).select_option(index=3)
    expect(said).to_contain_text("Query 4 of")
    assert heat.evaluate("canvas => canvas.toDataURL()") != average
    page.get_by_label("By word").check()
    words = page.locator("#words button")
    expect(words.first).to_have_attribute("aria-pressed", "true", timeout=ANSWER_MS)
    assert "".join(words.all_inner_texts()) == re.sub(r"\s", "", body["answer"])
    words.last.click()
    expect(said).to_contain_text(words.last.inner_text())
    page.get_by_label("Opacity").fill("20")
    assert heat.evaluate("canvas => canvas.style.opacity") == "0.2"
    page.get_by_role("button", name="Close").click()
    expect(heat).to_be_hidden()
    expect(turn.get_by_role("button", name="What it looked at")).to_be_focused()


@pytest.mark.slow
def test_conversations_outlive_a_reload_and_can_be_switched_renamed_and_deleted(open_page: Open):
    page = open_page()
    choose_example(page)
    ask(page, "Is there a cat?")
    answer = answered(page).locator(".answer").inner_text()
    page.reload()
    expect(page.locator(".turn .answer")).to_have_text(answer)
    assert page.locator("#picture").evaluate("image => image.decode().then(() => image.naturalWidth)") == 451

    page.get_by_role("button", name="New conversation").click()
    expect(page.get_by_role("button", name="Choose a picture")).to_be_focused()
    choose_example(page, 1)
    page.get_by_role("button", name="Conversations").click()
    listed = page.locator(".conversation-open")
    expect(listed).to_have_count(2)
    page.get_by_role("button", name="Rename Is there a cat?").click()
    page.get_by_label("New name").fill("The <i>cat</i>")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="The <i>cat</i>", exact=False).first.click()
    expect(page.locator("#title")).to_have_text("The <i>cat</i>")
    expect(page.locator(".turn .answer")).to_have_text(answer)

    page.get_by_role("button", name="Conversations").click()
    page.get_by_role("button", name="Delete The <i>cat</i>").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(listed).to_have_count(1)
    page.keyboard.press("Escape")
    page.reload()
    expect(page.get_by_role("button", name="Choose a picture")).to_be_visible()


@pytest.mark.slow
def test_markup_in_file_names_and_answers_shows_as_text(open_page: Open):
    page = open_page()
    name = "<img src=x onerror=alert(1)>.png"
    upload(page, name, picture_bytes((64, 48), "PNG"))
    expect(page.locator("#picture-name")).to_have_text(name)
    script = "<script>alert(1)</script><b>bold</b>"
    chunk = {"choices": [{"index": 0, "delta": {"content": script}, "finish_reason": "stop"}]}
    stream = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    page.route(CHAT, lambda route: route.fulfill(body=stream, content_type="text/event-stream"))
    ask(page, script)
    turn = answered(page)
    expect(turn.locator(".answer")).to_have_text(script)
    expect(turn.locator(".question")).to_have_text(script)
    page.get_by_role("button", name="Conversations").click()
    expect(page.locator(".conversation-title").first).to_contain_text(script)
    assert page.locator(".turn b, .turn script, .label img, .conversation-list b").count() == 0


@pytest.mark.slow
def test_a_conversation_is_exported_as_json_and_as_markdown(open_page: Open):
    page = open_page()
    choose_example(page)
    ask(page, "Is there a cat?")
    answer = answered(page).locator(".answer").inner_text()
    with page.expect_download() as download:
        page.get_by_role("button", name="JSON").click()
    assert download.value.suggested_filename == "Is-there-a-cat.json"
    content = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert content["turns"][0]["question"] == "Is there a cat?"
    assert content["turns"][0]["answer"].strip() == answer
    assert content["pictures"][0]["data"].startswith("data:image/jpeg;base64,")
    with page.expect_download() as download:
        page.get_by_role("button", name="Markdown").click()
    text = Path(download.value.path()).read_text(encoding="utf-8")
    assert text.startswith("# Is there a cat?\n") and "photo-cat.jpg" in text


@pytest.mark.slow
def test_a_refusal_stands_beside_its_turn_and_says_how_long_to_wait(open_page: Open):
    page = open_page(refusals=(429,))
    choose_example(page)
    error = {
        "error": {"message": "Too many questions at once.", "type": "rate_limit_error", "param": None, "code": None}
    }
    page.route(CHAT, lambda route: route.fulfill(status=429, headers={"Retry-After": "12"}, json=error))
    ask(page, "Is there a cat?")
    turn = page.locator(".turn").first
    expect(turn.locator(".error")).to_have_text("Too many questions at once. Try again in 12 seconds.")
    page.unroute(CHAT)
    turn.get_by_role("button", name="Try again").click()
    answered(page)
    expect(turn.locator(".error")).to_have_count(0)


@pytest.mark.slow
def test_an_error_in_mid_stream_keeps_what_was_written_and_tells(open_page: Open):
    page = open_page()
    choose_example(page)
    chunk = {"choices": [{"index": 0, "delta": {"content": "A grey"}, "finish_reason": None}]}
    error = {"error": {"message": "The model ran out of memory. Ask something shorter."}}
    stream = f"data: {json.dumps(chunk)}\n\ndata: {json.dumps(error)}\n\n"
    page.route(CHAT, lambda route: route.fulfill(body=stream, content_type="text/event-stream"))
    ask(page, "Is there a cat?")
    turn = page.locator(".turn").first
    expect(turn.locator(".error")).to_have_text(error["error"]["message"])
    expect(turn.locator(".answer")).to_have_text("A grey")


@pytest.mark.slow
def test_a_key_is_asked_for_once_and_again_where_it_is_refused(open_page: Open):
    page = open_page(refusals=(401,))

    def needs_key(route: Any) -> None:
        route.fulfill(json={**route.fetch().json(), "needs_key": True})

    def guarded(route: Any) -> None:
        if route.request.headers.get("authorization") == "Bearer right":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": {"message": "A key is needed."}})

    page.route("**/page.json", needs_key)
    page.route(CHAT, guarded)
    page.reload()
    field = page.get_by_label("Key", exact=True)
    assert field.get_attribute("type") == "password"
    field.fill("wrong")
    page.keyboard.press("Enter")
    choose_example(page)
    ask(page, "Is there a cat?")
    expect(page.locator("#key-reason")).to_contain_text("not the right one")
    field.fill("right")
    page.keyboard.press("Enter")
    answered(page)
    assert page.evaluate("JSON.stringify(localStorage)").find("right") == -1
    page.reload()
    expect(page.locator(".turn .answer")).to_be_visible()
    expect(page.locator("#key-dialog")).to_be_hidden()
