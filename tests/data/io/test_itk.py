"""Reading NRRD and MetaImage files that SimpleITK wrote."""

import numpy as np
import pytest
import SimpleITK

from sam2sgp.data.io import (
    image_stem,
    read_image,
    write_label,
)

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mhd", ".seg.nrrd"])
@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.int32, np.float32])
def test_itk_formats_have_values_and_world_positions_of_simpleitk(tmp_path, suffix, dtype):
    array = RNG.integers(0, 100, (4, 5, 6)).astype(dtype)
    volume = SimpleITK.GetImageFromArray(array)
    volume.SetSpacing((0.5, 0.6, 2.0))
    volume.SetOrigin((7.0, -8.0, 9.0))
    volume.SetDirection((0, 0, 1, -1, 0, 0, 0, -1, 0))
    path = tmp_path / f"case{suffix}"
    SimpleITK.WriteImage(volume, str(path))
    image = read_image(path)
    geometry = image.geometry
    assert image_stem(path) == "case" and geometry.native_shape == (6, 5, 4)
    assert np.array_equal(geometry.to_native(image.slices[:, 0]), array.transpose(2, 1, 0))
    for index in ((0, 0, 0), (5, 1, 2)):
        x, y, z = volume.TransformIndexToPhysicalPoint(index)
        assert np.allclose(geometry.affine @ [*index, 1], [-x, -y, z, 1])
    write_label(tmp_path / "out.nii.gz", np.zeros(geometry.shape, np.uint8), geometry)
    written = SimpleITK.ReadImage(str(tmp_path / "out.nii.gz"))
    expected = volume.TransformIndexToPhysicalPoint((5, 1, 2))
    assert np.allclose(written.TransformIndexToPhysicalPoint((5, 1, 2)), expected, atol=1e-5)


def test_two_dimensional_nrrd_and_colour_metaimage(tmp_path):
    array = np.arange(20, dtype=np.uint8).reshape(4, 5)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(tmp_path / "a.nrrd"))
    image = read_image(tmp_path / "a.nrrd")
    assert np.array_equal(image.slices[0, 0], array) and image.geometry.native_shape == (5, 4)
    colours = RNG.integers(0, 255, (4, 5, 3)).astype(np.uint8)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(colours, isVector=True), str(tmp_path / "b.mha"))
    image = read_image(tmp_path / "b.mha")
    assert image.is_rgb and np.array_equal(image.slices[0], colours.transpose(2, 0, 1))
