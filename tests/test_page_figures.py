"""No figure without its script: what the pages say was measured names the command, and sizes are those of the files."""

import re
from pathlib import Path

import pytest
import torch

from sam2sgp.networks import SAM2SGP
from tests.helpers.doc_commands import FENCED, PAGES, ROOT, text_of

# Pages of which every section is about what was measured, and sections of others that are.
MEASURED = {
    "docs/results.md": None,
    "docs/speed.md": None,
    "docs/adaptation.md": None,
    "README.md": ["What to expect"],
    "bundle/docs/README.md": ["Performance"],
    "apps/sam2sgp/README.md": ["The review page", "Training", "Which image next", "When something goes wrong", "Speed"],
    "docs/install.md": ["How long it takes"],
    "docs/security.md": ["Files", "Decisions"],
    "docs/federated.md": ["What is exchanged"],
}
# Dice and its like with three digits, and numbers with a unit of time, memory or share; in words, not in code.
FIGURE = re.compile(r"(?<![\w.])(?:[+−-]?0\.\d{2,}|\d+(?:[.,]\d+)* (?:s|ms|minutes|GB|MB|MiB|%)(?!\w))")
# A benchmark, or a test that compares the page with what it counts.
SCRIPT = re.compile(r"(?:benchmarks|tests)/\w+\.py")
# A command that stands in a part of the page before, or on the page of results.
AGAIN = re.compile(r"\bsame command\b|\bfirst table's command\b|\bcommand of \[")
ON_RESULTS = re.compile(r"\]\([\w./]*results\.md(#[\w-]+)?\)")
# Measured without a script of its own.
BY_HAND = {"docs/install.md": "`sam2sgp segment` of"}
DATE = re.compile(r"\b20\d\d-\d\d-\d\d\b")


def sections(page: Path) -> list[tuple[str, str]]:
    """(heading, text) of a page's sections, without blocks of code."""
    _, *found = re.split(r"^#+ (.+)$", FENCED.sub("", text_of(page)), flags=re.MULTILINE)
    return list(zip(found[::2], found[1::2], strict=True))


def parts(section: str) -> list[str]:
    """A section's tables, each with the paragraph before it and those behind it up to the next one's; or all."""
    paragraphs = [paragraph for paragraph in section.split("\n\n") if paragraph.strip()]
    tables = [place for place, paragraph in enumerate(paragraphs) if paragraph.lstrip().startswith("|")]
    starts = [0, *(place - 1 for place in tables[1:] if place)]
    ends = [*starts[1:], len(paragraphs)]
    return ["\n\n".join(paragraphs[start:end]) for start, end in zip(starts, ends, strict=True)]


def figures(text: str) -> list[str]:
    """Those outside of code and links."""
    return FIGURE.findall(re.sub(r"`[^`]*`|\]\([^)]*\)", "", text))


def measured() -> list[tuple[str, str, str]]:
    """(page, heading, text) of each part with a figure, of the pages and sections above."""
    found = []
    for name, headings in MEASURED.items():
        of_page = sections(ROOT / name)
        assert headings is None or set(headings) <= {heading for heading, _ in of_page}, name
        for heading, section in of_page:
            if headings is None or heading in headings:
                found += [(name, heading, part) for part in parts(section) if figures(part)]
    return found


@pytest.mark.parametrize(
    ("page", "heading", "part"),
    [pytest.param(*part, id=f"{part[0]}: {part[1]} {number}") for number, part in enumerate(measured())],
)
def test_what_was_measured_names_its_script_and_the_date(page, heading, part):
    told = f"{page}, {heading}: {', '.join(figures(part)[:5])} …"
    has_link = page == "README.md" and ON_RESULTS.search(part)
    has_command = SCRIPT.search(part) or AGAIN.search(part) or BY_HAND.get(page, "\0") in part
    assert has_command or has_link, f"{told}: name the script of benchmarks/, or the test, that gives them"
    assert DATE.search(part) or has_link, f"{told}: say when"


def test_a_part_without_a_script_is_found():
    assert len(measured()) > 20
    table = "| a | b |\n| --- | --- |\n| x | 0.812 |\n\n"
    first, second = parts(f"Dice, K = 16:\n\n{table}By `benchmarks/fewshot.py`.\n\nAgain:\n\n{table}")
    assert SCRIPT.search(first) and figures(first) == ["0.812"]
    assert second.startswith("Again:") and not SCRIPT.search(second)
    assert figures("It took 5.7 s and 3 GB, with `--k 0.555`, at 0.85.") == ["5.7 s", "3 GB", "0.85"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_script_that_is_named_exists(page):
    text = page.read_text()
    named = set(SCRIPT.findall(text))
    gone = {name for name in named if re.search(rf"{re.escape(name)}[^`]*`\s+at\s+commit\s+[0-9a-f]{{7,}}", text)}
    assert [name for name in named - gone if not (ROOT / name).is_file()] == []


@torch.inference_mode()
def test_sizes_of_networks_and_support_items_are_those_that_the_pages_tell():
    names = ("README.md", "docs/weights.md", "docs/running.md", "bundle/docs/README.md")
    readme, weights, running, card = ((ROOT / name).read_text() for name in names)
    lite = SAM2SGP("lite", 256).eval()
    count = f"({sum(each.numel() for each in lite.parameters()) / 1e6:.1f} million parameters"
    assert count in weights and count in card
    for network, size, told in ((lite, 256, "with `lite` at 256 px"), (SAM2SGP("tiny", 512).eval(), 512, "at 512 px")):
        features = network.encode(torch.rand(1, 3, size, size))
        tokens = network.encode_support(features, torch.ones(1, 1, size, size)).tokens
        assert f"{tokens.nbytes // 1024} KiB {told}" in readme
        if network is lite:
            assert f"{network.retrieval_embedding(features).nbytes // 1024} KB per item with `lite`" in running
    sizes = [size.replace(",", "") for size in re.findall(r"^\| `sam2\.1_\w+\.pt` \| ([\d,]+) \|", weights, re.M)]
    assert len(sizes) == 4 and f"all four ({sum(map(int, sizes)) / 1e9:.1f} GB)" in weights
