"""Reading and writing files: geometry is checked with another library than the one that wrote the file."""

import gzip
import io
import os
import pickle
import tracemalloc
import warnings
import zlib
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK
import tifffile
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

from sam2sgp.data.io import (
    image_stem,
    is_binary_255,
    is_image,
    map_suffix,
    output_suffix,
    read_image,
    read_label,
    write_label,
    write_map,
)
from sam2sgp.errors import ConfigError, DataError
from tests.data.dicom_files import write_dicom, write_series

RNG = np.random.default_rng(0)
OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.3, -0.2, 0.25) @ np.diag([0.8, 0.9, 3.0]), [12.0, -34.0, 56.0]
)


def save_nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.0, 1.0, 1.0]) if affine is None else affine), path)
    return path


def reoriented(array: np.ndarray, affine: np.ndarray, codes: str) -> nib.Nifti1Image:
    image = nib.Nifti1Image(array, affine)
    target = nib.orientations.axcodes2ornt(tuple(codes))
    return image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(affine), target))


def test_axial_slice_has_rows_to_posterior_and_columns_to_the_left(tmp_path):
    array = np.zeros((4, 5, 6), np.int16)  # RAS+
    array[0, :, 2] = 1  # left
    array[:, 0, 2] += 2  # posterior
    image = read_image(save_nifti(tmp_path / "a.nii.gz", array))
    assert image.slices.shape == (6, 1, 5, 4) and image.slices.dtype == np.float32
    view = image.slices[2, 0]
    assert (view[:-1, -1] == 1).all() and (view[-1, :-1] == 2).all() and view[-1, -1] == 3
    assert image.geometry.slice_axis == 2 and image.modality is None and not image.is_rgb


@pytest.mark.parametrize(
    ("slice_axis", "bottom", "right"), [(0, (2, 0), (1, 0)), (1, (2, 0), (0, 0)), (2, (1, 0), (0, 0))]
)
def test_upright_views_have_inferior_at_the_bottom(tmp_path, slice_axis, bottom, right):
    # (axis, end) of the RAS+ array that must show at the bottom and at the right.
    for (axis, end), edge in ((bottom, np.s_[:, -1, :]), (right, np.s_[:, :, -1])):
        array = np.zeros((4, 5, 6), np.uint8)
        np.moveaxis(array, axis, 0)[end] = 1
        image = read_image(save_nifti(tmp_path / "a.nii", array), slice_axis)
        slices = image.slices[:, 0]
        assert (slices[edge] == 1).all() and slices.sum() == slices[edge].size
        assert image.geometry.slice_axis == slice_axis


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL", "ASR", "ILP"])
def test_stored_axis_order_does_not_change_the_view_and_is_restored_exactly(tmp_path, codes):
    array = RNG.integers(0, 3, (5, 6, 7)).astype(np.uint8)
    expected = read_image(save_nifti(tmp_path / "a.nii.gz", array, OBLIQUE)).slices
    stored = reoriented(array, OBLIQUE, codes)
    nib.save(stored, tmp_path / "b.nii.gz")
    image = read_image(tmp_path / "b.nii.gz")
    assert np.array_equal(image.slices, expected)
    native = image.geometry.to_native(image.slices[:, 0])
    assert np.array_equal(native, np.asarray(stored.dataobj))
    assert np.array_equal(image.geometry.from_native(native), image.slices[:, 0])


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
    assert header.get_data_dtype() == np.uint8 and header.get_xyzt_units()[0] == "mm"
    assert header["sform_code"] > 0 and header["qform_code"] > 0
    assert np.allclose(header.get_zooms(), stored.header.get_zooms())
    assert np.array_equal(read_label(tmp_path / "out.nii.gz", geometry), labels)


