"""Class maps and maps: laid on their image's grid, and written on it."""

import os
import re
import tracemalloc
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import tifffile
from PIL import Image

from sam2sgp.data.io import (
    is_binary_255,
    map_suffix,
    output_suffix,
    read_image,
    read_label,
    softened_border,
    write_label,
    write_map,
)
from sam2sgp.errors import DataError
from tests.helpers.dicom_files import write_dicom
from tests.helpers.nifti_files import OBLIQUE, reoriented, save_nifti

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("codes", ["RAS", "PIR", "SLP"])
def test_written_label_has_the_world_positions_of_its_image_in_another_library(tmp_path, codes):
    stored = reoriented(RNG.normal(size=(5, 6, 7)).astype(np.float32), OBLIQUE, codes)
    nib.save(stored, tmp_path / "a.nii.gz")
    geometry = read_image(tmp_path / "a.nii.gz").geometry
    labels = RNG.integers(0, 4, geometry.shape)
    write_label(tmp_path / "out.nii.gz", labels, geometry)
    query, written = (SimpleITK.ReadImage(str(tmp_path / name)) for name in ("a.nii.gz", "out.nii.gz"))
    assert query.GetSize() == written.GetSize()
    for index in ((0, 0, 0), (1, 2, 3), tuple(length - 1 for length in query.GetSize())):
        expected = query.TransformIndexToPhysicalPoint(index)
        assert np.allclose(written.TransformIndexToPhysicalPoint(index), expected, atol=1e-4)
        assert np.allclose(geometry.affine @ [*index, 1], [-expected[0], -expected[1], expected[2], 1], atol=1e-3)
    header = nib.load(tmp_path / "out.nii.gz").header
    assert header.get_data_dtype() == np.uint8
    for name in ("sform_code", "qform_code", "xyzt_units", "srow_x", "quatern_b", "qoffset_x"):
        assert np.array_equal(header[name], stored.header[name]), name
    assert np.allclose(header.get_zooms(), stored.header.get_zooms())
    small = read_label(tmp_path / "out.nii.gz", geometry)
    assert small.dtype == np.uint8 and np.array_equal(small, labels)
    write_label(tmp_path / "many.nii.gz", 1000 * labels, geometry)
    assert read_label(tmp_path / "many.nii.gz", geometry).dtype == np.uint16


@pytest.mark.parametrize("codes", ["LPS", "PIR", "SAL"])
def test_label_with_other_axis_order_is_laid_on_the_image(tmp_path, codes):
    affine = nib.affines.from_matvec(nib.eulerangles.euler2mat(np.pi / 4, 0.1, 0.0), [1.0, 2.0, 3.0])
    array = RNG.integers(0, 3, (5, 5, 5)).astype(np.uint8)
    image = read_image(save_nifti(tmp_path / "a.nii.gz", array, affine))
    nib.save(reoriented(array, affine, codes), tmp_path / "b.nii.gz")
    assert np.array_equal(read_label(tmp_path / "b.nii.gz", image.geometry), image.slices[:, 0])


def test_label_follows_the_image_slice_axis(tmp_path):
    array = RNG.integers(0, 3, (4, 5, 6)).astype(np.uint8)
    path = save_nifti(tmp_path / "a.nii.gz", array)
    image = read_image(path, slice_axis=1)
    assert np.array_equal(read_label(path, image.geometry), image.slices[:, 0])
    assert np.array_equal(read_label(path, slice_axis=1), image.slices[:, 0])


def test_label_of_another_size_is_an_error_stating_both(tmp_path):
    image = read_image(save_nifti(tmp_path / "a.nii.gz", np.zeros((4, 5, 6), np.uint8)))
    with pytest.raises(DataError, match="b.nii.gz.*4x5x6.*4x5x7"):
        read_label(save_nifti(tmp_path / "b.nii.gz", np.zeros((4, 5, 7), np.uint8)), image.geometry)
    Image.new("L", (8, 9)).save(tmp_path / "a.png")
    Image.new("L", (9, 8)).save(tmp_path / "b.png")
    with pytest.raises(DataError, match="9x8 .*8x9; "):
        read_label(tmp_path / "b.png", read_image(tmp_path / "a.png").geometry)


