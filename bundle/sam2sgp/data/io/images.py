"""Reading an image of any supported format as slices in display orientation."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sam2sgp.data.io.dicom import read_dicom
from sam2sgp.data.io.dicom_segmentation import read_segmentation
from sam2sgp.data.io.formats import (
    DICOM_SUFFIXES,
    ITK_SUFFIXES,
    NIFTI_SUFFIXES,
    PICTURE_SUFFIXES,
    dicom_files,
    has_dicom_content,
    is_dicom_seg,
    suffix_of,
)
from sam2sgp.data.io.geometry import Geometry, Grid, geometry_of, rounded
from sam2sgp.data.io.itk import read_itk
from sam2sgp.data.io.nifti import read_nifti
from sam2sgp.data.io.picture_files import read_picture
from sam2sgp.errors import DataError

# Ends of the ranges of integers (those of 32 bits as float32), with which programs fill what lies outside an image, and
# what no scanner measures.
PADDING = (-(2.0**15), 2.0**15 - 1, 2.0**16 - 1, -(2.0**31), 2.0**31, 2.0**32)
LARGEST_VALUE = 1e30
# Hounsfield units of air, with which more than CT is filled; all CT has fat and noise below the second number, and
# hardly anything but bone above the third.
AIR, LOWEST_OTHERS, HIGHEST_TISSUE = (-1100.0, -500.0), -10.0, 300.0
# Beyond it, a highest value is no white of 8 bits.
LARGEST_BYTE = 255
# In degrees: less comes from rounding.
LARGEST_SHEAR = 0.6


@dataclass
class MedicalImage:
    """An image as read from disk.

    Attributes:
        slices: (Z, C, H, W) float32, the file's own finite intensities (HU for CT), in display orientation.
        geometry: the way back to the file's grid.
        modality: the DICOM tag's value ("CT", "MR", "PT", "US", "CR", "DX"); None if the file doesn't say.
        is_rgb: a colour image, whose values lie in 0..255.
        units: of the values, the DICOM tag's value ("BQML", "GML" in PET); None if the file doesn't say.
        path: of the file or series folder.
        warnings: sentences on what may be wrong with it.
    """

    slices: np.ndarray
    geometry: Geometry
    modality: str | None
    is_rgb: bool
    path: str
    warnings: list[str] = field(default_factory=list)
    units: str | None = None


def read_image(path: str | os.PathLike, slice_axis: str | int = "auto") -> MedicalImage:
    """Read an image in the orientation in which a radiologist looks at it.

    Axial slices have rows running to posterior and columns to the patient's left, and go from inferior to superior.
    Sagittal: rows to inferior, columns to posterior. Coronal: rows to inferior, columns to left. Pictures stay as
    they are, with Z = 1. Oblique volumes are turned to the closest of these only by permutations and flips.

    Args:
        path: a NIfTI, NRRD, MetaImage, DICOM or picture file, or the folder of one DICOM series.
        slice_axis: canonical axis to slice along: 0 left (sagittal), 1 posterior (coronal), 2 superior (axial); or
            "auto", the axis whose spacing is at least 1.5 times the others', else 2. A grid that is one voxel thick
            along a single axis is always one slice.

    NaN and infinite voxels become the smallest finite value, padding far from all other values the smallest of these,
    both with a warning.

    Raises:
        DataError: the file is missing, damaged, empty, without a finite value, or a series that is not one regular
            stack of slices.
    """
    grid = read_grid(path)
    geometry = geometry_of(grid, slice_axis)
    # Turned before it grows to 32 bits, and the file's own copy let go: a long CT is gigabytes.
    stored = geometry.display(grid.array)
    grid.array = np.empty(0)
    with np.errstate(over="ignore"):
        array = stored.astype(np.float32)
    finite = np.isfinite(array) if stored.dtype.kind == "f" else np.True_
    del stored
    if not finite.all():
        if not finite.any():
            raise DataError(f"{path}: expected intensities, found no finite value; export the image again.")
        grid.warnings.append(
            f"{array.size - int(finite.sum())} of its {array.size} values are NaN or infinite; they are read as the "
            "smallest finite value."
        )
        array[~finite] = array[finite].min()
    if not grid.is_rgb:
        _darken_padding(array, grid.warnings, grid.modality == "CT")
    slices = np.ascontiguousarray(np.moveaxis(array, 3, 1))
    return MedicalImage(slices, geometry, grid.modality, grid.is_rgb, str(path), grid.warnings, grid.units)


def _darken_padding(array: np.ndarray, warnings: list[str], is_ct: bool) -> None:
    """Give padding of slices (Z, H, W, C), in place, the lowest of the other values, and say so.

    Padding is the lowest value and negative, the highest one of a volume and beyond a byte, or one of `PADDING`. It
    reaches a corner of the image, and all other values lie closer together than to it: scaled by percentiles, these
    would all look alike otherwise. The value of air is padding only of what isn't CT by its other values.
    """
    for value in {array.min(), array.max()}:
        is_end = value in PADDING or abs(value) >= LARGEST_VALUE
        if not is_end and (0 <= value <= LARGEST_BYTE or (value > 0 and len(array) == 1)):
            continue
        corners = array[:, :: max(array.shape[1] - 1, 1), :: max(array.shape[2] - 1, 1)]
        if not (corners == value).any():
            continue
        lowest, highest = _range_without(array, value)
        is_far = min(abs(float(value) - lowest), abs(float(value) - highest)) > highest - lowest > 0
        if AIR[0] <= value < AIR[1]:
            is_far = not is_ct and lowest >= LOWEST_OTHERS and highest > HIGHEST_TISSUE
        if is_far:
            is_padding = array == value
            array[is_padding] = lowest
            count = int(is_padding.sum())
            warnings.append(
                f"{count} of its {array.size} values are {value:g}, far from all others: they are taken as padding and "
                f"read as {lowest:g}, the lowest of the others."
            )


def _range_without(array: np.ndarray, value: float) -> tuple[float, float]:
    """The lowest and the highest of the other values of slices, from one slice after the other: a long CT is gigabytes.

    Without any, they are infinite, the lowest above the highest.
    """
    lowest, highest = np.inf, -np.inf
    for single in array:
        others = single[single != value]
        if others.size:
            lowest, highest = min(lowest, float(others.min())), max(highest, float(others.max()))
    return lowest, highest


def read_geometry(path: str | os.PathLike, slice_axis: str | int = "auto") -> Geometry:
    """Where an image's voxels lie, without turning or converting any of them; arguments and errors as of `read_image`.

    An image without a finite value is not told from others.
    """
    return geometry_of(read_grid(path), slice_axis)


def read_grid(path: str | os.PathLike, label: bool = False, limit: int | None = None) -> Grid:
    """Read a file by the reader of its format, or the folder of one DICOM series, on the file's own grid.

    Args:
        label: read it as class values, as a DICOM Segmentation or a Slicer segmentation then is; it may be compressed
            further than an image, see `sam2sgp.data.io.limits`.
        limit: bytes that it may take at most as float32; None: `default_memory()`.

    Raises:
        DataError: there is no such file, no reader for it, or it can't be read; its grid is empty or has no size.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: expected an image, found no such file or folder; check the path.")
    suffix = suffix_of(path)
    try:
        if path.is_dir():
            grid = read_dicom(path, dicom_files(path), limit)
        elif suffix in NIFTI_SUFFIXES:
            grid = read_nifti(path, label, limit)
        elif suffix in ITK_SUFFIXES:
            grid = read_itk(path, label, limit)
        elif suffix in PICTURE_SUFFIXES:
            grid = read_picture(path, label, limit)
        elif label and is_dicom_seg(path):
            grid = read_segmentation(path, limit)
        elif suffix in DICOM_SUFFIXES or has_dicom_content(path):
            grid = read_dicom(path, [path], limit)
        else:
            raise DataError(
                f"{path}: expected NIfTI, NRRD, MetaImage, DICOM, PNG, JPEG, TIFF or BMP, found another kind of file; "
                "convert it to one of these."
            )
    except DataError:
        raise
    except Exception as error:
        # The libraries raise types of their own, and zlib's and struct's, for the same thing: a damaged file.
        found = " ".join(str(error).split())[-300:] or type(error).__name__
        raise DataError(
            f"{path}: expected a readable image, found that reading fails ({found}); "
            + ("correct its permissions." if isinstance(error, PermissionError) else "copy or export it again.")
        ) from error
    if 0 in grid.array.shape:
        raise DataError(f"{path}: expected an image, found an empty grid {grid.array.shape}; export it again.")
    if not np.isfinite(grid.affine).all() or abs(np.linalg.det(grid.affine[:3, :3])) < 1e-12:
        raise DataError(
            f"{path}: expected an affine that gives each voxel a place and a size, found {rounded(grid.affine)}; "
            "correct the file's header."
        )
    directions = grid.affine[:3, :3] / np.linalg.norm(grid.affine[:3, :3], axis=0)
    shear = np.degrees(np.arcsin(min(np.abs(directions.T @ directions - np.eye(3)).max(), 1.0)))
    if shear > LARGEST_SHEAR:
        grid.warnings.append(
            f"Its axes are {shear:.1f} degrees off a right angle, as of a tilted gantry: sizes in mm are those of "
            "rectangular voxels, and ITK and 3D Slicer refuse such an image; resample it to a rectangular grid."
        )
    return grid
