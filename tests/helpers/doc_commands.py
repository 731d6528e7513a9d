"""The code that the pages of the documentation show: what is typed in a shell, and Python."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "apps/sam2sgp/README.md",
    ROOT / "bundle/docs/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
NOTEBOOK = ROOT / "docs/first_hour.ipynb"
FENCED = re.compile(r"^```(\w*)\n(.+?)^```$", re.MULTILINE | re.DOTALL)
# Code within a sentence that is no path, name, option or assignment.
LIKE_A_COMMAND = re.compile(r"(\w+=\S+ )*[a-z.][\w./-]* (?![=<>])")


def text_of(page: Path) -> str:
    """A page's text; of a notebook that between its cells of code."""
    if page.suffix == ".md":
        return page.read_text()
    cells = json.loads(page.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def blocks(page: Path, language: str = "") -> list[str]:
    """A page's blocks of code in a language; those without one are typed in a shell."""
    return [code for name, code in FENCED.findall(text_of(page)) if name == language]


def spans(page: Path) -> list[str]:
    """Code within a page's sentences, each in one line."""
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", FENCED.sub("", text_of(page)))]


def shell_lines(page: Path) -> list[str]:
    """What a page has typed in a shell or in a table of cron: lines of blocks, and code in sentences."""
    lines = [line for block in blocks(page) for line in block.splitlines()]
    lines += re.findall(r"^\n    (\S.*)$", FENCED.sub("", text_of(page)), re.MULTILINE)
    return [*filter(str.strip, lines), *filter(LIKE_A_COMMAND.match, spans(page))]
