"""Reading NRRD and MetaImage files that SimpleITK wrote."""

from pathlib import Path

import nrrd
import numpy as np
import pytest
import SimpleITK

from sam2sgp.data.io import image_stem, read_image, read_label, write_label
from sam2sgp.errors import DataError

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


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mhd"])
def test_what_itk_passes_on_of_a_nifti_header_does_not_matter(tmp_path, suffix):
    array = RNG.integers(0, 100, (4, 5, 6)).astype(np.int16)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(tmp_path / "a.nii.gz"))
    # Keys such as `dim[0]` and `srow_x`.
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(tmp_path / "a.nii.gz")), str(tmp_path / f"b{suffix}"))
    image = read_image(tmp_path / f"b{suffix}")
    assert np.array_equal(image.geometry.to_native(image.slices[:, 0]), array.T)


def test_two_dimensional_nrrd_and_colour_metaimage(tmp_path):
    array = np.arange(20, dtype=np.uint8).reshape(4, 5)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(tmp_path / "a.nrrd"))
    image = read_image(tmp_path / "a.nrrd")
    assert np.array_equal(image.slices[0, 0], array) and image.geometry.native_shape == (5, 4)
    colours = RNG.integers(0, 255, (4, 5, 3)).astype(np.uint8)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(colours, isVector=True), str(tmp_path / "b.mha"))
    image = read_image(tmp_path / "b.mha")
    assert image.is_rgb and np.array_equal(image.slices[0], colours.transpose(2, 0, 1))


def segmentation(path: Path, array: np.ndarray, image: SimpleITK.Image, start=(0, 0, 0), **keys) -> Path:
    """As 3D Slicer writes it: array (x, y, z) or layers (layer, x, y, z), from voxel `start` of its image on."""
    origin = image.TransformIndexToPhysicalPoint(start)
    directions = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    layered = array.ndim == 4
    header = {
        "space": "left-posterior-superior",
        "kinds": ["list"] * layered + ["domain"] * 3,
        "space directions": np.vstack([[[np.nan] * 3] * layered, directions.T]) if layered else directions.T,
        "space origin": origin,
        "encoding": "gzip",
        **keys,
    }
    nrrd.write(str(path), array, header)
    return path


@pytest.fixture
def reference(tmp_path) -> SimpleITK.Image:
    image = SimpleITK.GetImageFromArray(np.zeros((9, 8, 7), np.int16))
    image.SetSpacing((1.5, 0.8, 3.0))
    image.SetOrigin((-40.0, 12.0, 7.0))
    image.SetDirection((0, 1, 0, -1, 0, 0, 0, 0, 1))
    SimpleITK.WriteImage(image, str(tmp_path / "image.nrrd"))
    return image


def pasted(whole: SimpleITK.Image, part: np.ndarray, start: tuple) -> np.ndarray:
    """The part (x, y, z) in the whole (z, y, x), by SimpleITK."""
    small = SimpleITK.GetImageFromArray(part.T.astype(np.int16))
    return SimpleITK.GetArrayFromImage(SimpleITK.Paste(whole, small, small.GetSize(), destinationIndex=start))


@pytest.mark.parametrize("start", [(0, 0, 0), (2, 1, 3), (3, 4, 5)])
def test_cropped_segmentation_is_laid_in_place(tmp_path, reference, start):
    part = RNG.integers(0, 3, (4, 4, 4)).astype(np.uint8)
    path = segmentation(tmp_path / "a.seg.nrrd", part, reference, start, Segment0_LabelValue="1")
    geometry = read_image(tmp_path / "image.nrrd").geometry
    found = geometry.to_native(read_label(path, geometry))
    assert np.array_equal(found.T, pasted(reference, part, start))
    # Stored with an axis the other way round.
    turned = SimpleITK.Image(reference)
    turned.SetOrigin(reference.TransformIndexToPhysicalPoint((start[0] + 3, start[1], start[2])))
    turned.SetDirection((0, 1, 0, 1, 0, 0, 0, 0, 1))
    path = segmentation(tmp_path / "b.seg.nrrd", part[::-1], turned, Segment0_LabelValue="1")
    assert np.array_equal(geometry.to_native(read_label(path, geometry)), found)


