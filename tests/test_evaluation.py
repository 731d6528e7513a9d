"""Evaluation through the bundle: tables and report."""

import csv
import shutil
from pathlib import Path

import pytest
import torch

from sam2sgp.data import load_datalist
from sam2sgp.networks import SAM2SGP, save_weights
from tests.helpers.bundle_runs import SMALL, run


def rows(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def output(phantoms, tmp_path_factory):
    directory = tmp_path_factory.mktemp("evaluation")
    torch.manual_seed(0)
    save_weights(SAM2SGP("lite", 64), directory / "model.pt")
    settings = {key: SMALL[key] for key in ("image_size", "num_workers", "progress")}
    run(
        "evaluating",
        "train.json",
        "evaluate.json",
        dataset_dir=str(phantoms),
        output_dir=str(directory),
        report_figures=4,
        **settings,
    )
    return directory / "evaluation"


def test_every_class_of_every_test_case_is_a_row(output, phantoms):
    cases = {case["name"] for case in load_datalist(phantoms, "test")}
    table = rows(output / "metrics.csv")
    assert {row["case"] for row in table} == cases
    assert len(table) == 3 * len(cases)
    assert {row["unit"] for row in table} == {"mm", "px"}
    for row in table:
        assert row["dice"] == "" or 0 <= float(row["dice"]) <= 1
        assert row["support_items"]


def test_summary_is_the_mean_of_the_rows(output):
    table = rows(output / "metrics.csv")
    for summary in rows(output / "metrics_summary.csv")[:-1]:
        values = [float(row["dice"]) for row in table if row["class_name"] == summary["class_name"] and row["dice"]]
        assert float(summary["dice_mean"]) == pytest.approx(sum(values) / len(values))


def test_support_never_comes_from_the_test_cases(output):
    table = rows(output / "metrics.csv")
    tested = {row["case"] for row in table}
    used = {item.split("#")[0] for row in table for item in row["support_items"].split("; ")}
    assert used and not used & tested


def test_report_shows_worst_and_best_cases(output):
    page = (output / "report.html").read_text()
    assert "Worst cases" in page and "Best cases" in page
    assert page.count("data:image/") > 4 * 4


def test_a_broken_test_case_costs_its_row_and_the_exit_code_not_the_run(phantoms, tmp_path):
    folder, output = tmp_path / "data", tmp_path / "run"
    shutil.copytree(phantoms, folder)
    broken = load_datalist(folder, "test")[0]
    Path(broken["image"]).write_bytes(b"this is no image")
    torch.manual_seed(0)
    save_weights(SAM2SGP("lite", 64), output / "model.pt")
    arguments = {"dataset_dir": str(folder), "output_dir": str(output), "report_figures": 2}
    settings = {key: SMALL[key] for key in ("image_size", "num_workers", "progress")}
    with pytest.raises(SystemExit, match=broken["name"]):
        run("evaluating", "train.json", "evaluate.json", **arguments, **settings)
    table = rows(output / "evaluation" / "metrics.csv")
    assert [row["case"] for row in table if row["error"]] == [broken["name"]]
    assert {row["case"] for row in table} == {case["name"] for case in load_datalist(folder, "test")}
