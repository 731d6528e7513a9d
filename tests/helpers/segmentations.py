"""Writes DICOM Segmentations of small series for tests, and the class maps that they stand for."""

from pathlib import Path

import nibabel as nib
import numpy as np
from pydicom.uid import generate_uid

from sam2sgp.data import read_image, write_dicom_seg, write_label
from tests.helpers.dicom_files import write_series

NAMES = {1: "liver", 3: "Läsion", 5: "right_kidney", 7: "tumour"}


SHAPE = (5, 12, 16)


OBLIQUE = np.linalg.qr(np.array([[1.0, 0.2, -0.3], [-0.25, 1.0, 0.1], [0.3, -0.1, 1.0]]))[0] * [-1, -1, 1]


SERIES = {
    "axial ascending": {"shuffle": False},
    "axial descending": {"spacing": (-2.5, 0.8, 0.7), "SliceThickness": 2.5, "shuffle": False},
    "shuffled names": {"shuffle": True},
    "prone": {"orientation": (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0)},
    "feet up": {"orientation": (1.0, 0.0, 0.0, 0.0, -1.0, 0.0)},
    "sagittal": {"orientation": (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)},
    "coronal": {"orientation": (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)},
    "coronal descending": {
        "orientation": (1.0, 0.0, 0.0, 0.0, 0.0, -1.0), "spacing": (-2.5, 0.8, 0.7), "SliceThickness": 2.5
    },
    "oblique": {"orientation": tuple(OBLIQUE.T[:2].ravel().round(8))},
    "isotropic sagittal": {"orientation": (0.0, 1.0, 0.0, 0.0, 0.0, -1.0), "spacing": (0.8, 0.8, 0.8)},
}  # fmt: skip


def series(folder: Path, **options) -> Path:
    volume = np.random.default_rng(1).integers(-1000, 1000, SHAPE).astype(np.int16)
    tags = {"StudyInstanceUID": generate_uid(), "FrameOfReferenceUID": generate_uid(), **options}
    return write_series(folder, volume, **tags)


def blobs(shape: tuple[int, int, int]) -> np.ndarray:
    """Classes 1, 3 and 7 (not 5), different on each slice, none on the last one."""
    labels = np.random.default_rng(2).choice([0, 0, 1, 3, 7], shape)
    labels[-1] = 0
    labels[0][labels[0] == 3] = 0
    return labels


def segment(folder: Path, source: Path, slice_axis="auto") -> tuple[Path, nib.Nifti1Image]:
    """The segmentation of `blobs` and the same class map in NIfTI."""
    geometry = read_image(source, slice_axis).geometry
    labels = blobs(geometry.shape)
    assert write_dicom_seg(folder / "seg.dcm", labels, geometry, source, NAMES)
    write_label(folder / "label.nii.gz", labels, geometry)
    return folder / "seg.dcm", nib.load(folder / "label.nii.gz")
