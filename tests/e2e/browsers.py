"""The system's Chromium, driven by Playwright."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from tests.e2e.programs import program

# Nothing of the browser's own may try to reach the internet.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# A busy machine takes its time.
PATIENCE_MS = 60_000
# Kept by CI; git ignores it.
SCREENSHOTS = Path(__file__).parents[2] / "out" / "screenshots"


@contextmanager
def page(width: int = 1280, height: int = 900, **options) -> Iterator[Page]:
    """A page of a new browser. `options`: of Playwright's `new_page`, such as `http_credentials`."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program("chromium", "chromium"), args=ARGUMENTS)
        try:
            opened = browser.new_page(viewport={"width": width, "height": height}, **options)
            opened.set_default_timeout(PATIENCE_MS)
            expect.set_options(timeout=PATIENCE_MS)
            yield opened
        finally:
            browser.close()


def keep(opened: Page, name: str) -> Path:
    """Save a screenshot for people."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    path = SCREENSHOTS / f"{name}.png"
    opened.screenshot(path=path)
    return path
