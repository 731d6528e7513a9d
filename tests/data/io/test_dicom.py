"""Reading DICOM series and files: values and places, and what is refused."""

import io
import shutil
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, MediaStorageDirectoryStorage, RLELossless

from sam2sgp.data.io import (
    dicom_files,
    image_stem,
    is_image,
    output_suffix,
    read_image,
    read_label,
    write_label,
)
from sam2sgp.errors import DataError
from sam2sgp.evaluation import class_sizes
from tests.helpers.dicom_files import item, write_compressed, write_dicom, write_object, write_series

RNG = np.random.default_rng(0)


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
    folder = write_series(tmp_path / "pt", volume, slopes=[0.5, 0.00125, 0.75], intercept=0.0, Modality="PT")
    assert np.allclose(read_image(folder).slices[:, 0, 0, 0], [500, 1.25, 750])


@pytest.mark.parametrize("skip", [(2,), (1, 2, 3)])
def test_missing_slice_is_an_error(tmp_path, skip):
    folder = write_series(tmp_path / "ct", np.zeros((8, 4, 4), np.uint16), skip=skip)
    lacking = "a slice is missing" if len(skip) == 1 else f"{len(skip)} slices are missing"
    with pytest.raises(DataError, match=rf"ct: .*gap of {2.5 * (len(skip) + 1):.2f} mm.*; {lacking}"):
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
        write_compressed(tmp_path / name, tmp_path / "a.dcm", syntax)
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


def test_multi_frame_object_without_positions_and_segmentation_objects_are_refused(tmp_path):
    frames = np.zeros((4, 4, 4), np.uint16)
    path = write_dicom(tmp_path / "mr.dcm", frames[0], "MR", NumberOfFrames=4, PixelData=frames.tobytes())
    with pytest.raises(DataError, match="position for each frame.* its 4 frames"):
        read_image(path)
    with pytest.raises(DataError, match="DICOM segmentation"):
        read_image(write_dicom(tmp_path / "seg.dcm", frames[0].astype(np.uint8), "SEG"))


