"""Which classes the labelled volumes show in one piece."""

from types import SimpleNamespace

import pytest
import torch

from sam2sgp.support.pieces import MAIN_SHARE, LabelledVolumes

NAN = torch.nan


def volumes(*shares: dict[int, float]) -> LabelledVolumes:
    """Two items of each volume, and one of a picture before them."""
    items = [SimpleNamespace(case={}, main_shares={})]
    for own in shares:
        case: dict = {}
        items += [SimpleNamespace(case=case, main_shares=own) for _ in range(2)]
    return LabelledVolumes.of(items, [1, 7])


def found(shown: LabelledVolumes, patients: list[int], left_out: int | None = None) -> list[int]:
    patient_of = torch.tensor([9, *(number for number in patients for _ in range(2))])
    return shown.one_piece(patient_of != (-1 if left_out is None else left_out), patient_of)


def test_each_volume_is_there_once_with_its_classes():
    shown = volumes({1: 1.0}, {1: 0.9, 7: 0.5})
    assert shown.first.tolist() == [1, 3]
    torch.testing.assert_close(
        shown.main_shares, torch.tensor([[1.0, NAN], [0.9, 0.5]], dtype=torch.float64), equal_nan=True
    )


@pytest.mark.parametrize(
    ("last", "patients", "left_out", "expected"),
    [
        ({1: 1.0, 7: 1.0}, [0, 1, 2, 3], None, [1, 7]),
        ({1: MAIN_SHARE, 7: MAIN_SHARE - 0.01}, [0, 1, 2, 3], None, [1]),
        ({7: 1.0}, [0, 1, 2, 3], None, [1, 7]),
        ({7: 1.0}, [0, 1, 2, 3], 0, [7]),
        ({1: 1.0, 7: 1.0}, [0, 1, 1, 0], None, []),
        ({1: 0.5, 7: 0.5}, [0, 1, 2, 3], 3, [1, 7]),
    ],
    ids=["all", "specks", "one without", "a patient less", "two patients", "two parts in one left out"],
)
def test_one_piece_is_what_every_volume_of_three_patients_shows(last, patients, left_out, expected):
    whole = {1: 1.0, 7: 1.0}
    assert found(volumes(whole, whole, whole, last), patients, left_out) == expected


def test_without_volumes_nothing_is_one_piece():
    assert found(volumes(), []) == []
