"""Screenshots of the page with a running server: python web/screenshots.py http://127.0.0.1:8000 FOLDER"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

PICTURES = Path(__file__).parents[1] / "examples" / "pictures"
QUESTIONS = ("What is above the sunflower?", "How many things are there?", "What colour is the house?")


def main(url: str, folder: Path) -> None:
    """Empty, a conversation in both themes, what it looked at, and a phone."""
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, width, height, theme in (
            ("light", 1280, 800, "light"),
            ("dark", 1280, 800, "dark"),
            ("phone", 375, 760, "light"),
        ):
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
            page = context.new_page()
            page.goto(url)
            page.locator(".example").first.wait_for()
            page.screenshot(path=folder / f"empty-{name}.png")
            page.locator("#file").set_input_files(PICTURES / "sunflower-duck-house.webp")
            page.locator("#picture").wait_for()
            page.get_by_role("button", name="Caption").click()
            page.locator(".turn[data-state=done]").wait_for(timeout=60_000)
            for count, question in enumerate(QUESTIONS, start=2):
                page.locator("#question").fill(question)
                page.keyboard.press("Enter")
                page.locator(f".turn:nth-of-type({count})[data-state=done]").wait_for(timeout=60_000)
            page.screenshot(path=folder / f"chat-{name}.png")
            page.get_by_role("button", name="What it looked at").nth(1).click()
            page.wait_for_timeout(4000)
            page.screenshot(path=folder / f"attention-{name}.png")
            context.close()
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
