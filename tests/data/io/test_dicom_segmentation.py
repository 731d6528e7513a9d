"""A DICOM Segmentation read as the class map of an image."""

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.uid import generate_uid

from sam2sgp.data import read_image, read_label, write_dicom_seg
from sam2sgp.data.io import segment_names
from sam2sgp.errors import DataError
from tests.helpers.segmentations import NAMES, SERIES, SHAPE, blobs, segment, series


@pytest.mark.parametrize("name", SERIES)
def test_it_is_a_label_of_its_series_and_of_the_same_voxels_in_other_formats(tmp_path, name):
    source = series(tmp_path / "series", **SERIES[name])
    path, label = segment(tmp_path, source)
    for image in (source, tmp_path / "label.nii.gz"):
        geometry = read_image(image).geometry
        found = geometry.to_native(read_label(path, geometry))
        assert np.array_equal(found, np.asarray(label.dataobj))
    with pytest.raises(DataError, match="seg.dcm.*(lie between them|voxels away)"):
        read_label(path, read_image(series(tmp_path / "other", origin=(1.1, 2.0, 3.0), spacing=(9, 9, 9))).geometry)


def test_it_tells_what_its_class_values_are_called(tmp_path):
    path, label = segment(tmp_path, series(tmp_path / "series"))
    assert segment_names(path) == {value: NAMES[value] for value in (1, 3, 7)}
    nib.save(label, tmp_path / "label.nii.gz")
    assert segment_names(tmp_path / "label.nii.gz") == {}


def test_slices_without_frames_between_others_stay_empty_in_a_label(tmp_path):
    source = series(tmp_path / "series")
    geometry = read_image(source).geometry
    labels = blobs(geometry.shape)
    labels[::2] = 0
    assert write_dicom_seg(tmp_path / "seg.dcm", labels, geometry, source, NAMES)
    assert np.array_equal(read_label(tmp_path / "seg.dcm", geometry), labels)


@pytest.mark.parametrize("kind", ["PROBABILITY", "OCCUPANCY"])
def test_of_fractional_segments_voxels_of_half_the_highest_value_count(tmp_path, kind):
    names = ("PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime")
    empty = dict.fromkeys((*names, "AccessionNumber", "ReferringPhysicianName"), "")
    source = series(tmp_path / "series", shuffle=False, **empty)
    written, _ = segment(tmp_path, source)
    described = list(highdicom.seg.segread(written).SegmentSequence)[:1]
    sources = [pydicom.dcmread(path) for path in sorted(source.iterdir())]
    fractions = np.zeros(SHAPE)
    fractions[1:4, 2:9, 3:12] = np.linspace(0.1, 0.9, 9)
    description = highdicom.seg.SegmentDescription.from_dataset(described[0])
    segmentation = highdicom.seg.Segmentation(
        sources, fractions, "FRACTIONAL", [description], generate_uid(), 1, generate_uid(), 1, "m", "m", "1", "1",
        fractional_type=kind, max_fractional_value=200,
    )  # fmt: skip
    segmentation.save_as(tmp_path / "fractions.dcm")
    geometry = read_image(source).geometry
    found = geometry.to_native(read_label(tmp_path / "fractions.dcm", geometry)).T
    assert np.array_equal(found > 0, fractions >= 0.5)
