"""`make docs`: the pages become a site with no broken link, which needs no network, with a reference and a search."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.e2e.browsers import keep, page

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built by the recipe of the Makefile, into another folder."""
    folder = tmp_path_factory.mktemp("site")
    recipe = re.search(r"^docs:.*\n\t(.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    words = recipe[1].replace("$(VENV_PYTHON)", sys.executable).replace("out/site", str(folder / "html")).split()
    words[3:3] = ["--doctree-dir", str(folder / "read")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "html"


def test_the_site_loads_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for path in pages:
        html = path.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"([^\"]+)", html)
        loaded += re.findall(r"<link\b(?![^>]*rel=\"(?:canonical|author|license))[^>]*\bhref=\"([^\"]+)", html)
        assert not [address for address in loaded if re.match(r"(https?:)?//", address)], path
    for path in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", path.read_text(encoding="utf-8")), path


def test_the_site_is_read_and_searched_from_a_folder_without_a_network(site):
    with page() as found:
        problems, asked = [], []
        found.on("pageerror", lambda error: problems.append(str(error)))
        found.on("request", lambda request: asked.append(request.url))
        found.goto((site / "index.html").as_uri())
        found.wait_for_url("**/README.html")
        expect(found.locator("h1")).to_have_text(re.compile("SAM2-SGP for MONAI"))
        menu = found.locator(".sidebar-tree")
        menu.get_by_role("link", name="Reference", exact=True).click()
        expect(found.locator("dt[id='sam2sgp.segmenter.Segmenter.adapt']")).to_be_visible()
        keep(found, "site-reference")
        found.locator(".sidebar-search").fill("uncertainty entropy")
        found.keyboard.press("Enter")
        expect(found.locator("#search-results li a").first).to_be_visible()
        assert "docs/output.html" in "".join(
            found.locator("#search-results a").evaluate_all("all => all.map(a => a.href)")
        )
        assert problems == [] and all(url.startswith(("file:", "data:")) for url in asked)


@pytest.mark.parametrize("width", [400, 1280])
def test_no_page_of_the_site_is_wider_than_the_screen(site, width):
    with page(width) as found:
        for name in ("README", "docs/first_hour", "docs/settings", "docs/results", "docs/reference"):
            found.goto((site / f"{name}.html").as_uri())
            assert found.evaluate("document.documentElement.scrollWidth") <= width, name
            keep(found, f"site-{name.rpartition('/')[2]}-{width}")
