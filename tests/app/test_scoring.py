"""Scoring in the background: what is computed, when, and what is left after an interruption."""

import pytest
import torch

import lib.scoring as module
from lib.scoring import Scores, Scoring
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


def test_a_row_is_whole_or_not_there(tmp_path):
    first, second = (Scores(tmp_path / "scores.sqlite") for _ in range(2))
    for number, scores in enumerate((first, second, first)):
        scores.write("a", f"s{number}", "w", "b", ImageScore(torch.ones(4) / 2, 0.25, {"entropy": 0.25}))
    assert second.origins() == {"a": ("s2", "w", "b")}
    (row,) = second.newer(0)
    assert row.embedding.tolist() == [0.5] * 4 and row.uncertainty == 0.25
    assert first.newer(row.serial) == []
