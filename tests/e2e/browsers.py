"""The system's Chromium, driven by Playwright."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

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
def browser() -> Iterator[Browser]:
    """A new browser, of which each new page has cookies and a cache of its own. One at a time in a process."""
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program("chromium", "chromium"), args=ARGUMENTS)
        try:
            expect.set_options(timeout=PATIENCE_MS)
            yield started
        finally:
            started.close()


@contextmanager
def page(width: int = 1280, height: int = 900, of: Browser | None = None, **options) -> Iterator[Page]:
    """A page of a browser, by default of a new one. `options`: of Playwright's `new_page`, as `http_credentials`."""
    with nullcontext(of) if of else browser() as started:
        opened = started.new_page(viewport={"width": width, "height": height}, **options)
        opened.set_default_timeout(PATIENCE_MS)
        yield opened
        opened.context.close()


def keep(opened: Page, name: str) -> Path:
    """Save a screenshot for people."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    path = SCREENSHOTS / f"{name}.png"
    opened.screenshot(path=path)
    return path
