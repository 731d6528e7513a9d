"""Inference and evaluation do again what has changed, and nothing else."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam2sgp import distributed
from sam2sgp.engines import QueryEvaluator
from sam2sgp.errors import ConfigError, cause_of
from tests.helpers.bundle_runs import random_weights, run
from tests.helpers.pairs import age, write_case, write_set

FAST = {"image_size": 64, "k": 2, "region_below": 0, "report_figures": 1, "progress": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return random_weights(tmp_path_factory.mktemp("model") / "model.pt")


def picture(path: Path, seed: int) -> None:
    array = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(array).save(path)
    age(path)


class Archive:
    """Three queries and a support set of pictures, and what is segmented in a run over them."""

    def __init__(self, folder: Path, model: Path, monkeypatch) -> None:
        self.folder, self.support, self.model = folder, write_set(folder / "support", 3), model
        self.queries, self.output = folder / "queries", folder / "out"
        self.queries.mkdir()
        for number, name in enumerate("abc"):
            picture(self.queries / f"{name}.png", number)
        self.segmented: list[str] = []
        segment = QueryEvaluator.segment

        def noted(evaluator, case):
            self.segmented.append(case["name"])
            return segment(evaluator, case)

        monkeypatch.setattr(QueryEvaluator, "segment", noted)

    def __call__(self, **settings) -> str:
        """Names of the queries that a run segments, one after the other."""
        self.segmented.clear()
        folders = {"support_dir": self.support, "dataset_dir": self.queries, "output_dir": self.output}
        arguments = {"model_file": self.model, **folders, **FAST} | settings
        texts = {key: str(value) if isinstance(value, Path) else value for key, value in arguments.items()}
        run("inferring", "inference.json", **texts)
        return "".join(self.segmented)

    def table(self) -> list[dict]:
        with open(self.output / "summary.csv", newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture
def archive(tmp_path, model, monkeypatch) -> Archive:
    return Archive(tmp_path, model, monkeypatch)


def test_what_is_whole_is_left_alone_and_told_all_the_same(archive):
    assert archive() == "abc"
    before, page = archive.table(), (archive.output / "report.html").read_text()
    assert archive() == "" and archive.table() == before
    assert (archive.output / "report.html").read_text().count("data:image/") == page.count("data:image/") > 0
    # Another time stamp and another place are no other content.
    (archive.folder / "moved").mkdir()
    archive.queries = archive.queries.rename(archive.folder / "moved" / "queries")
    os.utime(archive.queries / "a.png")
    assert archive() == "" and all(Path(row["source"]).is_file() for row in archive.table())
    assert archive(resume=False) == "abc"


def test_a_change_of_a_query_or_a_result_costs_that_query(archive):
    archive()
    picture(archive.queries / "b.png", 9)
    picture(archive.queries / "d.png", 3)
    assert archive() == "bd"
    (archive.output / "a.png").unlink()
    (archive.output / "c.png").write_bytes((archive.output / "b.png").read_bytes())
    assert archive() == "ac"
    next((archive.output / "records").glob("*.json")).write_text("{")
    assert len(archive()) == 1 and archive() == ""
    assert [row["case"] for row in archive.table()] == list("aabbccdd")


def test_a_change_of_support_set_weights_or_settings_costs_all(archive, tmp_path):
    archive()
    assert archive(k=1) == "abc"
    write_case(archive.support, "case0", 0, shift=3)
    assert archive(k=1) == "abc"
    random_weights(tmp_path / "other.pt", seed=1)
    assert archive(k=1, model_file=tmp_path / "other.pt") == "abc"


def test_a_failed_query_is_tried_again_and_its_row_replaced(archive):
    (archive.queries / "b.png").rename(archive.folder / "b.png")
    (archive.queries / "b.png").write_bytes(b"this is no image")
    with pytest.raises(SystemExit, match="1 of 3"):
        archive()
    assert archive.segmented == ["a", "c"]
    with pytest.raises(SystemExit, match="1 of 3"):
        archive()
    assert archive.segmented == []
    (archive.folder / "b.png").replace(archive.queries / "b.png")
    assert archive() == "b" and not any(row.get("error") for row in archive.table())


def test_an_interrupted_run_goes_on(archive, monkeypatch):
    segment = QueryEvaluator.segment

    def stopping(evaluator, case):
        if case["name"] == "c":
            raise KeyboardInterrupt
        return segment(evaluator, case)

    with monkeypatch.context() as patch:
        patch.setattr(QueryEvaluator, "segment", stopping)
        with pytest.raises(BaseException) as caught:
            archive()
        assert isinstance(cause_of(caught.value), KeyboardInterrupt)
    assert archive() == "c" and {row["case"] for row in archive.table()} == set("abc")


def test_a_name_that_another_query_takes_is_not_left_to_both(archive):
    archive()
    Image.open(archive.queries / "a.png").save(archive.queries / "a.bmp")
    # Both have a stem for a name no more, and a.bmp comes first.
    assert archive() == "a.bmpa.png"
    outputs = {row["source"]: row["output"] for row in archive.table()}
    assert len(set(outputs.values())) == 4 and all(Path(path).is_file() for path in outputs.values())


def test_resume_is_true_or_false(archive):
    with pytest.raises(Exception) as caught:
        archive(resume="false")
    assert isinstance(cause_of(caught.value), ConfigError) and "capital letter" in str(cause_of(caught.value))


def test_an_adaptation_counts_by_its_result(archive):
    assert archive(adapt_steps=2) == "abc"
    assert archive(adapt_steps=2) == ""
    assert archive() == "abc"


def test_processes_that_differ_are_refused(archive, monkeypatch):
    monkeypatch.setattr(distributed, "gather", lambda value: [value, ("of other weights", *value[1:])])
    with pytest.raises(Exception) as caught:
        archive()
    assert isinstance(cause_of(caught.value), ConfigError) and "differ" in str(cause_of(caught.value))
    assert archive.segmented == []
