"""A label fits its image and names its classes as others do, or is refused before it is approved."""

import nibabel as nib
import nrrd
import numpy as np
import pytest

from lib.checks import BadLabel
from lib.stores.label_checks import again_if_renumbered, check_values, checked_label
from sam2sgp.data import read_image, read_label
from tests.helpers.store_files import SIZE, label, volume

LIVER_IS_2 = [{"label_info": [{"idx": 2, "name": "liver"}]}]


def info(*names: str) -> dict:
    return {"label_info": [{"idx": number, "name": name} for number, name in enumerate(names, 1)]}


@pytest.fixture
def check(tmp_path):
    """Check a label whose only class is 1."""
    image = volume(tmp_path / "image.nii.gz")

    def checked(sent: dict, names: dict | None = None, approved=(), size=SIZE, value: int = 1):
        file = str(label(tmp_path / "sent.nii.gz", value, size))
        return checked_label(str(image), file, "final/image.nii.gz", sent, lambda: names or {}, approved, tmp_path)

    checked.values = lambda found: np.unique(read_label(found.file, read_image(image).geometry)).tolist()
    return checked


def test_what_fits_stays_as_it_is(check):
    found = check(info("liver"))
    assert found.file.endswith("sent.nii.gz") and found.values == (0, 1) and found.info == info("liver")


def test_a_class_gets_the_value_that_its_name_has_elsewhere(check):
    found = check(info("liver"), approved=LIVER_IS_2)
    assert found.values == (0, 2) and check.values(found) == [0, 2] and not found.file.endswith("sent.nii.gz")
    assert found.info["label_info"] == [{"name": "liver", "idx": 2}]
    # A new name under a value that another name has.
    assert check(info("cyst"), {1: "liver"}).values == (0, 2)


def test_another_grid_and_an_undeclared_value_are_refused_by_the_name_that_the_client_knows(check):
    with pytest.raises(BadLabel, match="^final/image.nii.gz: expected"):
        check(info("liver"), size=(12, 10, 5))
    with pytest.raises(BadLabel, match="final/image.nii.gz.*found value 7"):
        check({}, {1: "liver"}, value=7)


def test_a_segmentation_sent_without_names_gets_the_values_that_its_own_names_have_elsewhere(tmp_path):
    image = volume(tmp_path / "image.nii.gz")
    voxels = np.asarray(nib.load(label(tmp_path / "sent.nii.gz")).dataobj)
    names = {"Segment0_ID": "Segment_1", "Segment0_Name": "Liver", "Segment0_LabelValue": "1"}
    place = {"space": "RAS", "space directions": nib.load(image).affine[:3, :3], "space origin": [0, 0, 0]}
    nrrd.write(str(tmp_path / "sent.seg.nrrd"), voxels, {**place, **names})
    sent = str(tmp_path / "sent.seg.nrrd")
    found = checked_label(str(image), sent, "final/image.seg.nrrd", {}, dict, LIVER_IS_2, tmp_path)
    assert found.values == (0, 2) and found.info == {"label_info": [{"name": "liver", "idx": 2}]}
    with pytest.raises(BadLabel, match="^final/image.seg.nrrd: expected one name for value 1, found 'Liver' in the"):
        checked_label(str(image), sent, "final/image.seg.nrrd", info("cyst"), dict, LIVER_IS_2, tmp_path)


def test_labels_that_came_meanwhile_have_it_checked_once_more():
    turns = []

    @again_if_renumbered
    def approve(sent: dict) -> int:
        turns.append(sent)
        check_values((0, 1), sent, {}, LIVER_IS_2 if len(turns) < 3 else [])
        return len(turns)

    assert approve(info("liver")) == 3
    check_values((0, 2), {"label_info": [{"idx": 2, "name": "liver"}]}, {}, LIVER_IS_2)
