"""The notebook of the documentation runs, in a kernel of its own, and what stands under its cells is still true."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs" / "first_hour.ipynb"


def told(notebook) -> list[str]:
    """What the cells print, one text a cell; tqdm's warning about widgets is no part of it."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return ["".join(out.text for out in cell.outputs if out.get("name") == "stdout") for cell in cells]


@pytest.mark.slow
def test_the_notebook_gives_what_stands_under_its_cells(tmp_path):
    stored, fresh = (nbformat.read(NOTEBOOK, as_version=4) for _ in range(2))
    assert NOTEBOOK.stat().st_size < 100_000
    places = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(fresh, timeout=600, startup_timeout=300, kernel_name="python3", resources=places).execute()
    number = r"\d+\.\d+"
    for expected, found in zip(told(stored), told(fresh), strict=True):
        assert re.sub(number, "#", found) == re.sub(number, "#", expected)
        values = [list(map(float, re.findall(number, text))) for text in (found, expected)]
        assert values[0] == pytest.approx(values[1], abs=0.02)
    dice = [float(value) for value in re.findall(r"Dice ([\d.]+)", "".join(told(fresh)))]
    assert len(dice) == 3 and max(dice) > 0.9
    pictures = [out for cell in fresh.cells for out in cell.get("outputs", ()) if "image/png" in out.get("data", {})]
    assert len(pictures) == 1 and (tmp_path / "found" / "first.png").is_file()
