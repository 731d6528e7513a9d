"""DICOM segmentations: other libraries find each voxel where the class map in NIfTI has it, and the source's slices."""

import logging
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pydicom_seg
import pytest
import SimpleITK
import torch
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, RLELossless, generate_uid

from sam2sgp.data import read_dicom_seg, read_image, read_label, write_dicom_seg
from sam2sgp.data.dicom_seg import MOST_SEGMENTS, DicomSourceError
from sam2sgp.data.folders import load_datalist
from sam2sgp.errors import DataError
from sam2sgp.transforms import OutputNames, SaveDicomSegd
from tests.helpers.dicom_files import write_dicom, write_enhanced
from tests.helpers.segmentations import NAMES, SERIES, SHAPE, blobs, segment, series


def classes_on(header: pydicom.Dataset, label: nib.Nifti1Image) -> np.ndarray:
    """The class map's values (rows, columns) at the world places of an image's pixels, by DICOM's own equation."""
    row, column = np.mgrid[: header.Rows, : header.Columns]
    along_row, along_column = np.reshape(header.ImageOrientationPatient, (2, 3)).astype(float)
    places = (
        np.asarray(header.ImagePositionPatient, float)
        + column[..., None] * float(header.PixelSpacing[1]) * along_row
        + row[..., None] * float(header.PixelSpacing[0]) * along_column
    ) * [-1, -1, 1]
    index = nib.affines.apply_affine(np.linalg.inv(label.affine), places)
    assert np.abs(index - index.round()).max() < 1e-3
    return np.asarray(label.dataobj)[tuple(np.moveaxis(index.round().astype(int), -1, 0))]


@pytest.mark.parametrize("name", SERIES)
def test_each_frame_lies_on_its_source_slice(tmp_path, name):
    source = series(tmp_path / "series", **SERIES[name])
    path, label = segment(tmp_path, source)
    headers = [pydicom.dcmread(file) for file in sorted(source.iterdir())]
    seg = highdicom.seg.segread(path)
    frames = seg.get_pixels_by_source_instance(
        [header.SOPInstanceUID for header in headers], combine_segments=True, assert_missing_frames_are_empty=True
    )
    values = np.array([0, 1, 3, 7])
    for header, frame in zip(headers, frames, strict=True):
        assert np.array_equal(values[frame], classes_on(header, label)), header.filename
    assert set(np.unique(frames)) == {0, 1, 2, 3}


@pytest.mark.parametrize("name", SERIES)
def test_it_is_read_back_to_the_voxel_with_its_values_and_names(tmp_path, name):
    source = series(tmp_path / "series", **SERIES[name])
    path, _ = segment(tmp_path, source)
    geometry = read_image(source).geometry
    labels, names = read_dicom_seg(path, geometry, source)
    assert np.array_equal(labels, blobs(geometry.shape)) and names == {1: "liver", 3: "Läsion", 7: "tumour"}


def test_frames_of_an_enhanced_file_are_referred_to_in_its_own_order(tmp_path):
    volume = np.random.default_rng(1).integers(0, 3000, SHAPE).astype(np.uint16)
    tags = {"StudyInstanceUID": generate_uid(), "FrameOfReferenceUID": generate_uid()}
    source = write_enhanced(tmp_path / "ct.dcm", volume, [3, 1, 4, 0, 2], **tags)
    path, label = segment(tmp_path, source)
    geometry = read_image(source).geometry
    assert np.array_equal(read_dicom_seg(path, geometry, source)[0], blobs(geometry.shape))
    assert np.array_equal(geometry.to_native(read_label(path, geometry)), np.asarray(label.dataobj))
    seg = highdicom.seg.segread(path)
    uid = pydicom.dcmread(source).SOPInstanceUID
    frames = seg.get_pixels_by_source_frame(
        uid, [1, 2, 3, 4, 5], combine_segments=True, assert_missing_frames_are_empty=True
    )
    values = np.array([0, 1, 3, 7])
    assert np.array_equal(values[frames].transpose(2, 1, 0), np.asarray(label.dataobj)[..., [3, 1, 4, 0, 2]])