@pytest.mark.parametrize(
    ("zooms", "axis"),
    [((1, 1, 1), 2), ((1.4, 1, 1), 2), ((3, 1, 1), 0), ((1, 3, 1), 1), ((1, 1, 5), 2), ((1.5, 1.0, 1.0), 0)],
)
def test_auto_slices_along_the_thick_axis(tmp_path, zooms, axis):
    path = save_nifti(tmp_path / "a.nii.gz", np.zeros((4, 5, 6), np.uint8), np.diag([*zooms, 1.0]))
    geometry = read_image(path).geometry
    assert geometry.slice_axis == axis and geometry.spacing[0] == pytest.approx(zooms[axis])


def test_spacing_is_slice_row_column(tmp_path):
    path = save_nifti(tmp_path / "a.nii.gz", np.zeros((4, 5, 6), np.uint8), np.diag([-0.5, 0.7, 4.0, 1.0]))
    assert np.allclose(read_image(path).geometry.spacing, (4.0, 0.7, 0.5))


def test_header_in_microns_is_read_in_mm(tmp_path):
    image = nib.Nifti1Image(np.zeros((4, 5, 6), np.uint8), np.diag([500.0, 500.0, 500.0, 1.0]))
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "a.nii.gz")
    geometry = read_image(tmp_path / "a.nii.gz").geometry
    assert np.allclose(geometry.spacing, 0.5)
    write_label(tmp_path / "b.nii.gz", np.zeros(geometry.shape, np.uint8), geometry)
    assert np.allclose(SimpleITK.ReadImage(str(tmp_path / "b.nii.gz")).GetSpacing(), 0.5)


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1), (1, 5, 6), (5, 1, 6)])
def test_one_slice_image_gives_one_slice_and_its_own_dimensions_back(tmp_path, shape):
    array = np.arange(30, dtype=np.int16).reshape(shape)
    image = read_image(save_nifti(tmp_path / "a.nii.gz", array, np.diag([2.0, 3.0, 4.0, 1.0])), slice_axis=2)
    assert image.slices.shape[:2] == (1, 1)
    assert image.geometry.native_shape == shape
    labels = (image.slices[:, 0] > 7).astype(np.int64)
    write_label(tmp_path / "b.nii.gz", labels, image.geometry)
    written = nib.load(tmp_path / "b.nii.gz")
    assert written.shape == shape and np.array_equal(np.asarray(written.dataobj), array > 7)
    assert np.allclose(written.affine, np.diag([2.0, 3.0, 4.0, 1.0]))
    assert np.array_equal(read_label(tmp_path / "b.nii.gz", image.geometry), labels)


def test_four_dimensional_nifti_has_channels(tmp_path):
    array = RNG.normal(size=(4, 5, 6, 2)).astype(np.float32)
    image = read_image(save_nifti(tmp_path / "a.nii.gz", array, np.diag([-1.0, -1.0, 1.0, 1.0])))
    assert image.slices.shape == (6, 2, 5, 4) and image.geometry.native_shape == (4, 5, 6)
    assert np.array_equal(image.slices[3, 1], array[:, :, 3, 1].T)


def test_rgb_nifti_is_colour(tmp_path):
    colours = RNG.integers(0, 255, (4, 5, 6, 3)).astype(np.uint8)
    pixels = colours.view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    image = read_image(save_nifti(tmp_path / "a.nii.gz", pixels, np.diag([-1.0, -1.0, 1.0, 1.0])))
    assert image.is_rgb and np.array_equal(image.slices[2], colours[:, :, 2].transpose(2, 1, 0))


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


def test_pictures_keep_rows_columns_and_values(tmp_path):
    colours = RNG.integers(0, 255, (6, 7, 3)).astype(np.uint8)
    for name in ("a.png", "a.tif", "a.bmp"):
        Image.fromarray(colours).save(tmp_path / name)
        image = read_image(tmp_path / name)
        assert image.is_rgb and np.array_equal(image.slices[0], colours.transpose(2, 0, 1))
        assert image.geometry.spacing is None and image.geometry.native_shape == (6, 7)
        Image.fromarray(colours[..., 0]).save(tmp_path / name)
        image = read_image(tmp_path / name)
        assert not image.is_rgb and np.array_equal(image.slices[0, 0], colours[..., 0])


