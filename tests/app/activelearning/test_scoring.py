"""Scoring in the background: what is computed, when, and what is left after an interruption."""

import shutil

import pytest
import torch

import lib.activelearning.scoring as module
from lib.activelearning.scoring import Scores, Scoring
from lib.activelearning.strategies import Choices
from lib.checks import StorageError
from sam2sgp.active import ImageScore

PICTURES = [f"us_00{patient}_{number}" for patient in range(3) for number in range(2)]


def run(scoring: Scoring) -> dict:
    return scoring({}, scoring.segmenter.cases.datastore)


def test_scores_follow_support_set_images_and_interruptions(studio, monkeypatch):
    folder = studio(PICTURES, PICTURES[:2])
    scoring = Scoring(folder.segmenter(), Scores(folder.folder / "scores.sqlite"))
    scored = []
    real = module.examine

    def examine(inferer, network, case):
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(case["name"])
        return real(inferer, network, case)

    monkeypatch.setattr(module, "examine", examine)
    with pytest.raises(KeyboardInterrupt):
        run(scoring)
    monkeypatch.setattr(module, "examine", real)
    # Two labelled images have an embedding, and two of the four others a score.
    assert run(scoring) == {"total": 6, "executed": 2, "skipped": 4, "failed": 0}
    assert run(scoring)["executed"] == 0
    rows = {row.id: row for row in scoring.scores.newer(0)}
    assert rows.keys() == set(PICTURES)
    for name, row in rows.items():
        assert (row.uncertainty is None) == (name in PICTURES[:2])
        assert float(row.embedding.float().norm()) == pytest.approx(1.0, abs=1e-2)
        assert row.uncertainty is None or 0 <= row.uncertainty <= 1

    folder.approve(PICTURES[2])
    # Three images are scored under the new support set; the three embeddings of labelled ones stay.
    scoring.segmenter.cases.datastore.refresh()
    assert run(scoring) == {"total": 6, "executed": 3, "skipped": 3, "failed": 0}
    folder.image(PICTURES[5]).unlink()
    folder.image(PICTURES[4]).write_bytes(b"no picture")
    scoring.segmenter.cases.datastore.refresh()
    assert run(scoring) == {"total": 5, "executed": 0, "skipped": 4, "failed": 1}
    # The same content fails again: it is not read a second time.
    assert run(scoring)["skipped"] == 5
    assert {row.id for row in scoring.scores.newer(0)} == set(PICTURES[:5])


def test_seed_pairs_cover_what_is_like_them(studio, tmp_path, phantom_cases):
    seeds = tmp_path / "seeds"
    for kind in ("image", "label"):
        (seeds / f"{kind}s").mkdir(parents=True)
        shutil.copy(phantom_cases["us_001_0"][kind], seeds / f"{kind}s")
    folder = studio(PICTURES[2:])
    scoring = Scoring(folder.segmenter(support_dir=str(seeds)), Scores(folder.folder / "scores.sqlite"))
    assert run(scoring)["executed"] == 5
    images = PICTURES[2:]
    with_seeds = Choices(scoring.scores, scoring.segmenter.cases.seeds)
    # The very image of the seed pair is in the datastore too: nothing is more like what is labelled.
    ranked = with_seeds.ranked("coverage", images, [])
    assert ranked[-1] == "us_001_0"
    found = with_seeds("coverage", ["us_001_0"], [])
    assert found["distance"] == pytest.approx(0.0, abs=0.02)
    assert Choices(scoring.scores)("coverage", ["us_001_0"], [])["distance"] == 1.0


def test_damaged_scores_are_made_anew_and_unusable_ones_are_named(tmp_path, caplog):
    path = tmp_path / "scores.sqlite"
    scores = Scores(path)
    score = ImageScore(torch.ones(4) / 2, 0.25, {"entropy": 0.25})
    scores.write("a", "s", "w", "b", score)
    # The first page tells that it is a database, the others hold the rows.
    whole = path.read_bytes()
    rows_lost = whole[:4096] + b"\xff" * (len(whole) - 4096)
    path.write_bytes(b"no database at all, " * 100)
    assert scores.newer(0) == []
    path.write_bytes(rows_lost)
    with pytest.raises(StorageError, match="found them damaged; they are rebuilt: try again"):
        scores.newer(0)
    scores.write("b", "s", "w", "b", score)
    assert [row.id for row in scores.newer(0)] == ["b"]
    assert "the scores are damaged" in caplog.text
    path.unlink()
    path.mkdir()
    for use in (scores.offers, scores.origins, lambda: scores.newer(0), lambda: scores.offer("a", 0.0)):
        with pytest.raises(
            StorageError, match="scores.sqlite: expected to read and write the scores of images"
        ) as caught:
            use()
        assert caught.value.status == 507 and "\n" not in str(caught.value)


def test_a_row_is_whole_or_not_there(tmp_path):
    first, second = (Scores(tmp_path / "scores.sqlite") for _ in range(2))
    for number, scores in enumerate((first, second, first)):
        scores.write("a", f"s{number}", "w", "b", ImageScore(torch.ones(4) / 2, 0.25, {"entropy": 0.25}))
    assert second.origins() == {"a": ("s2", "w", "b")}
    (row,) = second.newer(0)
    assert row.embedding.tolist() == [0.5] * 4 and row.uncertainty == 0.25
    assert first.newer(row.serial) == []