def test_segments_of_other_programs_get_their_values_by_name(tmp_path):
    source = series(tmp_path / "series")
    path, _ = segment(tmp_path, source)
    foreign = pydicom.dcmread(path)
    for item in foreign.SegmentSequence:
        del item.SegmentDescription
    foreign.save_as(path)
    geometry = read_image(source).geometry
    expected = blobs(geometry.shape)
    labels, names = read_dicom_seg(path, geometry, source, {"liver": 4, "Läsion": 9, "tumour": 2}.__getitem__)
    assert np.array_equal(labels, np.array([0, 4, 0, 9, 0, 0, 0, 2])[expected])
    assert names == {4: "liver", 9: "Läsion", 2: "tumour"}
    with pytest.raises(DataError, match="slices of its series"):
        read_dicom_seg(path, geometry, series(tmp_path / "other"))


def test_two_segments_of_other_programs_with_one_name_but_for_its_case_are_refused(tmp_path):
    source = series(tmp_path / "series")
    path, _ = segment(tmp_path, source)
    foreign = pydicom.dcmread(path)
    for item, name in zip(foreign.SegmentSequence, ("RING", "disc", "ring"), strict=True):
        item.SegmentLabel = name
        del item.SegmentDescription
    foreign.save_as(path)
    known = {"ring": 3, "disc": 1}
    with pytest.raises(DataError, match="differ in more than upper and lower case, found 'RING' and 'ring'"):
        read_dicom_seg(path, read_image(source).geometry, source, lambda name: known[name.casefold()])


def add_segments(segmentation: pydicom.Dataset) -> None:
    """More of them than anybody segments, without a frame: each would take as much memory as the series."""
    for number in range(len(segmentation.SegmentSequence) + 1, MOST_SEGMENTS + 2):
        segment = pydicom.Dataset()
        segment.update(segmentation.SegmentSequence[0])
        segment.SegmentNumber = number
        segmentation.SegmentSequence.append(segment)


def fill(segmentation: pydicom.Dataset) -> None:
    segmentation.PixelData = b"\xff" * len(segmentation.PixelData)


def compress(segmentation: pydicom.Dataset) -> None:
    """With a codec that must not run in this process."""
    segmentation.PixelData = encapsulate([bytes(64)] * int(segmentation.NumberOfFrames))
    segmentation["PixelData"].VR = "OB"
    segmentation.file_meta.TransferSyntaxUID = JPEG2000Lossless


MISLEADING = {
    "many segments": (add_segments, "1025 segments"),
    "frames of another shape": (lambda made: made.update({"Rows": 16, "Columns": 12}), "16 x 12 pixels where"),
    "tiles": (lambda made: setattr(made, "DimensionOrganizationType", "TILED_FULL"), "tiles, not of slices"),
    "a codec": (compress, "stored as JPEG 2000"),
    "a value beyond 16 bits": (
        lambda made: setattr(made.SegmentSequence[0], "SegmentDescription", "class 99999"),
        "values up to 65535, found 99999",
    ),
    "segments that overlap": (fill, "segments that overlap"),
}


@pytest.mark.parametrize("name", MISLEADING)
def test_objects_that_would_mislead_or_take_too_much_are_refused(tmp_path, name):
    spoil, message = MISLEADING[name]
    source = series(tmp_path / "series")
    path, _ = segment(tmp_path, source)
    spoilt = pydicom.dcmread(path)
    spoil(spoilt)
    spoilt.save_as(path)
    with pytest.raises(DataError, match=message):
        read_dicom_seg(path, read_image(source).geometry, source)


def test_the_memory_that_a_segmentation_may_take_is_limited(tmp_path):
    source = series(tmp_path / "series")
    path, _ = segment(tmp_path, source)
    geometry = read_image(source).geometry
    pixels = int(pydicom.dcmread(path).NumberOfFrames) * 12 * 16
    assert read_dicom_seg(path, geometry, source, limit=pixels)[0].any()
    with pytest.raises(DataError, match="MB of pixels, more than"):
        read_dicom_seg(path, geometry, source, limit=pixels - 1)


