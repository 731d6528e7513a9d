"""Which files are images, of which format, and how results of them are named: by suffix, DICOM by content."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import pydicom
from pydicom.uid import UID, SegmentationStorage

from sam2sgp.data.io.geometry import Geometry

NIFTI_SUFFIXES = (".nii.gz", ".nii", ".img")
NRRD_SUFFIXES = (".seg.nrrd", ".nrrd", ".nhdr")
ITK_SUFFIXES = (*NRRD_SUFFIXES, ".mha", ".mhd")
# Headers whose voxels lie in files of their own, and the other way round: no file of these is an image by itself. A
# header of MetaImage (.mhd) may be one, as its voxels may follow it.
DETACHED_SUFFIXES = (".nhdr", ".img")
DICOM_SUFFIXES = (".dcm",)
# By suffix, Pillow's name of the format.
PICTURE_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
}
PICTURE_SUFFIXES = tuple(PICTURE_FORMATS)
# Of results, for volumes and for pictures.
OUTPUT_SUFFIX = {False: ".nii.gz", True: ".png"}
MAP_SUFFIX = {False: ".nii.gz", True: ".tif"}
DATA_ENTRY = {".mhd": r"(?m)^ElementDataFile *= *(.*)", ".nhdr": r"(?m)^data ?file *: *(.*)"}
# Headers are text of a few lines; behind them, voxels may follow.
MAX_HEADER = 2**20
SUFFIXES = NIFTI_SUFFIXES + ITK_SUFFIXES + DICOM_SUFFIXES + PICTURE_SUFFIXES
# Storage classes with pixels whose names don't say "Image".
PIXEL_CLASSES = {
    "Enhanced US Volume Storage",
    "Parametric Map Storage",
    "RT Dose Storage",
    "Ophthalmic Thickness Map Storage",
    "Corneal Topography Map Storage",
}
# Bytes of the first element of a DICOM file without preamble, which is a group length, a UID or a character set.
LONGEST_FIRST_ELEMENT = 256


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
    """Whether a path is an image by its suffix, a DICOM file by content, or a folder that holds DICOM files.

    DICOM objects without pixels, such as a DICOMDIR, a structured report or a structure set, are none.
    """
    path = Path(path)
    if path.name.startswith("."):
        return False
    if path.is_dir():
        return bool(dicom_files(path))
    suffix = suffix_of(path)
    if suffix and suffix not in DICOM_SUFFIXES:
        return True
    return is_dicom(path) and without_pixels(path) is None


def dicom_files(folder: str | os.PathLike) -> list[Path]:
    """The DICOM files directly in a folder, by name.

    DICOM objects without pixels (DICOMDIR, reports, structure sets …), segmentations (SEG), other files and subfolders
    are left out.
    """
    return [
        path
        for path in sorted(Path(folder).iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and is_dicom(path)
        and without_pixels(path) is None
        and not is_dicom_seg(path)
    ]


def is_dicom(path: str | os.PathLike) -> bool:
    """Whether an image is DICOM: a folder, or a file by its suffix or, without one, by its content."""
    path = Path(path)
    suffix = suffix_of(path)
    return path.is_dir() or suffix in DICOM_SUFFIXES or (not suffix and has_dicom_content(path))


def is_dicom_seg(path: str | os.PathLike) -> bool:
    """Whether a file is a DICOM Segmentation object, by its file meta information."""
    return _storage_class(path) == SegmentationStorage


def without_pixels(path: str | os.PathLike) -> str | None:
    """What a DICOM file holds instead of pixels, such as "Basic Text SR", by its file meta information.

    None for images, segmentations, and where the file doesn't say.
    """
    storage = _storage_class(path)
    name = UID(storage or "").name
    if storage in (None, SegmentationStorage) or name == storage or "Image" in name or name in PIXEL_CLASSES:
        return None
    return name.removesuffix(" Storage")


def data_files(path: str | os.PathLike) -> list[Path]:
    """Further files that belong to an image: the voxels of an NRRD or MetaImage header, the header of a NIfTI pair.

    Those that a header lists by a pattern are taken to be all files of its folder that are no image. Files that a
    header names need not exist.
    """
    path, suffix = Path(path), suffix_of(path)
    if suffix == ".img":
        return [path.with_suffix(ending) for ending in (".hdr", ".HDR") if path.with_suffix(ending).is_file()]
    if suffix not in DATA_ENTRY:
        return []
    text = path.read_bytes()[:MAX_HEADER].decode("utf-8", errors="surrogateescape")
    entry = re.search(DATA_ENTRY[suffix], text, re.DOTALL | re.IGNORECASE)
    names = [line.strip() for line in entry[1].splitlines()] if entry else []
    names = names[1:] if names[:1] and names[0].startswith("LIST") else names[:1]
    data = [path.parent / name for name in names if name and name not in ("LOCAL", "INTERNAL")]
    if any("%" in name for name in names):
        others = (file for file in sorted(path.parent.iterdir()) if file.is_file() and file != path)
        data = [file for file in others if not suffix_of(file)]
    return data


def suffix_of(path: str | os.PathLike) -> str:
    """The known image suffix of a path, lower case, or ""."""
    name = Path(path).name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix) and name != suffix), "")


def has_dicom_content(path: Path) -> bool:
    """Whether a file begins as DICOM does, with or without the preamble of 128 bytes."""
    return has_dicom_magic(path) or has_dicom_elements(path)


def has_dicom_magic(path: Path) -> bool:
    """Whether the letters DICM follow a preamble of 128 bytes."""
    return _head(path, 132)[128:] == b"DICM"


def has_dicom_elements(path: Path) -> bool:
    """Whether a file begins with a tag of group 2 or 8, as DICOM without preamble does.

    A two-letter value representation or a plausible length must follow.
    """
    head = _head(path, 8)
    if len(head) < 8:
        return False
    for order in ("little", "big"):
        group, element, length = (int.from_bytes(head[i:j], order) for i, j in ((0, 2), (2, 4), (4, 8)))
        is_explicit = head[4:6].isalpha() and head[4:6].isupper()
        if (group == 2 and element <= 1) or (group == 8 and element <= 0x18):
            return is_explicit or 0 < length <= LONGEST_FIRST_ELEMENT
    return False


def _head(path: Path, length: int) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(length)
    except OSError:
        return b""


def _storage_class(path: str | os.PathLike) -> str | None:
    """What a DICOM file holds (Media Storage SOP Class UID), by its file meta information; None where it has none."""
    try:
        found = pydicom.filereader.read_file_meta_info(path).get("MediaStorageSOPClassUID")
    except Exception:  # whatever is wrong with a damaged file, reading it as an image tells
        return None
    return found if isinstance(found, str) else None