@pytest.mark.parametrize(("shift", "fits"), [(0.005, True), (0.02, False), (1.0, False)])
def test_label_off_the_grid_of_its_image_is_an_error(tmp_path, shift, fits):
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    image = read_image(save_nifti(tmp_path / "a.nii.gz", np.zeros((4, 5, 6), np.uint8), affine))
    affine[0, 3] += 2 * shift
    path = save_nifti(tmp_path / "b.nii.gz", np.zeros((4, 5, 6), np.uint8), affine)
    if fits:
        assert read_label(path, image.geometry).shape == (6, 5, 4)
    else:
        with pytest.raises(DataError, match="b.nii.gz.*voxels away"):
            read_label(path, image.geometry)


def test_volume_label_of_a_picture_and_picture_label_of_a_radiograph(tmp_path):
    values = RNG.integers(0, 3, (6, 7)).astype(np.uint8)
    Image.fromarray(values * 9).save(tmp_path / "a.png")
    geometry = read_image(tmp_path / "a.png").geometry
    for affine in (np.eye(4), np.diag([-1.0, -1.0, 1.0, 1.0])):
        path = save_nifti(tmp_path / "a.nii.gz", values.T[..., None], affine)
        assert np.array_equal(read_label(path, geometry)[0], values)
    Image.fromarray(values).save(tmp_path / "b.png")
    radiograph = read_image(write_dicom(tmp_path / "b.dcm", values, "DX")).geometry
    assert np.array_equal(read_label(tmp_path / "b.png", radiograph)[0], values)
    turned = read_image(save_nifti(tmp_path / "c.nii.gz", values)).geometry
    with pytest.raises(DataError, match="found a picture"):
        read_label(tmp_path / "b.png", turned)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp"])