@pytest.mark.parametrize("slice_axis", [0, 1, 2])
def test_the_axis_that_is_sliced_along_does_not_matter(tmp_path, slice_axis):
    source = series(tmp_path / "series")
    path, label = segment(tmp_path, source, slice_axis)
    headers = [pydicom.dcmread(file) for file in sorted(source.iterdir())]
    frames = highdicom.seg.segread(path).get_pixels_by_source_instance(
        [header.SOPInstanceUID for header in headers], combine_segments=True, assert_missing_frames_are_empty=True
    )
    for header, frame in zip(headers, frames, strict=True):
        assert np.array_equal(np.array([0, 1, 3, 7])[frame], classes_on(header, label))


@pytest.mark.parametrize("name", SERIES)
def test_readers_of_monailabel_and_dcmqi_place_it_as_the_class_map(tmp_path, name):
    path, _ = segment(tmp_path, series(tmp_path / "series", **SERIES[name]))
    label = SimpleITK.ReadImage(str(tmp_path / "label.nii.gz"))
    expected = SimpleITK.GetArrayFromImage(label)
    read = pydicom_seg.SegmentReader().read(pydicom.dcmread(path))
    tool = Path(sysconfig.get_path("scripts"), "segimage2itkimage")
    subprocess.run(
        [tool, "--inputDICOM", path, "--outputDirectory", tmp_path, "-t", "nrrd"], check=True, capture_output=True
    )
    for number, value in enumerate((1, 3, 7), 1):
        for image in (read.segment_image(number), SimpleITK.ReadImage(str(tmp_path / f"{number}.nrrd"))):
            placed = SimpleITK.Resample(image, label, SimpleITK.Transform(), SimpleITK.sitkNearestNeighbor)
            found = SimpleITK.GetArrayFromImage(placed) > 0
            assert found.sum() == (SimpleITK.GetArrayFromImage(image) > 0).sum()
            assert np.array_equal(found, expected == value), (number, image.GetSize())


def test_segments_bear_names_codes_and_the_algorithm(tmp_path):
    path, _ = segment(tmp_path, series(tmp_path / "series"))
    seg = highdicom.seg.segread(path)
    assert [seg.get_segment_description(number).segment_label for number in (1, 2, 3)] == ["liver", "Läsion", "tumour"]
    found = [
        tuple(
            (code.value, code.scheme_designator) for code in (d.segmented_property_category, d.segmented_property_type)
        )
        for d in map(seg.get_segment_description, (1, 2, 3))
    ]
    assert found == [
        (("123037004", "SCT"), ("10200004", "SCT")),
        (("85756007", "SCT"), ("85756007", "SCT")),
        (("49755003", "SCT"), ("108369006", "SCT")),
    ]
    for item in seg.SegmentSequence:
        assert item.SegmentAlgorithmType == "AUTOMATIC" and item.SegmentAlgorithmName == "sam2sgp"
        assert item.SegmentationAlgorithmIdentificationSequence[0].AlgorithmVersion
    assert seg.SegmentationType == "BINARY" and seg.SegmentsOverlap == "NO"


def test_all_source_slices_and_the_patient_are_referenced(tmp_path):
    tags = {
        "PatientName": "Müller^Änne",
        "SpecificCharacterSet": "ISO_IR 100",
        "PatientSex": "F",
        "StudyDate": "20200101",
    }
    source = series(tmp_path / "series", **tags)
    path, _ = segment(tmp_path, source)
    headers = [pydicom.dcmread(file) for file in source.iterdir()]
    seg = pydicom.dcmread(path)
    uids = {header.SOPInstanceUID for header in headers}
    (referenced,) = seg.ReferencedSeriesSequence
    assert {item.ReferencedSOPInstanceUID for item in referenced.ReferencedInstanceSequence} == uids
    assert {item.ReferencedSOPInstanceUID for item in seg.SourceImageSequence} == uids
    assert referenced.SeriesInstanceUID == headers[0].SeriesInstanceUID != seg.SeriesInstanceUID
    for name in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientSex", "StudyDate"):
        assert seg[name].value == headers[0][name].value, name
    assert str(seg.PatientName) == "Müller^Änne"
    # One frame per class and slice that holds it: class 3 isn't on the first slice, and nothing on the last.
    assert seg.NumberOfFrames == 4 + 3 + 4


