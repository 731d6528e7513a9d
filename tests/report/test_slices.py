"""Slices of a volume as a report shows them: which, where they lie, and which side is which."""

from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

from sam2sgp.data import read_image
from sam2sgp.report.html import CaseFigure, Report, write_report
from sam2sgp.report.slices import frames, frames_per_case, scaled_slices, sides_of, slice_position
from sam2sgp.transforms import ScaleIntensityByModalityd
from sam2sgp.transforms.scaling import CT, PERCENTILES, Scaling, scale_intensity
from tests.helpers.drawn import plain


def test_pictures_of_a_volume_say_sides_scale_and_place(tmp_path):
    affine = np.diag([-0.5, -0.5, 3.0, 1.0])
    affine[:3, 3] = (40, 60, -30)
    nib.save(nib.Nifti1Image(np.zeros((160, 200, 12), np.int16), affine), tmp_path / "v.nii.gz")
    image = read_image(tmp_path / "v.nii.gz")
    assert sides_of(image.geometry) == "RLAP"
    assert slice_position(image.geometry, 0) == "Slice 1 of 12, 30.0 mm I"
    assert slice_position(image.geometry, 11) == "Slice 12 of 12, 3.0 mm S"
    coronal = read_image(tmp_path / "v.nii.gz", slice_axis=1).geometry
    assert sides_of(coronal) == "RLSI" and slice_position(coronal, 0) == "Slice 1 of 200, 60.0 mm A"
    sagittal = read_image(tmp_path / "v.nii.gz", slice_axis=0).geometry
    assert sides_of(sagittal) == "APSI" and slice_position(sagittal, 0)[-9:] == "40.0 mm R"
    shown = frames(image.geometry, [3, 7], torch.zeros(2, 1, 200, 160), {"pred": np.zeros((3, 200, 160), int)})
    assert [frame.caption for frame in shown] == ["Slice 4 of 12, 21.0 mm I", "Slice 8 of 12, 9.0 mm I"]
    panels = [("Query", plain())]
    figures = [CaseFigure("v", "", panels, frames=shown, sides="RLAP", width_mm=80)]
    write_report(tmp_path / "report.html", Report("R", figures=figures))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    # A bar of 20 mm in a picture of 80 mm, and four letters, on the panel and both frames.
    assert html.count('class="bar" style="width:25.00%">20 mm<') == 3 and html.count('class="side ') == 12


def test_many_volumes_get_few_slices_each():
    assert [frames_per_case(cases) for cases in (0, 1, 30, 60, 1000)] == [32, 32, 20, 10, 9]


@pytest.mark.parametrize("kind", [CT, PERCENTILES])
def test_shown_slices_are_scaled_as_in_the_whole_volume(kind):
    slices = np.linspace(-1000, 1000, 12 * 8 * 8, dtype=np.float32).reshape(12, 1, 8, 8)
    settings = ScaleIntensityByModalityd()
    scaling = Scaling(kind, "stated")
    whole = scale_intensity(torch.from_numpy(slices), scaling, settings.ct_window, settings.percentiles)
    shown = scaled_slices(SimpleNamespace(slices=slices), scaling, settings, [3, 9])
    torch.testing.assert_close(shown, whole[[3, 9]])
    assert shown[0].mean() < shown[1].mean()