def test_segments_outside_or_between_the_voxels_of_their_image_are_refused(tmp_path, reference):
    part = np.zeros((4, 4, 4), np.uint8)
    part[1, 1, 1] = 1
    geometry = read_image(tmp_path / "image.nrrd").geometry
    found = read_label(segmentation(tmp_path / "a.seg.nrrd", part, reference, (-1, 5, 6)), geometry)
    assert geometry.to_native(found)[0, 6, 7] == 1 and found.sum() == 1
    with pytest.raises(DataError, match="b.seg.nrrd.*outside"):
        read_label(segmentation(tmp_path / "b.seg.nrrd", part, reference, (-2, 5, 6)), geometry)
    moved = SimpleITK.Image(reference)
    moved.SetOrigin((-40.4, 12.0, 7.0))
    with pytest.raises(DataError, match="c.seg.nrrd.*lie between them"):
        read_label(segmentation(tmp_path / "c.seg.nrrd", part, moved), geometry)
    nrrd.write(str(tmp_path / "d.nrrd"), part)
    with pytest.raises(DataError, match="d.nrrd.*7x8x9.*4x4x4"):
        read_label(tmp_path / "d.nrrd", geometry)


def test_layers_of_a_segmentation_are_one_class_map_unless_they_overlap(tmp_path, reference):
    layers = np.zeros((2, 7, 8, 9), np.uint8)
    layers[0, 1] = 1
    layers[0, 2] = 2
    layers[1, 4] = 1
    geometry = read_image(tmp_path / "image.nrrd").geometry
    keys = {"Segment0_LabelValue": "1", "Segment1_LabelValue": "2", "Segment2_LabelValue": "1", "Segment2_Layer": "1"}
    path = segmentation(tmp_path / "a.seg.nrrd", layers, reference, **keys)
    found = geometry.to_native(read_label(path, geometry))
    assert [int(found[x].max()) for x in range(7)] == [0, 1, 2, 0, 3, 0, 0] and (found[4] == 3).all()
    more = {**keys, "Segment2_LabelValue": "255", "Segment3_LabelValue": "300", "Segment3_Layer": "1"}
    layers[1, 4] = 255
    found = geometry.to_native(read_label(segmentation(tmp_path / "c.seg.nrrd", layers, reference, **more), geometry))
    assert [int(found[x].max()) for x in range(7)] == [0, 1, 2, 0, 255, 0, 0]
    layers[1, 4] = layers[1, 2] = 1
    with pytest.raises(DataError, match="b.seg.nrrd.*overlap"):
        read_label(segmentation(tmp_path / "b.seg.nrrd", layers, reference, **keys), geometry)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_voxels_of_unknown_size_have_no_spacing_and_components_are_no_colours(tmp_path, suffix):
    if suffix == ".nrrd":
        nrrd.write(str(tmp_path / "a.nrrd"), np.zeros((4, 5, 6), np.int16), {"encoding": "raw"})
    else:
        text = "ObjectType = Image\nNDims = 3\nDimSize = 4 5 6\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
        (tmp_path / "a.mha").write_bytes(text.encode() + bytes(240))
    assert read_image(tmp_path / f"a{suffix}").geometry.spacing is None
    vectors = SimpleITK.GetImageFromArray(np.zeros((4, 5, 6, 3), np.float32), isVector=True)
    SimpleITK.WriteImage(vectors, str(tmp_path / f"b{suffix}"))
    with pytest.raises(DataError, match="found 3 along further axes"):
        read_image(tmp_path / f"b{suffix}")


@pytest.mark.parametrize("spacings", [(1.0, np.nan, 2.0), (np.nan, np.nan, np.nan)])
def test_a_spacing_of_nan_is_not_known(tmp_path, spacings):
    nrrd.write(str(tmp_path / "a.nrrd"), np.zeros((4, 5, 6), np.int16), {"encoding": "raw", "spacings": spacings})
    geometry = read_image(tmp_path / "a.nrrd").geometry
    assert geometry.spacing is None and geometry.full_shape == (4, 5, 6)


@pytest.mark.parametrize("unit, is_read", [("mm", True), ("", True), ("cm", False), ("um", False)])
def test_units_other_than_millimetres_are_refused(tmp_path, unit, is_read):
    header = {"space": "left-posterior-superior", "space directions": np.eye(3) / 10, "space units": [unit] * 3}
    nrrd.write(str(tmp_path / "a.nrrd"), np.zeros((4, 5, 6), np.int16), header)
    if is_read:
        assert np.allclose(read_image(tmp_path / "a.nrrd").geometry.spacing, 0.1)
        return
    with pytest.raises(DataError, match=f"expected millimetres as the unit of space, found '{unit}'"):
        read_image(tmp_path / "a.nrrd")
