"""Images as the review page gets them: exact where they are whole numbers, and through the network's window."""

import nibabel as nib
import numpy as np
import torch

from lib.http.volumes import Volumes
from sam2sgp.data import read_image
from sam2sgp.transforms import ScaleIntensityByModalityd, SupportScaling
from tests.helpers.pages import SCALE


def test_whole_numbers_are_exact_and_others_close(tmp_path):
    volumes = Volumes(SCALE)
    for values in (
        np.linspace(-1e-3, 7e-3, 60).reshape(3, 4, 5).astype(np.float32),
        np.arange(60, dtype=np.float32).reshape(3, 4, 5) * 40000,
        np.full((3, 4, 5), 7, np.float32),
        np.arange(60, dtype=np.float32).reshape(3, 4, 5) - 1024,
        # Of a range that 8 bits can hold, above what they can.
        np.arange(60, dtype=np.float32).reshape(3, 4, 5) + 230,
        # Of a range that float32 can't hold, and of one below its smallest normal number.
        np.linspace(-3e38, 3e38, 60).reshape(3, 4, 5).astype(np.float32),
        np.linspace(0, 1e-40, 60).reshape(3, 4, 5).astype(np.float32),
    ):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.nii.gz"
        nib.save(nib.Nifti1Image(values, np.eye(4)), path)
        shown = volumes.image(path)
        restored = shown.slices[..., 0] * shown.slope + shown.intercept
        truth = read_image(path).slices[:, 0]
        assert np.abs(restored - truth).max() <= np.ptp(values.astype(np.float64)) / 65535 * 0.51
        assert volumes.image(path) is shown


def test_the_window_at_first_is_that_of_the_network(tmp_path):
    """With what the operator set: what lies within it, and nothing else, is neither black nor white."""
    values = np.random.default_rng(0).normal(0, 300, (3, 16, 20)).astype(np.float32)
    path = tmp_path / "image.nii.gz"
    nib.save(nib.Nifti1Image(values, np.eye(4)), path)
    for modality, kind, bounds in (
        ("CT", "ct", (-50.0, 150.0)),
        ("MR", "percentiles", np.percentile(values, (10, 90))),
    ):
        scale = ScaleIntensityByModalityd(ct_window=(-50.0, 150.0), percentiles=(10.0, 90.0), modality=modality)
        volumes = Volumes(scale)
        shown = volumes.image(path)
        window, found = volumes.window(shown, SupportScaling())
        assert found == kind and np.allclose(window, bounds)
        scaled = scale({"image": torch.from_numpy(values)[:, None], "is_rgb": False, "geometry": shown.geometry})
        within = (scaled["image"] > 0) & (scaled["image"] < 1)
        assert torch.equal(within[:, 0], torch.from_numpy((values > window[0]) & (values < window[1])))