def test_alpha_is_dropped_without_darkening(tmp_path):
    pixels = RNG.integers(0, 255, (6, 7, 4)).astype(np.uint8)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png").slices[0], pixels[..., :3].transpose(2, 0, 1))
    Image.fromarray(pixels[..., :2], "LA").save(tmp_path / "b.png")
    assert np.array_equal(read_image(tmp_path / "b.png").slices[0, 0], pixels[..., 0])


def test_palette_picture_is_colour_as_image_and_index_as_label(tmp_path):
    index = RNG.integers(0, 3, (6, 7)).astype(np.uint8)
    picture = Image.fromarray(index, "P")
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    picture.info["transparency"] = b"\x00\xff"
    picture.save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.is_rgb and np.array_equal(image.slices[0, 2], 30 * (index + 1))
    assert np.array_equal(read_label(tmp_path / "a.png", image.geometry)[0], index)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bit_picture_keeps_its_values(tmp_path, name):
    values = (np.arange(42).reshape(6, 7) * 1560).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    assert np.array_equal(read_image(tmp_path / name).slices[0, 0], values)
    assert np.array_equal(read_label(tmp_path / name)[0], values)


def test_sixteen_bit_tiff_whose_zero_is_white_is_inverted(tmp_path):
    values = (np.arange(42).reshape(6, 7) * 1560).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo={262: 0})
    assert np.array_equal(read_image(tmp_path / "a.tif").slices[0, 0], 65535 - values.astype(int))


def test_low_depth_and_one_bit_pictures_hold_their_class_values(tmp_path):
    # Two-bit grey PNG, which Pillow reads but doesn't write.
    png = bytes.fromhex("89504e470d0a1a0a") + b"".join(
        _chunk(kind, data)
        for kind, data in (
            (b"IHDR", bytes([0, 0, 0, 4, 0, 0, 0, 1, 2, 0, 0, 0, 0])),
            (b"IDAT", zlib.compress(bytes([0, 0b00011011]))),
            (b"IEND", b""),
        )
    )
    (tmp_path / "a.png").write_bytes(png)
    assert read_label(tmp_path / "a.png").tolist() == [[[0, 1, 2, 3]]]
    mask = RNG.random((6, 7)) > 0.5
    Image.fromarray(mask).save(tmp_path / "b.png")
    assert np.array_equal(read_label(tmp_path / "b.png")[0], mask)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def test_many_page_tiff_is_refused(tmp_path):
    pages = [Image.new("L", (4, 4), value) for value in (1, 2)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(DataError, match="2 pages"):
        read_image(tmp_path / "a.tif")


def test_series_is_a_volume_in_hu_in_the_order_of_its_positions(tmp_path):
    volume = RNG.integers(0, 3000, (5, 6, 7)).astype(np.uint16)
    folder = write_series(tmp_path / "ct", volume)
    image = read_image(folder)
    assert image.modality == "CT" and image_stem(folder) == "ct" and is_image(folder)
    assert np.array_equal(image.slices[:, 0], volume.astype(np.float32) - 1024)
    assert np.allclose(image.geometry.spacing, (2.5, 0.8, 0.7))
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    reference = reader.Execute()
    write_label(tmp_path / "out.nii.gz", np.zeros(image.geometry.shape, np.uint8), image.geometry)
    written = SimpleITK.ReadImage(str(tmp_path / "out.nii.gz"))
    assert written.GetSize() == reference.GetSize()
    for index in ((0, 0, 0), (6, 5, 4)):
        expected = reference.TransformIndexToPhysicalPoint(index)
        assert np.allclose(written.TransformIndexToPhysicalPoint(index), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("orientation", "axis"), [((0, 1, 0, 0, 0, -1), 0), ((1, 0, 0, 0, 0, -1), 1), ((-1, 0, 0, 0, -1, 0), 2)]
)
def test_series_of_any_orientation_lies_where_itk_puts_it(tmp_path, orientation, axis):
    volume = RNG.integers(0, 3000, (5, 6, 7)).astype(np.uint16)
    image = read_image(write_series(tmp_path / "mr", volume, orientation=orientation, Modality="MR"))
    assert image.geometry.slice_axis == axis and image.slices.shape == (5, 1, 6, 7)
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "mr")))
    reference = reader.Execute()
    native = image.geometry.to_native(image.slices[:, 0])
    for index in ((0, 0, 0), (6, 2, 4)):
        x, y, z = (image.geometry.affine @ [*index, 1])[:3]
        # By position, because ITK may count slices from the other end.
        assert native[index] == reference[reference.TransformPhysicalPointToIndex((-x, -y, z))]


