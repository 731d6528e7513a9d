"""Patients are split into sections, whole and reproducibly."""

from pathlib import Path

import pytest

from sam2sgp.data.folders import load_datalist
from sam2sgp.data.split import subset
from sam2sgp.errors import ConfigError
from tests.helpers.data_folders import names, paired


@pytest.mark.parametrize("patients", [3, 4, 7, 20, 41])
def test_split_is_by_patient_complete_and_reproducible(tmp_path, patients):
    paired(tmp_path, *(f"patient{n:03}_frame{frame}" for n in range(patients) for frame in (1, 2)))
    sections = {section: load_datalist(tmp_path, section) for section in ("train", "val", "test")}
    of_patient = {name: {case["patient"] for case in cases} for name, cases in sections.items()}
    assert sum(len(found) for found in of_patient.values()) == patients == len(set.union(*of_patient.values()))
    assert all(of_patient.values()) and sum(len(cases) for cases in sections.values()) == 2 * patients
    assert abs(len(of_patient["train"]) - 0.7 * patients) <= 1.2
    assert load_datalist(tmp_path, "val") == sections["val"]
    if patients > 7:
        assert load_datalist(tmp_path, "val", seed=1) != sections["val"]


def test_split_does_not_depend_on_the_order_of_the_file_system(tmp_path, monkeypatch):
    paired(tmp_path, *(f"s{n}" for n in range(12)))
    expected = load_datalist(tmp_path, "test")
    listing = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: reversed(sorted(listing(path))))
    assert load_datalist(tmp_path, "test") == expected


def test_few_patients_and_unusual_fractions(tmp_path):
    paired(tmp_path, "a", "b", "c", "d")
    counts = {s: len(load_datalist(tmp_path, s, split=(0.5, 0.0, 0.5))) for s in ("train", "val", "test")}
    assert counts == {"train": 2, "val": 0, "test": 2}
    one = paired(tmp_path / "one", "a")
    assert [len(load_datalist(one, section)) for section in ("train", "val", "test")] == [1, 0, 0]
    for options in ({"split": (0.5, 0.1, 0.1)}, {"section": "dev"}, {"patient_pattern": "("}):
        with pytest.raises(ConfigError):
            load_datalist(tmp_path, **options)


def test_subset_is_drawn_reproducibly_and_kept_in_order(tmp_path):
    cases = load_datalist(paired(tmp_path, *(f"s{n:02}" for n in range(30))))
    chosen = subset(cases, 10, seed=3)
    assert len(chosen) == 10 and chosen == subset(cases, 10, seed=3) != subset(cases, 10, seed=4)
    assert names(chosen) == sorted(names(chosen)) and subset(cases, None) == cases == subset(cases, 99)
