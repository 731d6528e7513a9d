"""Which cases a report shows: the first ones, or of scored ones the worst and the best."""

from types import SimpleNamespace

import numpy as np

from sam2sgp.engines import SegmentationJob
from sam2sgp.engines.figures import CaseFigures


def figures(folder, scored: bool, most: int) -> CaseFigures:
    job = SegmentationJob(str(folder), scored)
    job.cases = [{"name": f"c{number}", "image": f"c{number}.png"} for number in range(6)]
    return CaseFigures(job, SimpleNamespace(items=[]), most, None, progress=False)


def finish(shown: CaseFigures, number: int, score: float | None) -> bool:
    """Whether a case that is done is kept with pictures."""
    record = {"rows": [], "score": score}
    wanted = shown.is_wanted(number, record)
    if wanted:
        record["shown"] = {"support": [{"id": f"item{number}"}]}
    shown.job.add(number, None, record, figure={"pred": np.full(1, number)} if wanted else None)
    return wanted


def test_without_scores_the_first_cases_are_shown(tmp_path):
    shown = figures(tmp_path, False, 2)
    assert [finish(shown, number, None) for number in range(4)] == [True, True, False, False]
    assert [(number, arrays["pred"].tolist()) for number, arrays in shown.chosen()] == [(0, [0]), (1, [1])]


def test_of_scored_cases_the_worst_and_the_best_are_kept_whatever_their_order(tmp_path):
    shown = figures(tmp_path, True, 4)
    scores = {3: 0.5, 0: 0.9, 5: 0.1, 2: 0.7, 1: 0.6, 4: None}
    for number, score in scores.items():
        finish(shown, number, score)
    # By score: 5, 3, 1, 2, 0, and 4 without one.
    assert [number for number, _ in shown.chosen()] == [5, 3, 0, 4]
    kept = [number for number in range(6) if shown.job.records.has_figure(shown.job.cases[number])]
    assert kept == [0, 3, 4, 5], "pictures of what is not shown are deleted"


def test_a_run_that_goes_on_ranks_what_is_on_record_too(tmp_path):
    before = figures(tmp_path, True, 2)
    for number, score in ((0, 0.2), (1, 0.8)):
        finish(before, number, score)
    after = figures(tmp_path, True, 2)
    after.job.left = [0, 1]
    after.begin()
    assert finish(after, 2, 0.5) is False and finish(after, 3, 0.1) is True
    assert [after.job.records.has_figure(case) for case in after.job.cases[:4]] == [False, True, False, True]


def test_no_pictures_are_no_pictures(tmp_path):
    for scored in (False, True):
        shown = figures(tmp_path, scored, 0)
        assert not finish(shown, 0, 0.5) and shown.chosen() == []
