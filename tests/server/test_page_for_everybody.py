"""The page for everybody: by keyboard, on a phone, in the dark, with a screen reader, without motion."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from .page_in_browser import (
    ANSWER_MS,
    ROOT,
    Open,
    answered,
    ask,
    choose_example,
    chromium,
    expect,
    picture_bytes,
    upload,
    watched_pages,
)

AXE = ROOT / "web" / "node_modules" / "axe-core" / "axe.min.js"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_page(browser: Any, server_url: str) -> Iterator[Open]:
    with watched_pages(browser, server_url) as open_page:
        yield open_page


@pytest.mark.slow
def test_everything_can_be_done_by_keyboard(open_page: Open):
    page = open_page(long=True)
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('example')"):
            break
    page.keyboard.press("Enter")
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.type("What is")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("in the picture?")
    assert page.locator("#question").input_value() == "What is\nin the picture?"
    page.keyboard.press("Enter")
    answered(page)
    expect(page.locator("#question")).to_be_focused()
    for _ in range(6):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.classList.contains('look')"):
            break
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"  # where the focus is can be seen
    page.keyboard.press("Enter")
    expect(page.locator("#attention-title")).to_be_focused()
    expect(page.locator("#heat")).to_be_visible(timeout=ANSWER_MS)
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_label("By query")).to_be_checked()
    page.keyboard.press("Escape")
    expect(page.locator("#heat")).to_be_hidden()


def visit_every_state(page: Any) -> Iterator[str]:
    """Leads the page through what it can show; yields the name of each state it is then in."""
    yield "empty"
    upload(page, "a-name-without-a-single-space-" * 6 + ".png", picture_bytes((320, 200), "PNG"))
    expect(page.locator(".suggestions")).to_be_visible()
    yield "picture"
    ask(page, "Is there a cat? " + "unbrokenword" * 12)
    turn = answered(page)
    page.get_by_text("Advanced").click()
    yield "answer and settings"
    page.get_by_text("Advanced").click()
    turn.get_by_role("button", name="What it looked at").click()
    page.get_by_label("By word").check()
    expect(page.locator("#words button").first).to_be_visible(timeout=ANSWER_MS)
    yield "what it looked at"
    page.get_by_role("button", name="Conversations").click()
    expect(page.locator(".conversation-open")).to_be_visible()
    page.wait_for_timeout(300)  # the list slides in; contrast is that of what stands still
    yield "list"


@pytest.mark.slow
def test_nothing_is_wider_than_a_phone(open_page: Open):
    page = open_page(width=375)
    wide = {name: page.evaluate("document.documentElement.scrollWidth") for name in visit_every_state(page)}
    assert {name: width for name, width in wide.items() if width > 375} == {}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_axe_finds_nothing_serious(open_page: Open, scheme: str, width: int):
    if not AXE.is_file():
        pytest.skip("axe-core is not installed: run npm ci in web/")
    page = open_page(width=width, color_scheme=scheme)
    found = []
    for name in visit_every_state(page):
        page.evaluate(AXE.read_text(encoding="utf-8"))
        violations = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")["violations"]
        found += [
            (name, one["id"], one["nodes"][0]["html"][:120])
            for one in violations
            if one["impact"] in ("serious", "critical")
        ]
    assert found == []


@pytest.mark.slow
def test_the_page_is_light_or_dark_as_the_system_is_and_still_where_it_shall_be(open_page: Open):
    grounds = {}
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme, reduced_motion="reduce", long=True)
        grounds[scheme] = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    levels = {scheme: sum(map(int, re.findall(r"\d+", ground)[:3])) for scheme, ground in grounds.items()}
    assert levels["light"] > 600 and levels["dark"] < 150
    choose_example(page)
    ask(page, "Is there a cat?")
    assert page.locator(".caret").evaluate("caret => getComputedStyle(caret).animationName") == "none"
    answered(page)