def test_reading_gives_no_warnings_for_sound_files(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(write_series(tmp_path / "ct", np.zeros((3, 4, 4), np.uint16)))


def test_objects_without_pixels_beside_the_slices_are_told_and_not_used(tmp_path):
    volume = np.arange(48, dtype=np.uint16).reshape(3, 4, 4)
    folder = write_series(tmp_path / "ct", volume)
    write_object(folder / "report.dcm", "1.2.840.10008.5.1.4.1.1.88.22", "SR")
    assert [path.name for path in dicom_files(folder) if path.name == "report.dcm"] == []
    assert read_image(folder).warnings == []
    # Without file meta information only the whole header tells; the reader does.
    write_object(folder / "notes", "1.2.840.10008.5.1.4.1.1.88.59", "KO", meta=False)
    image = read_image(folder)
    assert image.slices.shape == (3, 1, 4, 4)
    assert image.warnings == ["DICOM files without pixels in its folder are not used (1 KO)."]


def rounded_positions(folder: Path, decimals: int) -> Path:
    for file in folder.iterdir():
        dataset = pydicom.dcmread(file)
        dataset.ImagePositionPatient = [f"{float(value):.{decimals}f}" for value in dataset.ImagePositionPatient]
        dataset.save_as(file)
    return folder


@pytest.mark.parametrize("orientation", [(1, 0, 0, 0, 1, 0), (0.8, 0.6, 0, 0, 0, -1)])
def test_positions_rounded_to_a_tenth_of_a_millimetre_are_one_regular_stack(tmp_path, orientation):
    settings = {"spacing": (1.25, 0.8, 0.7), "orientation": orientation}
    volume = np.zeros((12, 4, 4), np.uint16)
    exact = read_image(write_series(tmp_path / "exact", volume, **settings)).geometry
    found = read_image(rounded_positions(write_series(tmp_path / "ct", volume, **settings), 1)).geometry
    corner = [3, 3, 11, 1]
    assert np.abs(found.affine @ corner - exact.affine @ corner).max() <= 0.1
    for skip in (1, 5, 10):
        folder = write_series(tmp_path / f"without_{skip}", volume, skip=(skip,), **settings)
        with pytest.raises(DataError, match="gap of 2.[3-6][0-9] mm.*missing"):
            read_image(rounded_positions(folder, 1))


def test_series_taken_with_two_spacings_is_refused_with_what_to_do(tmp_path):
    folder = write_series(tmp_path / "head", np.zeros((12, 4, 4), np.uint16), spacing=(2.5, 1, 1))
    for file in folder.iterdir():
        dataset = pydicom.dcmread(file)
        dataset.ImagePositionPatient[2] += 2.5 * max(0, int(dataset.InstanceNumber) - 6)
        dataset.save_as(file)
    with pytest.raises(DataError, match="from 2.50 to 5.00 mm.*resample it to equal spacing"):
        read_image(folder)


def test_the_same_instance_twice_counts_once_and_others_stay(tmp_path):
    volume = RNG.integers(0, 3000, (4, 5, 6)).astype(np.uint16)
    folder = write_series(tmp_path / "ct", volume)
    expected = read_image(folder).slices
    shutil.copy(folder / "IM0002.dcm", folder / "IM0002 (1).dcm")
    assert np.array_equal(read_image(folder).slices, expected)
    # As tools for making data anonymous write it: one UID for all, which are different slices nonetheless.
    (folder / "IM0002 (1).dcm").unlink()
    for file in folder.iterdir():
        dataset = pydicom.dcmread(file)
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
        dataset.save_as(file)
    assert np.array_equal(read_image(folder).slices, expected)
    dataset.PixelData = bytes(len(dataset.PixelData))
    dataset.save_as(folder / "other.dcm")
    with pytest.raises(DataError, match="each slice position once"):
        read_image(folder)


def test_dicomdir_is_no_image(tmp_path):
    folder = write_series(tmp_path / "ct", np.zeros((3, 4, 4), np.uint16))
    dataset = pydicom.dcmread(folder / "IM0000.dcm", stop_before_pixels=True)
    index = pydicom.Dataset()
    index.FileSetID = "DISC"
    file = pydicom.FileDataset("", index, file_meta=dataset.file_meta, preamble=b"\0" * 128)
    file.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    file.is_little_endian, file.is_implicit_VR = True, False
    for name in ("DICOMDIR", "index.dcm"):
        file.save_as(folder / name)
        assert not is_image(folder / name)
    assert len(dicom_files(folder)) == 3 and read_image(folder).slices.shape[0] == 3


def region(spatial_format: int = 1, unit: int = 3, delta: float = 0.02) -> pydicom.Dataset:
    return item(
        RegionSpatialFormat=spatial_format,
        PhysicalUnitsXDirection=unit,
        PhysicalUnitsYDirection=unit,
        PhysicalDeltaX=delta,
        PhysicalDeltaY=-2 * delta,
    )[0]


@pytest.mark.parametrize(
    ("regions", "spacing"),
    [
        ([], None),
        ([region()], (0.4, 0.2)),
        ([region(), region(), region(spatial_format=3, unit=4, delta=0.001)], (0.4, 0.2)),
        ([region(), region(delta=0.03)], None),
        ([region(unit=0)], None),
    ],
)
def test_spacing_of_an_ultrasound_image_is_that_of_its_calibrated_regions(tmp_path, regions, spacing):
    pixels = RNG.integers(0, 255, (6, 8)).astype(np.uint8)
    tags = {"SequenceOfUltrasoundRegions": pydicom.Sequence(regions)}
    found = read_image(write_dicom(tmp_path / "us.dcm", pixels, "US", **tags)).geometry
    assert found.spacing is None if spacing is None else np.allclose(found.spacing[1:], spacing)
    sizes = class_sizes((pixels > 99)[None].astype(np.uint8), {1: "cyst"}, found.spacing)[0]
    assert sizes["size_unit"] == ("px" if spacing is None else "mm2")
    assert sizes["size"] == pytest.approx((pixels > 99).sum() * (1 if spacing is None else 0.08))


def test_image_without_spacing_and_frames_of_a_film_have_no_size_in_mm(tmp_path):
    pixels = np.zeros((4, 6, 8), np.uint8)
    assert read_image(write_dicom(tmp_path / "a.dcm", pixels[0], "DX")).geometry.spacing is None
    assert read_image(write_dicom(tmp_path / "b.dcm", pixels[0], "DX", PixelSpacing=[0, 0])).geometry.spacing is None
    tags = {"NumberOfFrames": 4, "PixelData": pixels.tobytes(), "PixelSpacing": [0.2, 0.2]}
    assert read_image(write_dicom(tmp_path / "film.dcm", pixels[0], "US", **tags)).geometry.spacing is None


def test_slices_in_colour_among_grey_ones_and_contours_are_told(tmp_path):
    folder = write_series(tmp_path / "series", RNG.integers(0, 99, (4, 6, 8)).astype(np.uint16), Modality="MR")
    path = next(folder.iterdir())
    grey = pydicom.dcmread(path)
    names = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
    tags = {name: grey[name].value for name in names}
    write_dicom(path, np.zeros((6, 8, 3), np.uint8), "MR", series_uid=grey.SeriesInstanceUID, **tags)
    with pytest.raises(DataError, match="expected slices of one size and orientation, found values per pixel"):
        read_image(folder)
    contours = write_object(tmp_path / "contours.dcm", "1.2.840.10008.5.1.4.1.1.481.3", "RTSTRUCT")
    with pytest.raises(DataError, match=r"found objects without pixels only \(1 RTSTRUCT\).*convert contours"):
        read_label(contours)


@pytest.mark.parametrize("tags", [{}, {"SliceThickness": 5.0}, {"SpacingBetweenSlices": -7.5}])
def test_positions_rule_over_instance_numbers_locations_and_thicknesses(tmp_path, tags):
    volume = RNG.integers(0, 99, (5, 6, 8)).astype(np.uint16)
    folder = write_series(tmp_path / "series", volume, intercept=0.0, **tags)
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.SliceLocation = -float(dataset.InstanceNumber)
        dataset.InstanceNumber = 99 - dataset.InstanceNumber
        dataset.save_as(path)
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    expected = reader.Execute()
    image = read_image(folder)
    assert np.array_equal(image.slices[:, 0], SimpleITK.GetArrayFromImage(expected))
    assert np.allclose(image.geometry.spacing, expected.GetSpacing()[::-1])


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"ImagePositionPatient": [1.0, 2.0]}, "3 numbers as ImagePositionPatient"),
        ({"ImageOrientationPatient": [0.0] * 6}, "right angles"),
        ({"ImageOrientationPatient": [2.0, 0, 0, 0, 2.0, 0]}, "right angles"),
        ({"ImageOrientationPatient": [1.0, 0, 0, 0.3, 0.954, 0]}, "right angles"),
        ({"ImageOrientationPatient": [1.0, 0, 0]}, "6 numbers as ImageOrientationPatient"),
    ],
)
def test_positions_and_directions_that_are_none_are_told_as_such(tmp_path, tags, message):
    write_series(tmp_path / "series", RNG.integers(0, 99, (3, 6, 7)).astype(np.uint16))
    for file in (tmp_path / "series").iterdir():
        dataset = pydicom.dcmread(file)
        dataset.update(tags)
        dataset.save_as(file)
    for path in (tmp_path / "series", tmp_path / "series" / "IM0001.dcm"):
        with pytest.raises(DataError, match=rf"IM000\d.dcm: expected .*{message}.*found"):
            read_image(path)


def test_directions_rounded_to_three_decimals_are_read(tmp_path):
    volume = RNG.integers(0, 99, (3, 6, 7)).astype(np.uint16)
    write_series(tmp_path / "series", volume, orientation=(0.839, 0.545, 0.0, 0.0, 0.0, -1.0))
    assert read_image(tmp_path / "series").geometry.spacing == pytest.approx((2.5, 0.8, 0.7), rel=1e-2)


def test_a_series_of_which_one_slice_is_inverted_is_refused(tmp_path):
    folder = write_series(tmp_path / "mr", np.ones((4, 6, 7), np.uint16), Modality="MR")
    changed = sorted(folder.iterdir())[2]
    dataset = pydicom.dcmread(changed)
    dataset.PhotometricInterpretation = "MONOCHROME1"
    dataset.save_as(changed)
    with pytest.raises(DataError, match=f"mr: .*inversion .PhotometricInterpretation. 1.0 in {changed.name}"):
        read_image(folder)