def test_compressed_source_is_referenced_as_any_other(tmp_path):
    source = series(tmp_path / "series")
    for file in source.iterdir():
        dataset = pydicom.dcmread(file)
        dataset.compress(RLELossless)
        dataset.save_as(file)
    path, label = segment(tmp_path, source)
    headers = [pydicom.dcmread(file) for file in source.iterdir()]
    frames = highdicom.seg.segread(path).get_pixels_by_source_instance(
        [header.SOPInstanceUID for header in headers], combine_segments=True, assert_missing_frames_are_empty=True
    )
    for header, frame in zip(headers, frames, strict=True):
        assert np.array_equal(np.array([0, 1, 3, 7])[frame], classes_on(header, label))


@pytest.mark.parametrize(
    "modality, tags",
    [
        ("CT", {"ImagePositionPatient": [1.0, 2.0, 3.0], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
                "PixelSpacing": [0.5, 0.6], "FrameOfReferenceUID": "1.2.3", "SliceThickness": 2.0,
                "NumberOfFrames": 1}),
        ("CT", {"ImagePositionPatient": [1.0, 2.0, 3.0], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
                "PixelSpacing": [0.5, 0.6], "FrameOfReferenceUID": "1.2.3"}),
        ("DX", {"ImagerPixelSpacing": [0.2, 0.2]}),
        ("DX", {"FrameOfReferenceUID": "1.2.3"}),
        ("US", {"LossyImageCompression": "01"}),
    ],
)  # fmt: skip
def test_single_image(tmp_path, modality, tags):
    pixels = np.random.default_rng(0).integers(0, 255, (12, 16)).astype(np.uint8)
    source = write_dicom(tmp_path / "image.dcm", pixels, modality, **tags)
    geometry = read_image(source).geometry
    labels = np.random.default_rng(2).choice([0, 1, 7], geometry.shape)
    assert write_dicom_seg(tmp_path / "seg.dcm", labels, geometry, source, NAMES)
    seg = highdicom.seg.segread(tmp_path / "seg.dcm")
    uid = pydicom.dcmread(source).SOPInstanceUID
    frames = seg.get_pixels_by_source_instance([uid], combine_segments=True)
    assert np.array_equal(np.array([0, 1, 7])[frames[0]], labels[0])


def test_what_can_not_be_referenced_is_refused(tmp_path):
    cine = write_dicom(
        tmp_path / "cine.dcm", np.zeros((6, 7), np.uint8), "US", NumberOfFrames=2, PixelData=bytes(2 * 42)
    )
    lost = series(tmp_path / "lost", FrameOfReferenceUID=None)
    studies = series(tmp_path / "studies", StudyInstanceUID=None)
    for source, message in (
        (cine, "cine.dcm.*cine loop"),
        (lost, "lost.*Frame Of Reference"),
        (studies, "studies.*Study"),
    ):
        geometry = read_image(source).geometry
        with pytest.raises(DicomSourceError, match=message):
            write_dicom_seg(tmp_path / "seg.dcm", np.ones(geometry.shape, int), geometry, source, NAMES)
    assert not (tmp_path / "seg.dcm").exists()


def test_nothing_found_leaves_no_file_of_an_earlier_run_either(tmp_path):
    source = series(tmp_path / "series")
    path, _ = segment(tmp_path, source)
    geometry = read_image(source).geometry
    assert not write_dicom_seg(path, np.zeros(geometry.shape, int), geometry, source, NAMES)
    assert not path.exists()


def test_failed_write_leaves_the_old_segmentation(tmp_path, monkeypatch):
    source = series(tmp_path / "series")
    path, _ = segment(tmp_path, source)
    before, content = sorted(os.listdir(tmp_path)), path.read_bytes()

    def full_disk(self, part):
        Path(part).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(highdicom.seg.Segmentation, "save_as", full_disk)
    with pytest.raises(DataError, match="seg.dcm.*No space left") as caught:
        segment(tmp_path, source)
    assert not isinstance(caught.value, DicomSourceError)
    assert sorted(os.listdir(tmp_path)) == before and path.read_bytes() == content


