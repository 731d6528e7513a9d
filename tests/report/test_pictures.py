"""Pictures beside label files, on request."""

import nibabel as nib
import numpy as np
import torch
from PIL import Image

from sam2sgp.drawing import class_colour
from sam2sgp.report.pictures import SavePicturesd
from sam2sgp.transforms import LoadCased, OutputNames, ScaleIntensityByModalityd


def segmented(path, labels, output, **settings) -> dict:
    case = LoadCased("image")({"image": str(path), "name": "a"})
    scaling = ScaleIntensityByModalityd()
    case = {**scaling(case), "pred": torch.from_numpy(labels)}
    case.pop("image")
    return SavePicturesd(names=OutputNames(output), scale_intensity=scaling, **settings)(case)


def test_pictures_on_request_show_the_classes_in_their_colours(tmp_path):
    Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (60, 1))).save(tmp_path / "a.png")
    labels = np.zeros((1, 60, 200), np.uint8)
    labels[0, 10:30, 20:80], labels[0, 40:50, 100:120] = 1, 9
    case = segmented(tmp_path / "a.png", labels, tmp_path / "out", overlay=True, coloured=True)
    assert [path.name for path in case["written"]] == ["a_overlay.png", "a_coloured.png"]
    picture = np.asarray(Image.open(tmp_path / "out/a_coloured.png"))
    for value in (1, 9):
        assert (picture[labels[0] == value] == class_colour(value)).all()
    assert not picture[labels[0] == 0].any()
    overlay = np.asarray(Image.open(tmp_path / "out/a_overlay.png"))
    assert overlay.shape == (60, 200, 3) and tuple(overlay[10, 50]) == class_colour(1)
    assert "written" not in segmented(tmp_path / "a.png", labels, tmp_path / "none")


def test_the_overlay_of_a_volume_shows_slices_that_hold_something(tmp_path):
    nib.save(nib.Nifti1Image(np.random.default_rng(0).normal(size=(20, 30, 12)), np.eye(4)), tmp_path / "v.nii.gz")
    labels = np.zeros((12, 30, 20), np.uint8)
    labels[4:8, 5:20, 5:15] = 1
    case = segmented(tmp_path / "v.nii.gz", labels, tmp_path / "out", overlay=True, coloured=True)
    assert [path.name for path in case["written"]] == ["v_overlay.png"]
    assert Image.open(case["written"][0]).size == (2 * 142, 2 * 213)