def test_binary_picture_of_255_is_class_1(tmp_path, name):
    mask = RNG.random((6, 7)) > 0.5
    for values, binary in ((mask * 255, True), (np.full((6, 7), 255), True), (mask * 2, False), (mask * 0, False)):
        Image.fromarray(values.astype(np.uint8)).save(tmp_path / name)
        assert is_binary_255(tmp_path / name) is binary
        assert np.array_equal(read_label(tmp_path / name)[0], values // 255 if binary else values)


def test_255_in_a_volume_is_a_class_value(tmp_path):
    path = save_nifti(tmp_path / "a.nii.gz", np.full((3, 3, 3), 255, np.uint8))
    assert (read_label(path) == 255).all() and not is_binary_255(path)


def test_grey_label_stored_as_colours_is_read_and_colours_are_refused(tmp_path):
    values = RNG.integers(0, 3, (6, 7)).astype(np.uint8)
    Image.fromarray(np.stack([values] * 3, -1)).save(tmp_path / "a.png")
    assert np.array_equal(read_label(tmp_path / "a.png")[0], values)
    Image.fromarray(np.stack([values, values, values * 2], -1)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="colour picture"):
        read_label(tmp_path / "a.png")


def test_what_is_no_class_map_is_refused(tmp_path):
    with pytest.raises(DataError, match="0.25.*probability map"):
        read_label(save_nifti(tmp_path / "a.nii.gz", np.full((3, 3, 3), 0.25)))
    with pytest.raises(DataError, match="nan"):
        read_label(save_nifti(tmp_path / "b.nii.gz", np.full((3, 3, 3), np.nan)))
    with pytest.raises(DataError, match="from 0"):
        read_label(save_nifti(tmp_path / "c.nii.gz", np.full((3, 3, 3), -1, np.int16)))
    with pytest.raises(DataError, match="2 along further axes"):
        read_label(save_nifti(tmp_path / "d.nii.gz", np.zeros((3, 3, 3, 2), np.uint8)))
    blurred = np.tile(np.arange(0, 256, 5, dtype=np.uint8), (9, 1))
    Image.fromarray(blurred).save(tmp_path / "e.png")
    with pytest.raises(DataError, match="blurred"):
        read_label(tmp_path / "e.png")
    Image.fromarray((RNG.random((20, 20)) > 0.5).astype(np.uint8) * 255).save(tmp_path / "f.jpg", quality=50)
    with pytest.raises(DataError, match="JPEG.*PNG"):
        read_label(tmp_path / "f.jpg")


def test_whole_numbers_stored_as_float_are_class_values(tmp_path):
    values = RNG.integers(0, 3, (4, 5, 6))
    path = save_nifti(tmp_path / "a.nii.gz", values.astype(np.float64), np.diag([-1.0, -1.0, 1.0, 1.0]))
    assert np.array_equal(read_label(path), values.transpose(2, 1, 0))


@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_of_a_long_label_little_is_held_next_to_its_file(tmp_path, dtype):
    """Of 1000 slices of 512 x 512 pixels one array of eight bytes a voxel is 2 GiB."""
    values = RNG.integers(0, 3, (64, 64, 64))
    path = save_nifti(tmp_path / "a.nii", values.astype(dtype), np.diag([-1.0, -1.0, 1.0, 1.0]))
    tracemalloc.start()
    try:
        label = read_label(path)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert label.dtype == np.uint8 and np.array_equal(label, values.transpose(2, 1, 0))
    assert most < 4 * values.size


@pytest.mark.parametrize("value, found", [(0.002, "0.002"), (-1.0, "-1"), (65536.0, "65536"), (np.inf, "inf")])
def test_one_wrong_value_among_real_ones_is_told(tmp_path, value, found):
    values = np.zeros((3, 4, 5))
    values[1, 2, 3] = value
    with pytest.raises(DataError, match=f"found {found}"):
        read_label(save_nifti(tmp_path / "a.nii.gz", values))


@pytest.mark.parametrize("binary", [False, True])
def test_picture_label_round_trip(tmp_path, binary):
    Image.new("RGB", (7, 6)).save(tmp_path / "a.jpg")
    geometry = read_image(tmp_path / "a.jpg").geometry
    labels = RNG.integers(0, 2, (1, 6, 7))
    assert output_suffix(geometry) == ".png"
    write_label(tmp_path / "out.png", labels, geometry, binary_255=binary)
    stored = itk.array_from_image(itk.imread(str(tmp_path / "out.png")))
    assert stored.dtype == np.uint8 and np.array_equal(stored, labels[0] * (255 if binary else 1))
    assert np.array_equal(read_label(tmp_path / "out.png", geometry), labels)
    write_label(tmp_path / "out.png", labels * 300, geometry)
    assert np.array_equal(read_label(tmp_path / "out.png", geometry), labels * 300)


def test_more_than_255_classes_are_stored_in_16_bits(tmp_path):
    geometry = read_image(save_nifti(tmp_path / "a.nii.gz", np.zeros((4, 5, 6), np.uint8))).geometry
    labels = np.arange(120).reshape(geometry.shape) * 3
    write_label(tmp_path / "b.nii.gz", labels, geometry)
    assert nib.load(tmp_path / "b.nii.gz").get_data_dtype() == np.uint16
    assert np.array_equal(read_label(tmp_path / "b.nii.gz", geometry), labels)


def test_failed_write_leaves_the_old_label_and_no_other_file(tmp_path, monkeypatch):
    geometry = read_image(save_nifti(tmp_path / "a.nii.gz", np.zeros((4, 5, 6), np.uint8))).geometry
    write_label(tmp_path / "b.nii.gz", np.ones(geometry.shape, np.uint8), geometry)
    before = sorted(os.listdir(tmp_path))

    def full_disk(image, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib, "save", full_disk)
    with pytest.raises(DataError, match="b.nii.gz.*No space left"):
        write_label(tmp_path / "b.nii.gz", np.zeros(geometry.shape, np.uint8), geometry)
    assert sorted(os.listdir(tmp_path)) == before and read_label(tmp_path / "b.nii.gz", geometry).all()


def test_label_that_does_not_fit_is_not_written(tmp_path):
    Image.new("L", (7, 6)).save(tmp_path / "a.png")
    geometry = read_image(tmp_path / "a.png").geometry
    for labels, options in (
        (np.zeros((1, 7, 6), int), {}),
        (np.full((1, 6, 7), -1), {}),
        (np.full((1, 6, 7), 2), {"binary_255": True}),
        (np.zeros((1, 6, 7)), {}),
    ):
        with pytest.raises(DataError, match="out.png"):
            write_label(tmp_path / "out.png", labels, geometry, **options)
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("codes", ["RAS", "PIR", "SLP"])
def test_written_map_lies_on_its_image_in_another_library(tmp_path, codes):
    nib.save(reoriented(RNG.normal(size=(5, 6, 7)).astype(np.float32), OBLIQUE, codes), tmp_path / "a.nii.gz")
    image = read_image(tmp_path / "a.nii.gz")
    # The image's own values and their negatives as two channels, in half precision.
    values = image.slices[:, 0].astype(np.float16)
    write_map(tmp_path / "one.nii.gz", values, image.geometry)
    write_map(tmp_path / "two.nii.gz", np.stack([values, -values], 1), image.geometry)
    query, one, two = (SimpleITK.ReadImage(str(tmp_path / name)) for name in ("a.nii.gz", "one.nii.gz", "two.nii.gz"))
    assert one.GetSize() == query.GetSize() and two.GetSize() == (*query.GetSize(), 2)
    index = (1, 2, 3)
    assert np.allclose(one.TransformIndexToPhysicalPoint(index), query.TransformIndexToPhysicalPoint(index), atol=1e-4)
    expected = SimpleITK.GetArrayFromImage(query).astype(np.float16)
    assert np.array_equal(SimpleITK.GetArrayFromImage(one), expected)
    assert np.array_equal(SimpleITK.GetArrayFromImage(two), np.stack([expected, -expected]))
    for name in ("one.nii.gz", "two.nii.gz"):
        written = nib.load(tmp_path / name)
        assert written.get_data_dtype() == np.float32 and np.allclose(written.affine, image.geometry.affine, atol=1e-5)


def test_map_of_a_picture_is_a_tiff_with_a_page_for_each_channel(tmp_path):
    Image.new("RGB", (7, 6)).save(tmp_path / "a.jpg")
    geometry = read_image(tmp_path / "a.jpg").geometry
    values = RNG.random((1, 3, 6, 7)).astype(np.float16)
    assert map_suffix(geometry) == ".tif"
    write_map(tmp_path / "a.tif", values, geometry)
    pages = tifffile.imread(tmp_path / "a.tif")
    assert pages.dtype == np.float32 and np.array_equal(pages, values[0])
    write_map(tmp_path / "b.tif", values[:, 0], geometry)
    assert np.array_equal(tifffile.imread(tmp_path / "b.tif"), values[0, 0])


def test_map_of_a_flat_volume_and_one_that_does_not_fit(tmp_path):
    geometry = read_image(save_nifti(tmp_path / "a.nii", np.zeros((4, 5), np.uint8))).geometry
    values = RNG.random((1, 2, 5, 4))
    write_map(tmp_path / "one.nii.gz", values[:, 0], geometry)
    write_map(tmp_path / "two.nii.gz", values, geometry)
    assert nib.load(tmp_path / "one.nii.gz").shape == (4, 5)
    assert nib.load(tmp_path / "two.nii.gz").shape == (4, 5, 1, 2)
    for shape, name in (((1, 4, 5), "c.nii.gz"), ((2, 5, 4), "c.nii.gz"), ((1, 5, 4), "c.tif")):
        with pytest.raises(DataError, match="c[.]"):
            write_map(tmp_path / name, np.zeros(shape), geometry)


def test_long_map_is_never_held_in_single_precision(tmp_path):
    geometry = read_image(save_nifti(tmp_path / "a.nii", np.zeros((64, 64, 300), np.uint8))).geometry
    values = np.zeros((300, 4, 64, 64), np.float16)
    tracemalloc.start()
    write_map(tmp_path / "b.nii.gz", values, geometry)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < values.nbytes / 2


@pytest.mark.parametrize(
    "value, dtype", [(2**64 - 1, np.uint64), (2**40, np.int64), (1e30, np.float64), (65536, np.int32)]
)
def test_values_that_are_no_classes_are_named_as_they_are(tmp_path, value, dtype):
    array = np.full((3, 3, 3), value, dtype)
    nib.save(nib.Nifti1Image(array, np.eye(4), dtype=dtype), tmp_path / "a.nii.gz")
    with pytest.raises(DataError, match=rf"up to 65535, found {re.escape(f'{array.flat[0]:g}')};"):
        read_label(tmp_path / "a.nii.gz")


def test_masks_that_were_blurred_or_stored_as_jpeg_before_are_refused_and_class_maps_are_not(tmp_path):
    rows, columns = np.mgrid[:64, :80]
    mask = Image.fromarray((((rows - 30) ** 2 + (columns - 40) ** 2 < 200) * 255).astype(np.uint8))
    mask.save(tmp_path / "mask.jpg", quality=95)
    spoilt = {
        "jpeg": Image.open(tmp_path / "mask.jpg"),
        "resized": mask.resize((160, 128)).resize((80, 64), Image.Resampling.BILINEAR),
    }
    white = np.asarray(mask).copy()
    white[::2][white[::2] == 255] = 254
    spoilt["nearly"] = Image.fromarray(white)
    for name, picture in spoilt.items():
        picture.save(tmp_path / f"{name}.png")
        assert len(np.unique(np.asarray(Image.open(tmp_path / f"{name}.png")))) < 32, name
        with pytest.raises(DataError, match=f"{name}.png: expected a class map.*threshold it.*16 bits"):
            read_label(tmp_path / f"{name}.png")
    # What the sentence tells one to do.
    Image.fromarray(white.astype(np.uint16)).save(tmp_path / "deep.png")
    assert np.array_equal(read_label(tmp_path / "deep.png")[0], white)
    for values in ([0, 1, 2, 3, 255], [0, 85, 170, 255], [0, 128, 255], [0, 100, 101, 102], list(range(31))):
        stored = np.array(values, np.uint8)[RNG.integers(0, len(values), (20, 30))]
        Image.fromarray(stored).save(tmp_path / "classes.png")
        assert np.array_equal(read_label(tmp_path / "classes.png")[0], stored)


def test_masks_with_a_softened_border_are_refused_whatever_number_of_greys_it_has(tmp_path):
    """Reduced to a half by averaging, a mask has three greys, each of which was taken as a class."""
    rows, columns = np.mgrid[:128, :160]
    inside = (rows - 60) ** 2 / 1.5 + (columns - 70) ** 2 < 35**2
    inside |= (abs(rows - 100) < 9) & (abs(columns - 130) < 12)
    mask = Image.fromarray((inside * 255).astype(np.uint8))
    for part, resample in ((2, "BOX"), (3, "BOX"), (4, "BOX"), (0.5, "BILINEAR")):
        soft = mask.resize((int(160 / part), int(128 / part)), Image.Resampling[resample])
        assert 4 <= len(np.unique(np.asarray(soft))) < 32
        soft.save(tmp_path / "soft.png")
        with pytest.raises(DataError, match="soft.png: expected a class map.*blurred, resized"):
            read_label(tmp_path / "soft.png")
    # Shells of classes around each other, however thin, are none.
    distance = np.hypot(rows - 60, columns - 70)
    for thickness in (1, 2, 5):
        shells = np.select([distance < 20 + thickness * number for number in range(4)], [255, 170, 85, 28])
        Image.fromarray(shells.astype(np.uint8)).save(tmp_path / "classes.png")
        assert np.array_equal(read_label(tmp_path / "classes.png")[0], shells)


def test_one_grey_along_the_border_of_a_mask_may_be_a_softened_one_and_an_area_is_a_class():
    mask = np.zeros((1, 16, 16), np.uint8)
    mask[0, 4:10, 4:10] = 255
    border = mask.copy()
    border[0, 4, 4:10] = 128
    area = mask.copy()
    area[0, 11:15, 4:10] = 128
    assert [softened_border(labels) for labels in (mask, border, area)] == [None, 128, None]
    assert softened_border(np.minimum(border, 2)) is None