def test_transform_warns_once_of_queries_that_are_not_dicom_and_goes_on_after_a_refusal(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    save = SaveDicomSegd(names=OutputNames(tmp_path / "out"), class_names=NAMES)
    sources = [series(tmp_path / "lost", FrameOfReferenceUID=None), series(tmp_path / "good")]
    geometry = read_image(sources[1]).geometry
    labels = torch.from_numpy(blobs(geometry.shape))
    for source in ("a.nii.gz", "b.nii.gz"):
        save({"pred": labels, "geometry": geometry, "source": str(tmp_path / source)})
    for source in sources:
        save({"pred": labels, "geometry": geometry, "source": str(source)})
    warned, refused = caplog.messages
    assert "a.nii.gz" in warned and "lost" in refused
    assert os.listdir(tmp_path / "out") == ["good.dcm"]
    save({"pred": labels * 0, "geometry": geometry, "source": str(sources[1])})
    assert "nothing was found" in caplog.messages[-1] and not os.listdir(tmp_path / "out")


def test_segmentations_among_queries_are_no_queries(tmp_path):
    one = series(tmp_path / "queries" / "one")
    path, _ = segment(tmp_path, one)
    (tmp_path / "queries" / "out").mkdir()
    for target in (tmp_path / "queries" / "out" / "one.dcm", tmp_path / "queries" / "one.dcm", one / "seg.dcm"):
        shutil.copy(path, target)
    assert [case["image"] for case in load_datalist(tmp_path / "queries", require_labels=False)] == [str(one)]
    assert [case["image"] for case in load_datalist(one, require_labels=False)] == [str(one)]
    assert len(read_image(one).slices) == SHAPE[0]


def test_output_that_would_replace_the_query_is_refused(tmp_path):
    source = write_dicom(tmp_path / "image.dcm", np.ones((6, 7), np.uint8), "DX")
    with pytest.raises(DataError, match="image.dcm.*output_dir"):
        OutputNames(tmp_path).claim(str(source), ".dcm")


def test_an_image_without_a_class_becomes_a_segmentation_of_empty_segments(tmp_path):
    source = series(tmp_path / "series")
    geometry = read_image(source).geometry
    nothing = np.zeros(geometry.shape, int)
    path = tmp_path / "seg.dcm"
    assert not write_dicom_seg(path, nothing, geometry, source, NAMES) and not path.exists()
    assert write_dicom_seg(path, nothing, geometry, source, NAMES, approved=True, keep_empty=True)
    found = highdicom.seg.segread(path)
    assert [segment.SegmentLabel for segment in found.SegmentSequence] == list(NAMES.values())
    # DICOM wants a frame for it; one for each segment is enough, and all slices are referred to.
    assert found.NumberOfFrames == len(NAMES) and not found.pixel_array.any()
    [referenced] = found.ReferencedSeriesSequence
    assert len(referenced.ReferencedInstanceSequence) == SHAPE[0]
    labels, names = read_dicom_seg(path, geometry, source)
    assert not labels.any() and names == NAMES
    # A map with classes is what it is without the switch.
    write_dicom_seg(path, blobs(geometry.shape), geometry, source, NAMES, keep_empty=True)
    assert len(highdicom.seg.segread(path).SegmentSequence) == 3


def test_more_than_255_classes_are_segments_of_their_own(tmp_path):
    source = series(tmp_path / "series")
    geometry = read_image(source).geometry
    labels = np.zeros(geometry.shape, int)
    labels.ravel()[:257] = np.arange(1, 258)
    names = {value: f"structure {value}" for value in range(1, 258)}
    assert write_dicom_seg(tmp_path / "seg.dcm", labels, geometry, source, names)
    found, told = read_dicom_seg(tmp_path / "seg.dcm", geometry, source)
    assert np.array_equal(found, labels) and told == names
