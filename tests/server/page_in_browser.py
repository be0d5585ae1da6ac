"""The page opened in a real browser, and the steps that its tests share.

Needs playwright and a Chromium of the system's; where one is missing, whoever imports this is skipped and says so.
"""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium is installed here", allow_module_level=True)

expect = sync_api.expect
ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "examples" / "pictures"
ANSWER_MS = 60_000  # the mini model on a busy machine of two cores
CHAT = "**/v1/chat/completions"

# Asks for long answers, so that a test can act while one is being written: the mini model says a word or two.
LONG_ANSWERS = """
const send = window.fetch;
window.fetch = (address, request) => {
  if (!String(request?.body).includes('"stream":true')) return send(address, request);
  const body = { ...JSON.parse(request.body), min_tokens: 150, max_tokens: 150 };
  return send(address, { ...request, body: JSON.stringify(body) });
};
"""

Open = Callable[..., Any]


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser, for as many pages as wanted."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def watched_pages(browser: Any, server_url: str) -> Iterator[Open]:
    """Gives what opens the page, each time as a browser that knows nothing of earlier ones.

    At the end nothing must have been asked of another host, and the console must have stayed silent but for
    `refusals`, statuses that the test provokes itself.
    """
    contexts, complaints, foreign = [], [], []

    def open_it(
        width: int = 1280, height: int = 800, long: bool = False, refusals: tuple[int, ...] = (), **options: Any
    ):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        if long:
            context.add_init_script(LONG_ANSWERS)
        page = context.new_page()
        page.set_default_timeout(15_000)

        def heard(message: Any) -> None:
            provoked = any(f"status of {status}" in message.text for status in refusals)
            if message.type in ("error", "warning") and not provoked:
                complaints.append(message.text)

        def asked(request: Any) -> None:
            if not request.url.startswith((server_url.rstrip("/") + "/", "data:", f"blob:{server_url.rstrip('/')}/")):
                foreign.append(request.url)

        page.on("console", heard)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", asked)
        page.goto(server_url)
        expect(page.locator("#guide h2")).to_be_visible()
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert complaints == []
    assert foreign == []


def choose_example(page: Any, at: int = 0) -> None:
    page.locator(".example").nth(at).click()
    expect(page.locator("#picture")).to_be_visible()


def ask(page: Any, question: str) -> None:
    page.locator("#question").fill(question)
    page.keyboard.press("Enter")


def answered(page: Any, count: int = 1) -> Any:
    """The turn that was answered as the `count`th, once it is."""
    turn = page.locator(".turn").nth(count - 1)
    expect(turn).to_have_attribute("data-state", "done", timeout=ANSWER_MS)
    return turn


def picture_bytes(size: tuple[int, int], kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(out, kind, **options)
    return out.getvalue()


def upload(page: Any, name: str, content: bytes, kind: str = "image/png") -> None:
    page.locator("#file").set_input_files([{"name": name, "mimeType": kind, "buffer": content}])


def sent_messages(request: Any) -> list[dict[str, Any]]:
    return json.loads(request.post_data)["messages"]


def parts(message: dict[str, Any]) -> list[str]:
    return [part["type"] for part in message["content"]]
