"""How a run ends, and what is adapted before it begins."""

from types import SimpleNamespace

import pytest

from sam2sgp import distributed
from sam2sgp.engines import SegmentationJob, adapted
from sam2sgp.engines.case_records import VERSION
from sam2sgp.inferers import SupportSetInferer
from sam2sgp.support import ItemRules, SupportBank


def job(folder, scored=False) -> SegmentationJob:
    """Three cases, the last two of which failed."""
    made = SegmentationJob(str(folder), scored)
    made.cases = [{"name": name, "image": f"{name}.png"} for name in "abc"]
    made.results = {2: {"error": "empty."}, 0: {"rows": []}, 1: {"error": "no picture."}}
    return made


@pytest.mark.parametrize("scored, table", [(False, "summary.csv"), (True, "metrics.csv")])
def test_a_run_with_failed_cases_ends_with_an_exit_code_and_says_where_they_are_listed(tmp_path, scored, table):
    with pytest.raises(SystemExit) as ended:
        job(tmp_path, scored).finish()
    assert ended.value.code == (
        f"error: 2 of 3 images failed, first b: no picture. All are listed in {tmp_path / table}."
    )


def test_a_folder_that_is_not_kept_is_not_named(tmp_path):
    made = job(tmp_path, scored=True)
    made.kept = False
    with pytest.raises(SystemExit) as ended:
        made.finish()
    assert ended.value.code == "error: 2 of 3 images failed, first b: no picture."


def test_a_run_without_failed_cases_ends_well_and_only_rank_0_speaks_for_all(tmp_path, monkeypatch):
    whole = job(tmp_path)
    whole.results = {0: {"rows": []}}
    whole.finish()
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    job(tmp_path).finish()


def test_failed_cases_go_on_record_and_are_told_apart_from_results(tmp_path):
    made = job(tmp_path)
    made.results = {}
    made.records.run = "now"
    made.add_error(1, "no picture.")
    made.add(0, None, {"rows": [{"class": 1}]})
    assert made.failed == [1] and made.results[0]["rows"] == [{"class": 1}]
    assert made.records.load(made.cases[1]) == {"version": VERSION, "error": "no picture.", "run": "now"}
    assert made.records.find(made.cases[1]) is None


class Adapting:
    """An adapter that gives what it is told to."""

    def __init__(self, give) -> None:
        self.give = give

    def __call__(self, network, inferer):
        return self.give(inferer)


def test_an_adaptation_comes_as_another_inferer_on_the_same_bank():
    bank = SupportBank([], lambda case: case, rules=ItemRules(allow_empty=True), progress=False)
    inferer, adaptation = SupportSetInferer(bank), SimpleNamespace()
    made = adapted(inferer, None, Adapting(lambda given: adaptation if given is inferer else None))
    assert made.adaptation is adaptation and inferer.adaptation is None
    assert made.bank is bank and made.gate is inferer.gate and made.settings == inferer.settings
    assert adapted(inferer, None, Adapting(lambda given: None)).adaptation is None
