"""Rows of the tables: what is told of each case, of those that failed and of files that are not used."""

import logging
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sam2sgp.data.tree import Skipped
from sam2sgp.engines import SegmentationJob
from sam2sgp.engines.results import ResultWriter
from sam2sgp.transforms.scaling import Scaling
from tests.helpers.banks import bank, volume

NAMES = {1: "liver", 2: "cyst"}


@pytest.fixture
def writer(tmp_path) -> ResultWriter:
    job = SegmentationJob(str(tmp_path / "out"))
    job.cases = [{"name": name, "image": str(tmp_path / f"{name}.png")} for name in "ab"]
    items = [SimpleNamespace(id=f"item{number}") for number in range(4)]
    bank = SimpleNamespace(class_names=NAMES, class_values=[1, 2], items=items)
    return ResultWriter(job, bank, "Run", max_figures=0, skipped=[Skipped(tmp_path / "notes.txt", "not an image")])


def case(number: int = 0) -> dict:
    """A segmented volume of three slices: the liver in the second and third, guided by items 1 and 3 there."""
    pred = torch.zeros(3, 4, 4, dtype=torch.long)
    pred[1:, :2] = 1
    index = torch.tensor([[0, 2], [3, 1], [3, 2]])
    return {
        "name": "ab"[number],
        "number": number,
        "pred": pred,
        "geometry": SimpleNamespace(spacing=(2.0, 1.0, 0.5)),
        "scaling": Scaling("percentiles", "nothing is stated"),
        "warnings": ["It is dark.", "It is small."],
        "confidence": {1: 0.75, 2: float("nan")},
        "support": {1: (index, torch.ones(3, 2))},
        "support_distance": 9.0,
        "maybe_absent": [1],
        "seconds": 1.23456,
        "stamp": None,
    }


def test_a_case_is_a_row_for_each_class_with_what_guided_it(writer):
    writer._add_case(case())
    liver, cyst, _ = writer.rows
    assert liver["case"] == "a" and liver["class_name"] == "liver" and liver["voxels"] == 16
    assert liver["size"] == pytest.approx(0.016) and liver["size_unit"] == "ml"
    assert liver["support_items"] == "item3; item1", "of the slices on which it was found, the most used first"
    assert cyst["voxels"] == 0 and cyst["support_items"] == ""
    assert liver["unlike_support"] and liver["maybe_absent"] and not cyst["maybe_absent"]
    assert liver["seconds"] == 1.235 and liver["warnings"] == "It is dark. It is small."


def test_a_class_that_was_not_found_is_of_all_slices_that_it_was_looked_for_in(writer):
    empty = case() | {"pred": torch.zeros(3, 4, 4, dtype=torch.long)}
    assert writer._support_used(empty, 1).split("; ")[0] in ("item2", "item3")
    assert set(writer._support_used(empty, 1).split("; ")) <= {"item0", "item1", "item2", "item3"}


def test_rows_are_in_the_order_of_the_cases_with_failures_and_unused_files(writer, tmp_path):
    writer.job.add_error(1, "b: expected an image.")
    writer._add_case(case(0))
    assert [(row["case"], row.get("error"), row.get("skipped")) for row in writer.rows] == [
        ("a", None, None),
        ("a", None, None),
        ("b", "b: expected an image.", None),
        ("notes.txt", None, "not an image"),
    ]
    assert [row["case"] for row in writer.errors] == ["b"]
    assert {row["source"] for row in writer.rows} == {str(tmp_path / name) for name in ("a.png", "b.png", "notes.txt")}


def test_a_result_that_was_moved_with_its_folder_is_told_where_it_is_now(writer, tmp_path):
    writer._add_case(case() | {"pred_path": str(writer.job.output_dir / "a.png")})
    writer.job.output_dir = tmp_path / "moved"
    assert writer.rows[0]["output"] == str(tmp_path / "moved" / "a.png")


def test_a_scored_case_is_ranked_by_its_mean_dice(tmp_path, writer, caplog):
    writer.job = SegmentationJob(str(tmp_path / "scored"), scored=True)
    writer.job.cases = [{"name": "a", "image": "a.png", "label": "a.png"}]
    writer.figures.job = writer.job
    label = torch.zeros(3, 4, 4, dtype=torch.long)
    label[1:, :1] = 1
    writer._add_case(case() | {"label": label})
    record = writer.job.results[0]
    assert record["score"] == pytest.approx(2 * 8 / (16 + 8)) and record["rows"][0]["dice"] == record["score"]
    assert np.isnan(record["rows"][1]["dice"]) and Path(tmp_path / "scored" / "records").is_dir()
    with caplog.at_level(logging.INFO):
        writer._summary(writer.rows)
    assert re.search(r": Dice 0\.667, .*, HD95 [\d.]+ (px|mm), NSD ", caplog.text)


def test_a_scaling_is_told_once_and_each_warning_of_a_case(writer, caplog):
    caplog.set_level("INFO")
    for number in (0, 1):
        writer._add_case(case(number))
    assert sum("scaling:" in message for message in caplog.messages) == 1
    assert caplog.messages.count("a: It is dark.") == caplog.messages.count("b: It is small.") == 1


def test_doubts_name_the_table_or_where_it_is_not_kept_the_images(writer, caplog):
    for number in (0, 1):
        writer._add_case(case(number))
    writer._tell_doubts(writer.rows)
    table = writer.job.table
    assert f"(`maybe_absent` in {table})" in caplog.text and f"(`unlike_support` in {table})" in caplog.text
    caplog.clear()
    writer.job.kept = False
    writer._tell_doubts(writer.rows)
    assert caplog.text.count("check them first (a, b)") == 2 and str(table) not in caplog.text


@pytest.mark.parametrize(("patients", "one_piece", "told"), [(3, True, True), (4, True, False), (3, False, False)])
def test_what_three_patients_tell_to_be_one_piece_is_told_not_to_be_measured(
    tmp_path, caplog, patients, one_piece, told
):
    """Without an image's own patient only two are left."""
    support = bank([volume(number) for number in range(patients)])
    assert support.one_piece() == [1]
    job = SegmentationJob(str(tmp_path / "scored"), scored=True)
    job.cases = [{**case, "image": f"{case['name']}.nii"} for case in support.data]
    settings = SimpleNamespace(one_piece=one_piece)
    engine = SimpleNamespace(exclude_own_patient=True, inferer=SimpleNamespace(settings=settings))
    ResultWriter(job, support, "Run", max_figures=0)._complete(engine)
    assert ("without keeping class_1 in one piece" in caplog.text) == told


def test_what_may_be_wrong_with_the_support_set_is_in_the_report(tmp_path):
    support = bank([volume(number) for number in range(3)])
    support.warn(["a.png: value 7 (5 pixels) is in none of the other 5 labels."])
    job = SegmentationJob(str(tmp_path / "out"))
    ResultWriter(job, support, "Run", max_figures=0)._complete(SimpleNamespace())
    report = (tmp_path / "out" / "report.html").read_text()
    assert "<li>a.png: value 7 (5 pixels) is in none of the other 5 labels.</li>" in report
