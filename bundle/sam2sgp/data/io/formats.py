"""Which files are images, of which format, and how results of them are named: by suffix, DICOM by content."""

import os
from collections.abc import Sequence
from pathlib import Path

import pydicom
from pydicom.uid import SegmentationStorage

from sam2sgp.data.io.geometry import Geometry

NIFTI_SUFFIXES = (".nii.gz", ".nii")
ITK_SUFFIXES = (".seg.nrrd", ".nrrd", ".mha", ".mhd")
DICOM_SUFFIXES = (".dcm",)
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
# Of results, for volumes and for pictures.
OUTPUT_SUFFIX = {False: ".nii.gz", True: ".png"}
MAP_SUFFIX = {False: ".nii.gz", True: ".tif"}
SUFFIXES = NIFTI_SUFFIXES + ITK_SUFFIXES + DICOM_SUFFIXES + PICTURE_SUFFIXES


def output_suffix(geometry: Geometry) -> str:
    """The suffix of a label written for an image of this geometry: ".png" for pictures, ".nii.gz" for volumes."""
    return OUTPUT_SUFFIX[geometry.is_picture]


def map_suffix(geometry: Geometry) -> str:
    """The suffix of a map of real values: ".tif" for pictures, ".nii.gz" for volumes."""
    return MAP_SUFFIX[geometry.is_picture]


def result_endings(path: str | os.PathLike, maps: Sequence[str] = (), dicom_seg: bool = False) -> list[str]:
    """What is added to a query's stem to name its results: its label, `maps` by name, and a DICOM segmentation."""
    picture = is_picture(path)
    endings = [OUTPUT_SUFFIX[picture], *(f"_{name}{MAP_SUFFIX[picture]}" for name in maps)]
    return endings + [".dcm"] * dicom_seg


def is_picture(path: str | os.PathLike) -> bool:
    """Whether an image is a picture, not a volume, by its name."""
    path = Path(path)
    return suffix_of(path) in PICTURE_SUFFIXES and not path.is_dir()


def image_stem(path: str | os.PathLike) -> str:
    """File name without an image suffix (`.nii.gz` counts as one); of a DICOM series folder, the folder's name."""
    path = Path(path)
    suffix = suffix_of(path)
    return path.name[: -len(suffix)] if suffix and not path.is_dir() else path.name


def is_image(path: str | os.PathLike) -> bool:
    """Whether a path is an image by its suffix, a DICOM file by content, or a folder that holds DICOM files."""
    path = Path(path)
    if path.name.startswith("."):
        return False
    if path.is_dir():
        return bool(dicom_files(path))
    return bool(suffix_of(path)) or has_dicom_magic(path)


def dicom_files(folder: str | os.PathLike) -> list[Path]:
    """The DICOM files directly in a folder, by name.

    DICOMDIR, segmentations (SEG), other files and subfolders are left out.
    """
    return [
        path
        for path in sorted(Path(folder).iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.name != "DICOMDIR"
        and is_dicom(path)
        and not is_dicom_seg(path)
    ]


def is_dicom(path: str | os.PathLike) -> bool:
    """Whether an image is DICOM: a folder, or a file by its suffix or, without one, by its content."""
    path = Path(path)
    suffix = suffix_of(path)
    return path.is_dir() or suffix in DICOM_SUFFIXES or (not suffix and has_dicom_magic(path))


def is_dicom_seg(path: str | os.PathLike) -> bool:
    """Whether a file is a DICOM Segmentation object, by its file meta information."""
    try:
        return pydicom.filereader.read_file_meta_info(path).get("MediaStorageSOPClassUID") == SegmentationStorage
    except Exception:  # whatever is wrong with a damaged file, reading it as an image tells
        return False


def suffix_of(path: str | os.PathLike) -> str:
    """The known image suffix of a path, lower case, or ""."""
    name = Path(path).name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix) and name != suffix), "")


def has_dicom_magic(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False
