"""The pages say what is true of the configs and of the files they name."""

import ast
import hashlib
import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from sam2sgp import cli
from sam2sgp.evaluation import case_metrics
from tests.helpers.doc_commands import PAGES

ROOT = Path(__file__).parents[1]
SETTINGS = (ROOT / "docs" / "settings.md").read_text()


def test_settings_table_has_the_defaults_of_the_training_config():
    train = json.loads((ROOT / "bundle" / "configs" / "train.json").read_text())
    rows = re.findall(r"^\| (`[a-z_:]+`(?:, `[a-z_:]+`)*) \| ([^|]*) \|", SETTINGS, re.MULTILINE)
    checked = 0
    for names, default in rows:
        keys = re.findall(r"`([a-z_:]+)`", names)
        if not all(key.split("::")[0] in train for key in keys) or default.startswith("see "):
            continue
        quoted = re.sub("`([a-z0-9_]+)`", r'"\1"', default)
        values = ast.literal_eval(f"({quoted},)")
        for key, value in zip(keys, values, strict=True):
            setting = train
            for part in key.split("::"):
                setting = setting[part]
            assert setting == value, key
            checked += 1
    assert checked >= 25


def test_badges_say_what_the_package_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    badges = {name: (ROOT / f"docs/images/badge_{name}.svg").read_text() for name in ("python", "licence")}
    versions = [entry.rpartition(" ")[2] for entry in project["classifiers"] if "Python ::" in entry]
    assert f"python: {' | '.join(versions)}" in badges["python"]
    assert f"code: {project['license']}" in badges["licence"]
    shown = re.findall(r"!\[[^]]*\]\(docs/images/(badge_\w+)\.svg\)", (ROOT / "README.md").read_text())
    assert len(shown) == len(list((ROOT / "docs/images").glob("badge_*.svg"))) == 4


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text()
    assert lines.count("\n") <= 200 and len(lines.encode()) <= 13_000


def test_the_six_lines_of_the_readme_give_the_dice_of_the_command(phantoms, tmp_path, monkeypatch):
    lines = re.search(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert len([line for line in lines.splitlines() if line]) <= 6
    monkeypatch.chdir(tmp_path)
    Path("SUPPORT").symlink_to(phantoms / "support" / "rgb")
    Path("QUERIES").mkdir()
    queries = sorted((phantoms / "queries" / "rgb").glob("*.png"))[:3]
    for query in queries:
        Path("QUERIES", query.name).symlink_to(query)
    exec(lines, {})
    command = ["segment", "--support", "SUPPORT", "--queries", "QUERIES", "--output", "COMMAND", "--progress", "False"]
    result = CliRunner().invoke(cli.app, [*command, "--report_figures", "0"])
    assert result.exit_code == 0, (result.output, result.exception)
    for query in queries:
        truth, *found = (
            np.asarray(Image.open(folder / query.name))[None]
            for folder in (phantoms / "labelsTs", Path("OUT"), Path("COMMAND"))
        )
        first, second = (
            [row["dice"] for row in case_metrics(labels, truth, {1: "", 2: "", 3: ""})] for labels in found
        )
        assert np.array_equal(first, second, equal_nan=True) and np.nanmean(first) > 0.6


def _anchor(heading: str) -> str:
    """The address that a heading gets, as Markdown viewers make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_are_in_the_repository(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in {_anchor(heading) for heading in headings}, target


def test_every_page_can_be_reached_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in re.findall(r"\]\(([^)]+)\)", readme)}
    assert {page for page in PAGES if page.name != "README.md"} <= linked


def test_checkpoints_of_the_page_on_weights_are_those_of_large_files():
    listing = (ROOT / "bundle" / "models" / "large_files.yml").read_text()
    hashes = re.findall(r"`([0-9a-f]{64})`", (ROOT / "docs" / "weights.md").read_text())
    assert len(hashes) == 4 and all(value in listing for value in hashes)


def test_embedded_weights_are_those_of_the_model_card_and_small():
    content = (ROOT / "bundle" / "models" / "model.pt").read_bytes()
    card = (ROOT / "bundle" / "docs" / "README.md").read_text()
    assert hashlib.sha256(content).hexdigest() in card and f"{len(content):,} bytes" in card
    assert len(content) < 25e6


def test_embedded_weights_are_declared_non_commercial():
    for path in ("README.md", "bundle/docs/README.md", "bundle/docs/data_license.txt"):
        assert "non-commercial" in (ROOT / path).read_text().lower(), path


def test_the_tests_that_the_page_on_security_names_exist():
    page = (ROOT / "docs" / "security.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) >= 10
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(), name
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page):
        assert (ROOT / "docs" / target).exists(), target
    for module in re.findall(r"`(lib/[\w/]+\.py)`", page):
        assert (ROOT / "apps" / "sam2sgp" / module).exists(), module


def test_files_and_names_of_the_page_on_architecture_exist():
    page = (ROOT / "docs" / "architecture.md").read_text()
    bases = [ROOT, ROOT / "bundle", ROOT / "bundle" / "sam2sgp", ROOT / "apps" / "sam2sgp"]
    code = "".join(path.read_text() for base in bases[1:] for path in base.rglob("*.py"))
    names = re.findall(r"`([^`\s]+)`", page)
    files = [name for name in names if re.fullmatch(r"[\w/]+\.(py|json)", name)]
    assert len(files) > 30
    assert [name for name in files if not any((base / name).is_file() for base in bases)] == []
    symbols = [name for name in names if re.fullmatch(r"[A-Za-z]\w*(\.[a-z]\w*)?", name) and name not in files]
    assert len(symbols) > 20
    assert [name for name in symbols if not re.search(rf"\b{name.rpartition('.')[2]}\b", code)] == []


def test_the_walks_name_what_is_in_the_file_that_they_stop_at_and_have_ten_stops_at_most():
    page = (ROOT / "docs" / "architecture.md").read_text()
    bases = [ROOT / "bundle" / "sam2sgp", ROOT / "apps" / "sam2sgp"]
    walks = re.findall(r"^## Walk.*?(?=^## )", page, re.MULTILINE | re.DOTALL)
    stops = [len(re.findall(r"^\d+\. ", walk, re.MULTILINE)) for walk in walks]
    assert len(stops) == 2 and max(stops) <= 10
    named = re.findall(r"`([\w/]+\.py)`, `(\w+(?:\.\w+)*)`(?: and `(\w+)`)?", "".join(walks))
    found = [(file, name.rpartition(".")[2]) for file, *names in named for name in names if name and ".py" not in name]
    assert len(found) > 20
    text = {file: next(base / file for base in bases if (base / file).is_file()).read_text() for file, _ in found}
    defined = r"\b(?:def|class) {0}\b|^ *{0}\b *[:=]"
    assert [entry for entry in found if not re.search(defined.format(entry[1]), text[entry[0]], re.MULTILINE)] == []
