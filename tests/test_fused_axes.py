"""Isotropic volumes segmented along all three axes."""

import nibabel as nib
import numpy as np
import pytest

from sam2sgp.data import read_image
from tests.bundle_runs import run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Support and queries of small isotropic volumes with a bright ball, and one query with thick slices."""
    root = tmp_path_factory.mktemp("isotropic")
    grid = np.stack(np.meshgrid(*(np.arange(length) for length in (24, 20, 16)), indexing="ij"), -1)
    for name in ("support/images", "support/labels", "queries"):
        (root / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(4):
        ball = np.linalg.norm(grid - [9 + number, 10, 8], axis=-1) < 5
        image = ball * 100 + rng.normal(0, 10, ball.shape)
        volume = nib.Nifti1Image(image.astype(np.float32), np.eye(4))
        if number < 3:
            nib.save(volume, root / "support" / "images" / f"case{number}.nii.gz")
            label = nib.Nifti1Image(ball.astype(np.uint8), np.eye(4))
            nib.save(label, root / "support" / "labels" / f"case{number}.nii.gz")
        else:
            nib.save(volume, root / "queries" / "isotropic.nii.gz")
            thick = nib.Nifti1Image(image.astype(np.float32), np.diag([1.0, 1.0, 4.0, 1.0]))
            nib.save(thick, root / "queries" / "thick.nii.gz")
    return root


def probabilities(folders, output, **settings) -> dict[str, np.ndarray]:
    run(
        "inferring",
        "inference.json",
        dataset_dir=str(folders / "queries"),
        support_dir=str(folders / "support"),
        output_dir=str(output),
        progress=False,
        report_figures=0,
        save_probability=True,
        image_size=64,
        k=2,
        slices_per_class=2,
        region_below=0,
        **settings,
    )
    names = ("isotropic", "thick")
    return {name: nib.load(output / f"{name}_probability.nii.gz").get_fdata() for name in names}


def test_an_isotropic_volume_gets_the_mean_over_three_axes_and_others_are_as_before(folders, tmp_path):
    along = [probabilities(folders, tmp_path / str(axis), slice_axis=axis)["isotropic"] for axis in range(3)]
    plain = probabilities(folders, tmp_path / "plain")
    fused = probabilities(folders, tmp_path / "fused", fuse_axes=True)
    assert np.abs(along[0] - along[2]).max() > 0.2
    np.testing.assert_allclose(plain["isotropic"], along[2], atol=2e-3)
    np.testing.assert_allclose(fused["isotropic"], np.mean(along, 0), atol=4e-3)
    np.testing.assert_array_equal(fused["thick"], plain["thick"])
    label = np.asarray(nib.load(tmp_path / "fused" / "isotropic.nii.gz").dataobj)
    np.testing.assert_array_equal(label, fused["isotropic"].argmax(-1))


@pytest.mark.parametrize(
    ("spacing", "shape", "isotropic"),
    [((1, 1, 1.4), (8, 8, 8), True), ((1, 1, 1.6), (8, 8, 8), False), ((1, 1, 1), (8, 8, 1), False)],
)
def test_what_counts_as_isotropic(tmp_path, spacing, shape, isotropic):
    path = tmp_path / "image.nii.gz"
    nib.save(nib.Nifti1Image(np.random.rand(*shape).astype(np.float32), np.diag([*spacing, 1.0])), path)
    assert read_image(path).geometry.is_isotropic == isotropic
