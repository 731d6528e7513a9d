"""Dice of the prediction that was shown with the label in its place, by the names of its classes."""

import nibabel as nib
import numpy as np
import pytest

from lib.activelearning.shown import Pair, dice_of, mean_of

SHAPE = (6, 5, 4)


@pytest.fixture
def pair(tmp_path):
    """The pair of a prediction and a label, each a map of the classes of three rows, and what is known about them."""
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.int16), np.eye(4)), tmp_path / "image.nii.gz")

    def made(prediction: list[int], of_prediction: dict, label: list[int], of_label: dict) -> float | dict:
        paths = []
        for name, rows in (("prediction", prediction), ("label", label)):
            array = np.zeros(SHAPE, np.uint8)
            array[: len(rows)] = np.array(rows)[:, None, None]
            paths.append(tmp_path / f"{name}.nii.gz")
            nib.save(nib.Nifti1Image(array, np.eye(4)), paths[-1])
        found = Pair(paths[0], of_prediction, paths[1], of_label, unchanged=False)
        return dice_of(found, tmp_path / "image.nii.gz")

    return made


def named(**classes: int) -> dict:
    return {"label_info": [{"idx": value, "name": name} for name, value in classes.items()]}


def test_classes_are_compared_by_name_where_their_values_differ(pair):
    found = pair([1, 1, 2], named(liver=1, cyst=2), [2, 2, 1], named(cyst=1, liver=2))
    assert found == {"liver": 1.0, "cyst": 1.0}


def test_half_of_an_object_is_two_thirds_and_an_absent_class_is_left_out(pair):
    found = pair([1, 0, 0], named(liver=1, cyst=2), [1, 1, 0], named(liver=1, cyst=2))
    assert found == {"liver": pytest.approx(2 / 3)}
    assert pair([1, 0, 2], named(liver=1, cyst=2), [1, 0, 0], named(liver=1)) == {"liver": 1.0, "cyst": 0.0}


def test_a_class_that_the_label_does_not_name_is_never_taken_for_another(pair):
    # Value 2 is the cyst's in the prediction and the liver's in the label.
    found = pair([1, 2, 2], named(liver=1, cyst=2), [2, 0, 0], named(liver=2))
    assert found == {"liver": 1.0, "cyst": 0.0}


def test_a_class_that_has_got_its_name_since_the_prediction_is_the_same_class(pair):
    assert pair([1, 1, 0], named(class_1=1), [1, 1, 0], named(disc=1)) == {"class_1": 1.0}


def test_what_the_model_was_asked_for_counts_by_the_values_that_a_store_gave(pair):
    record = {**named(liver=3), "params": {"label_names": {"liver": 1, "cyst": 2, "odd": "x"}}}
    assert pair([3, 3, 0], record, [3, 3, 0], named(liver=3)) == {"liver": 1.0}


def test_a_prediction_approved_as_it_was_is_perfect_by_definition(pair, tmp_path):
    pair([1], named(liver=1), [1], named(liver=1))
    same = Pair(tmp_path / "label.nii.gz", named(liver=1), tmp_path / "label.nii.gz", named(liver=1), unchanged=True)
    assert dice_of(same, tmp_path / "image.nii.gz") == {"liver": 1.0}


def test_the_mean_of_nothing_is_nothing():
    assert mean_of({}) is None and mean_of({"a": 0.5, "b": 1.0}) == 0.75
