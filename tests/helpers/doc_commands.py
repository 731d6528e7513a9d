"""The commands that the pages of the documentation show."""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "apps/sam2sgp/README.md",
    ROOT / "bundle/docs/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def commands(start: str, pages: Iterable[Path] = PAGES) -> list[list[str]]:
    """Commands of pages that begin so, whole lines of code or words within a sentence, without what is left out."""
    found = []
    for page in pages:
        text = page.read_text()
        lines = [line for block in re.findall(r"^```\w*\n(.+?)^```", text, re.M | re.S) for line in block.splitlines()]
        lines += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
        words = [shlex.split(line, comments=True) for line in lines if re.match(rf"(\w+=\S+ )?{start} ", line)]
        found += [command for command in words if "…" not in " ".join(command)]
    return found