def test_each_slice_is_rescaled_by_its_own_slope(tmp_path):
    volume = np.full((3, 4, 4), 1000, np.uint16)
    folder = write_series(tmp_path / "pt", volume, slopes=[0.5, 0.00125, 2.0], intercept=0.0, Modality="PT")
    assert np.allclose(read_image(folder).slices[:, 0, 0, 0], [500, 1.25, 2000])


@pytest.mark.parametrize("skip", [(2,), (1, 2, 3)])
def test_missing_slice_is_an_error(tmp_path, skip):
    folder = write_series(tmp_path / "ct", np.zeros((8, 4, 4), np.uint16), skip=skip)
    with pytest.raises(DataError, match=rf"ct: .*gap of {2.5 * (len(skip) + 1):.2f} mm.*missing"):
        read_image(folder)


@pytest.mark.parametrize("repeat", [(0,), (3,), (0, 1, 2, 3, 4)])
def test_duplicate_slice_position_is_an_error(tmp_path, repeat):
    folder = write_series(tmp_path / "ct", np.zeros((5, 4, 4), np.uint16), repeat=repeat)
    with pytest.raises(DataError, match="each slice position once"):
        read_image(folder)


def test_folder_with_two_series_is_an_error_that_lists_them(tmp_path):
    write_series(tmp_path / "ct", np.zeros((3, 4, 4), np.uint16), SeriesDescription="thin")
    other = write_series(tmp_path / "other", np.zeros((2, 4, 4), np.uint16), SeriesDescription="thick")
    for number, file in enumerate(sorted(other.iterdir())):
        file.rename(tmp_path / "ct" / f"other{number}.dcm")
    with pytest.raises(DataError, match=r"found 2: .*(thin, 3 files.*thick, 2 files|thick, 2 files.*thin, 3 files)"):
        read_image(tmp_path / "ct")


def test_slices_of_another_size_and_a_tilted_gantry_are_errors(tmp_path):
    folder = write_series(tmp_path / "ct", np.zeros((4, 4, 4), np.uint16))
    file = folder / "IM0000.dcm"
    dataset = pydicom.dcmread(file)
    dataset.Rows, dataset.PixelData = 2, dataset.PixelData[:16]
    dataset.save_as(file)
    with pytest.raises(DataError, match="one size"):
        read_image(folder)
    folder = write_series(tmp_path / "tilted", np.zeros((4, 4, 4), np.uint16))
    for file in folder.iterdir():
        dataset = pydicom.dcmread(file)
        dataset.ImagePositionPatient[1] += 0.5 * dataset.InstanceNumber
        dataset.save_as(file)
    with pytest.raises(DataError, match="tilted"):
        read_image(folder)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_monochrome1_is_inverted(tmp_path, dtype):
    pixels = np.arange(12, dtype=dtype).reshape(3, 4)
    tags = {"BitsStored": 12, "HighBit": 11, "ImagerPixelSpacing": [0.2, 0.1]}
    path = write_dicom(tmp_path / "dx", pixels, "DX", PhotometricInterpretation="MONOCHROME1", **tags)
    image = read_image(path)
    view = image.slices[0, 0]
    assert view[0, 0] == view.max() and np.array_equal(view[0, 0] - view, pixels)
    assert image.modality == "DX" and np.allclose(image.geometry.spacing[1:], (0.2, 0.1))
    assert output_suffix(image.geometry) == ".nii.gz" and image_stem(path) == "dx"


