"""The Python that the pages show runs, and the calls in their sentences fit what they call."""

import ast
import inspect
import sys
from importlib import import_module
from pathlib import Path

import nibabel as nib
import pytest
from monai.bundle import create_workflow
from monai.fl.client import MonaiAlgo

from sam2sgp.data.phantom import make_phantoms
from sam2sgp.segmenter import Segmenter
from tests.helpers.doc_commands import FENCED, NOTEBOOK, PAGES, ROOT, blocks, spans, text_of

# How many blocks of Python a page has, and the test that runs them. A new one is run there, too.
RUN = {
    "README.md": (1, "tests/test_docs.py"),
    "docs/running.md": (1, "tests/test_page_code.py"),
    "docs/federated.md": (2, "tests/test_page_code.py"),
}
# Other blocks: without a language they are typed in a shell, see `test_page_commands.py`.
LANGUAGES = {"", "python", "text", "toml", "bibtex"}


def test_every_block_of_python_is_run_by_a_test_and_languages_are_known():
    counts = {str(page.relative_to(ROOT)): len(blocks(page, "python")) for page in PAGES}
    assert {name: count for name, count in counts.items() if count} == {name: count for name, (count, _) in RUN.items()}
    assert {language for page in PAGES for language, _ in FENCED.findall(text_of(page))} <= LANGUAGES


@pytest.mark.slow
def test_the_code_of_the_page_on_running_segments_a_volume(tmp_path, monkeypatch):
    [code] = blocks(ROOT / "docs/running.md", "python")
    data = make_phantoms(tmp_path / "data", 4, (64, 64), 6, seed=1, modalities=("mr",), progress=False)
    query = sorted((data / "queries/mr").glob("*.nii.gz"))[0]
    monkeypatch.chdir(tmp_path)
    Path("labelled").symlink_to(data / "support/mr")
    Path("new.nii.gz").symlink_to(query)
    scope: dict = {}
    exec(code, scope)
    truth = nib.load(data / "labelsTs" / query.name).get_fdata()
    mask = scope["mask"]
    assert mask.shape == truth.shape and (mask[truth > 0] == truth[truth > 0]).mean() > 0.6
    assert set(scope["segmenter"].last.confidence) == {"disc", "ellipse", "ring"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:executing the bundle config:UserWarning")
def test_the_code_of_the_page_on_federation_makes_a_client_and_what_the_server_starts_with(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.chdir(ROOT)
    make_phantoms(tmp_path / "data/hospital_a", 6, (64, 64), 6, modalities=["us"], progress=False)
    first, second = blocks(ROOT / "docs/federated.md", "python")
    scope: dict = {}
    exec(first.replace('"/', f'"{tmp_path}/'), scope)
    scope["network"] = scope["client"].trainer.network
    exec(second, scope)
    sent = scope["client"].get_weights().weights
    assert len(sent) > 50 and scope["start"].keys() == sent.keys()
    scope["client"].finalize()


# What the names of sentences stand for where they are no packages.
MEANT = {"Segmenter": Segmenter, "mine": Segmenter, "client": MonaiAlgo, "create_workflow": create_workflow}
PACKAGES = ("sam2sgp", "monai", "nibabel")
FILES = {"sam2sgp.key", "sam2sgp.example.org"}
# Pages on which a call of a bare name is one of a segmenter's.
OF_SEGMENTERS = [ROOT / "docs/running.md"]


def _read(span: str) -> ast.expr | None:
    """Code of a sentence that is a name with dots or a call, as Python."""
    try:
        found = ast.parse(span.replace("…", "..."), mode="eval").body
    except SyntaxError:
        return None
    return found if isinstance(found, ast.Call | ast.Attribute) else None


def _name(code: ast.expr) -> str:
    return ast.unparse(code.func if isinstance(code, ast.Call) else code)


def _names_and_calls() -> list[tuple[str, str]]:
    """(full name, code) of what sentences name of our packages and of MONAI's."""
    found = []
    for page in [*PAGES, NOTEBOOK]:
        for span in spans(page):
            code = _read(span)
            name = "" if code is None or span in FILES else _name(code)
            if name.split(".")[0] in (*PACKAGES, *MEANT):
                found.append((name, span))
            elif page in OF_SEGMENTERS and isinstance(code, ast.Call) and "." not in name:
                found.append((f"Segmenter.{name}", span))
    return list(dict.fromkeys(found))


def _resolved(name: str) -> object:
    first, *rest = name.split(".")
    found = MEANT.get(first) or import_module(first)
    for part in rest:
        found = getattr(found, part, None) or import_module(f"{found.__name__}.{part}")
    return found


@pytest.mark.parametrize(("name", "span"), _names_and_calls())
def test_a_name_of_a_sentence_exists_and_takes_what_it_is_given(name, span):
    found, code = _resolved(name), _read(span)
    if isinstance(code, ast.Call):
        is_method = name.split(".")[0] in MEANT and "." in name
        given = [*([None] if is_method else []), *map(ast.unparse, code.args)]
        inspect.signature(found).bind(*given, **{each.arg: None for each in code.keywords if each.arg})
