"""One volume in many files: however its axes are stored, inference finds the same voxels at the same places."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from tests.helpers.bundle_runs import run
from tests.helpers.dicom_files import write_series

# Orders and directions in which SimpleITK stores the axes; the first is the way of NIfTI phantoms in LPS terms.
ORDERS = {"reference.nii.gz": "LPS", "upside_down.nii.gz": "LPI", "turned.nrrd": "RAI"}
ORDERS |= {"sagittal_first.nii.gz": "PIR", "slices_first.mha": "SPL"}
ROTATION = nib.eulerangles.euler2mat(0.35, -0.3, 0.25)


@pytest.fixture(scope="module")
def outputs(phantoms, tmp_path_factory):
    """(queries, results) of one run with the embedded weights on all forms of one phantom volume."""
    queries, output = (tmp_path_factory.mktemp(name) for name in ("queries", "results"))
    source = sorted((phantoms / "queries" / "ct").rglob("*.nii.gz"))[0]
    image = SimpleITK.Cast(SimpleITK.ReadImage(str(source)), SimpleITK.sitkInt16)
    for name, order in ORDERS.items():
        SimpleITK.WriteImage(SimpleITK.DICOMOrient(image, order), str(queries / name))
    plain = nib.load(queries / "reference.nii.gz")
    oblique = nib.affines.from_matvec(ROTATION @ plain.affine[:3, :3], [11.0, -22.0, 33.0])
    nib.save(nib.Nifti1Image(np.asarray(plain.dataobj), oblique), queries / "oblique.nii.gz")
    image = SimpleITK.DICOMOrient(image, "LPS")
    spacing = image.GetSpacing()
    write_series(
        queries / "series",
        SimpleITK.GetArrayFromImage(image),
        spacing=(spacing[2], spacing[1], spacing[0]),
        origin=image.GetOrigin(),
        intercept=0.0,
    )
    support = str(phantoms / "support" / "ct")
    run(
        "inferring",
        "inference.json",
        dataset_dir=str(queries),
        support_dir=support,
        output_dir=str(output),
        progress=False,
        report_figures=0,
        # Few and small, for speed.
        image_size=64,
        k=2,
        slices_per_class=1,
        support_max_items=4,
    )
    return queries, output


def label(output, name: str) -> SimpleITK.Image:
    return SimpleITK.ReadImage(str(output / f"{name.split('.')[0]}.nii.gz"))


@pytest.mark.parametrize("name", [*ORDERS, "series"])
def test_order_and_direction_of_axes_change_no_voxel_of_the_result(outputs, name):
    queries, output = outputs
    reference, found = label(output, "reference"), label(output, name)
    if name in ORDERS:
        query = SimpleITK.ReadImage(str(queries / name))
        assert found.GetSize() == query.GetSize()
        np.testing.assert_allclose(found.GetDirection(), query.GetDirection(), atol=1e-5)
        np.testing.assert_allclose(found.GetOrigin(), query.GetOrigin(), atol=1e-4)
    # Nearest neighbour, and nothing is lost: each voxel of one lies on a voxel of the other.
    placed = SimpleITK.Resample(found, reference, SimpleITK.Transform(), SimpleITK.sitkNearestNeighbor, 99)
    expected = SimpleITK.GetArrayFromImage(reference)
    assert len(np.unique(expected)) > 2 and 0.01 < (expected > 0).mean() < 0.5
    assert np.array_equal(SimpleITK.GetArrayFromImage(placed), expected)


def test_an_oblique_affine_gives_exactly_the_same_voxels_at_its_own_places(outputs):
    """Slices are taken along the stored axes, never resampled, so a rotation of less than 45 degrees changes none."""
    queries, output = outputs
    reference, found = (nib.load(output / f"{name}.nii.gz") for name in ("reference", "oblique"))
    assert np.array_equal(np.asarray(found.dataobj), np.asarray(reference.dataobj))
    np.testing.assert_allclose(found.affine, nib.load(queries / "oblique.nii.gz").affine, atol=1e-5)
    assert np.abs(found.affine[:3, :3] - reference.affine[:3, :3]).max() > 0.2