def test_compressed_dicom_has_the_values_of_uncompressed(tmp_path):
    pixels = (np.arange(64 * 64).reshape(64, 64) // 4).astype(np.uint16)
    tags = {"RescaleSlope": 2, "RescaleIntercept": -1024}
    expected = read_image(write_dicom(tmp_path / "a.dcm", pixels, **tags)).slices
    for name, syntax in (("rle.dcm", RLELossless), ("j2k.dcm", JPEG2000Lossless)):
        dataset = pydicom.dcmread(tmp_path / "a.dcm")
        if syntax == RLELossless:
            dataset.compress(RLELossless)
        else:
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "JPEG2000", no_jp2=True)
            dataset.PixelData = encapsulate([stream.getvalue()])
            dataset["PixelData"].is_undefined_length = True
            dataset.file_meta.TransferSyntaxUID = syntax
        dataset.save_as(tmp_path / name)
        assert np.array_equal(read_image(tmp_path / name).slices, expected), name


def test_ultrasound_film_in_colour_has_its_frames_as_slices(tmp_path):
    frames = RNG.integers(0, 255, (5, 6, 8, 3)).astype(np.uint8)
    path = write_dicom(tmp_path / "us.dcm", frames[0], "US", NumberOfFrames=5, PixelData=frames.tobytes())
    image = read_image(path)
    assert image.is_rgb and np.array_equal(image.slices, frames.transpose(0, 3, 1, 2))
    ramp = np.stack([np.tile(np.arange(64) * 4, (64, 1))] * 3, -1).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(ramp).save(stream, "JPEG", quality=95)
    dataset = pydicom.dcmread(write_dicom(path, ramp, "US", PhotometricInterpretation="YBR_FULL_422"))
    dataset.PixelData = encapsulate([stream.getvalue()])
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset.save_as(path)
    assert np.abs(read_image(path).slices[0].transpose(1, 2, 0) - ramp).max() <= 4


def test_multi_frame_volume_and_segmentation_objects_are_refused(tmp_path):
    frames = np.zeros((4, 4, 4), np.uint16)
    path = write_dicom(tmp_path / "mr.dcm", frames[0], "MR", NumberOfFrames=4, PixelData=frames.tobytes())
    with pytest.raises(DataError, match="multi-frame object of 4 frames"):
        read_image(path)
    with pytest.raises(DataError, match="DICOM segmentation"):
        read_label(write_dicom(tmp_path / "seg.dcm", frames[0].astype(np.uint8), "SEG"))


def test_nan_and_infinite_voxels_become_the_minimum_with_a_warning(tmp_path):
    array = RNG.normal(size=(4, 5, 6)).astype(np.float32)
    array[0, 0, 0], array[1, 1, 1], array[2, 2, 2] = np.nan, np.inf, -np.inf
    path = save_nifti(tmp_path / "holes.nii.gz", array)
    with pytest.warns(UserWarning, match="holes.nii.gz: 3 of 120 values"):
        image = read_image(path)
    native = image.geometry.to_native(image.slices[:, 0])
    assert native[0, 0, 0] == native[1, 1, 1] == native[2, 2, 2] == array[np.isfinite(array)].min()
    with pytest.raises(DataError, match="no finite value"):
        read_image(save_nifti(tmp_path / "b.nii.gz", np.full((3, 3, 3), np.nan, np.float32)))


def test_constant_image_and_empty_label_are_read(tmp_path):
    image = read_image(save_nifti(tmp_path / "a.nii.gz", np.full((4, 5, 6), 7.0)))
    assert (image.slices == 7).all()
    label = read_label(save_nifti(tmp_path / "b.nii.gz", np.zeros((4, 5, 6), np.uint8)), image.geometry)
    assert label.dtype == np.int64 and not label.any()


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha", ".png", ".jpg", ".tif", ".bmp", ".dcm"])
@pytest.mark.parametrize("keep", [0, 0.05, 0.6])
def test_truncated_file_is_an_error_that_names_it(tmp_path, suffix, keep):
    path = tmp_path / f"case{suffix}"
    array = RNG.integers(0, 255, (40, 40)).astype(np.uint8)
    if suffix.startswith(".nii"):
        save_nifti(path, np.stack([array] * 5))
    elif suffix in (".nrrd", ".mha"):
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.stack([array] * 5)), str(path))
    elif suffix == ".dcm":
        write_dicom(path, array)
    else:
        Image.fromarray(array).save(path)
    assert read_image(path).slices.size
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    for read in (read_image, read_label):
        with pytest.raises(DataError, match=f"case{suffix}: expected"):
            read(path)


def test_a_flipped_bit_in_a_compressed_volume_is_noticed(tmp_path):
    path = save_nifti(tmp_path / "a.nii.gz", RNG.integers(0, 255, (20, 20, 20)).astype(np.uint8))
    content = bytearray(gzip.decompress(path.read_bytes()))
    stored = bytearray(gzip.compress(bytes(content), 0))
    stored[len(stored) // 2] ^= 1
    path.write_bytes(stored)
    with pytest.raises(DataError, match="a.nii.gz"):
        read_image(path)


@pytest.mark.parametrize("name", ["missing.nii.gz", "notes.txt", "empty_folder", "zero.nii.gz", "singular.nii.gz"])
def test_what_is_no_image_is_an_error(tmp_path, name):
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty_folder").mkdir()
    save_nifti(tmp_path / "zero.nii.gz", np.zeros((4, 0, 4), np.uint8))
    singular = nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4))
    singular.header["qform_code"], singular.header["sform_code"] = 0, 1
    singular.header["srow_x"] = singular.header["srow_y"] = singular.header["srow_z"] = 0
    (tmp_path / "singular.nii.gz").write_bytes(gzip.compress(singular.header.binaryblock + bytes(4 + 64)))
    with pytest.raises(DataError, match=name):
        read_image(tmp_path / name)


def test_unknown_slice_axis_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="slice_axis"):
        read_image(save_nifti(tmp_path / "a.nii", np.zeros((3, 3, 3), np.uint8)), "axial")


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
    with pytest.raises(DataError, match="9x8x1.*8x9x1"):
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
    with pytest.raises(DataError, match="2 channels"):
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


def test_thousand_slices(tmp_path):
    array = np.zeros((3, 4, 1000), np.uint8)
    array[..., 777] = 1
    image = read_image(save_nifti(tmp_path / "a.nii.gz", array))
    assert image.slices.shape == (1000, 1, 4, 3) and np.flatnonzero(image.slices.any((1, 2, 3))).tolist() == [777]


def test_geometry_survives_pickling(tmp_path):
    image = read_image(save_nifti(tmp_path / "a.nii.gz", RNG.normal(size=(4, 5, 6)), OBLIQUE))
    copy = pickle.loads(pickle.dumps(image.geometry))
    assert np.array_equal(copy.affine, image.geometry.affine) and copy.shape == image.geometry.shape
    with pytest.raises(ValueError, match="shape"):
        copy.to_native(np.zeros((1, 2, 3)))


@pytest.mark.parametrize(
    ("name", "stem"),
    [("a.b.nii.gz", "a.b"), ("x.NII", "x"), ("y.seg.nrrd", "y"), ("z.jpeg", "z"), ("1.2.840.7", "1.2.840.7")],
)
def test_stem(tmp_path, name, stem):
    assert image_stem(tmp_path / name) == stem


def test_reading_gives_no_warnings_for_sound_files(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(write_series(tmp_path / "ct", np.zeros((3, 4, 4), np.uint16)))


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


def test_spacing_of_an_oblique_volume_is_exactly_that_of_the_upright_one(tmp_path):
    for angle in (0.0, 0.1, 0.3, 0.5):
        affine = nib.eulerangles.euler2mat(angle, -angle, angle / 2) @ np.diag([0.8, 0.8, 3.3])
        path = save_nifti(tmp_path / "a.nii", np.zeros((4, 5, 6), np.uint8), nib.affines.from_matvec(affine))
        assert read_image(path).geometry.spacing == (3.3, 0.8, 0.8)
