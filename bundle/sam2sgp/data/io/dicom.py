"""Reading a DICOM series folder as one regular stack of slices, or a single DICOM file."""

import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pydicom
from pydicom.pixel_data_handlers.util import apply_color_lut, convert_color_space
from pydicom.uid import RLELossless

from sam2sgp.data.io.decoding import decode_dicom
from sam2sgp.data.io.dicom_file import frame_shape, open_dicom, samples_of
from sam2sgp.data.io.formats import dicom_files
from sam2sgp.data.io.geometry import Grid
from sam2sgp.data.io.limits import check_memory
from sam2sgp.errors import DataError

# DICOM positions are decimal strings that scanners round; a missing slice changes a gap by 100 %.
SLICE_GAP_TOLERANCE = 5e-2
# A sheared stack (gantry tilt) has no rectangular voxels, so no viewer would show a label on it in place.
SHEAR_TOLERANCE = 1e-2
# Modalities whose multi-frame files are films: their frames have no positions of their own to lose.
CINE_MODALITIES = ("US", "IVUS", "XA", "RF", "ES", "OP")


def dicom_headers(path: str | os.PathLike) -> list[pydicom.Dataset]:
    """Headers, without pixels, of a DICOM series folder or file, in the order of slices along the grid's third axis.

    Raises:
        DataError: as `read_image` does for a series that is not one regular stack of slices.
    """
    path = Path(path)
    return list(_dicom_stack(path, dicom_files(path) if path.is_dir() else [path])[0].values())


def read_dicom(path: Path, files: list[Path], limit: int | None = None) -> Grid:
    """The one series in `files` as a stack of slices, or a single file."""
    headers, step = _dicom_stack(path, files)
    first = next(iter(headers.values()))
    orientation = _orientation(first)
    row_spacing, column_spacing = (
        float(value) for value in first.get("PixelSpacing") or first.get("ImagerPixelSpacing") or (1.0, 1.0)
    )
    affine = np.eye(4)
    affine[:3, 0] = orientation[:3] * column_spacing
    affine[:3, 1] = orientation[3:] * row_spacing
    affine[:3, 2] = step
    affine[:3, 3] = first.get("ImagePositionPatient") or (0.0, 0.0, 0.0)
    check_memory(path, (len(headers), *frame_shape(first)), samples_of(first), limit)
    pixels = np.concatenate([_dicom_pixels(file) for file in headers])
    array = pixels.transpose(2, 1, 0, 3)
    modality = str(first.get("Modality") or "") or None
    is_rgb = array.shape[3] == 3
    return Grid(array, array.shape[:3], np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine, is_rgb=is_rgb, modality=modality)


def _dicom_stack(path: Path, files: list[Path]) -> tuple[dict[Path, pydicom.Dataset], np.ndarray]:
    """Headers of the one series in `files` in the order of its slices, and the step (3,) in mm from one to the next.

    Raises DataError unless they are one regular stack of slices, or a single file.
    """
    headers = {file: _dicom_header(file) for file in files}
    headers = {file: header for file, header in headers.items() if "Rows" in header}
    if not headers:
        raise DataError(f"{path}: expected a DICOM series, found no DICOM image; check the path.")
    _check_one_series(path, list(headers.values()))
    for file, header in headers.items():
        _check_kind(file, header)
    first = next(iter(headers.values()))
    orientation = _orientation(first)
    normal = np.cross(orientation[:3], orientation[3:])
    if len(headers) > 1:
        order, step = _stack(path, headers, normal)
        return {file: headers[file] for file in order}, step
    is_film = int(first.get("NumberOfFrames") or 1) > 1
    thickness = 0.0 if is_film else float(first.get("SpacingBetweenSlices") or first.get("SliceThickness") or 0.0)
    return headers, normal * (abs(thickness) or 1.0)


def _orientation(header: pydicom.Dataset) -> np.ndarray:
    """Directions (6,) of a row and of a column, LPS; those of an axial slice where the header has none."""
    return np.asarray(header.get("ImageOrientationPatient") or (1, 0, 0, 0, 1, 0), dtype=float)


def _dicom_header(file: Path) -> pydicom.Dataset:
    try:
        return open_dicom(file)
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{file}: expected a DICOM file, found a damaged one or another format ({error}); copy it again."
        ) from error


def _check_one_series(path: Path, headers: list[pydicom.Dataset]) -> None:
    series: dict[str, list] = defaultdict(list)
    for header in headers:
        series[str(header.get("SeriesInstanceUID"))].append(header)
    if len(series) > 1:
        listed = "; ".join(
            f"{uid} ({group[0].get('Modality', '?')}, {group[0].get('SeriesDescription', 'no description')}, "
            f"{len(group)} files)"
            for uid, group in sorted(series.items())
        )
        raise DataError(
            f"{path}: expected one DICOM series, found {len(series)}: {listed}; put each series in a folder of its own."
        )


def _check_kind(file: Path, header: pydicom.Dataset) -> None:
    modality = header.get("Modality")
    if modality == "SEG":
        raise DataError(f"{file}: expected an image, found a DICOM segmentation; convert it to a NIfTI class map.")
    frames = int(header.get("NumberOfFrames") or 1)
    if "PerFrameFunctionalGroupsSequence" in header or (frames > 1 and modality not in CINE_MODALITIES):
        raise DataError(
            f"{file}: expected one slice per file, found a multi-frame object of {frames} frames; convert it to NIfTI "
            "or to a classic series."
        )


def _stack(path: Path, headers: dict[Path, pydicom.Dataset], normal: np.ndarray) -> tuple[list[Path], np.ndarray]:
    """Files in the order of their positions along the normal, and the step in mm from one to the next.

    Raises DataError unless they are one regular stack of equal slices.
    """
    for name, what in (
        ("ImagePositionPatient", "slice positions"),
        ("ImageOrientationPatient", "a slice orientation"),
        ("PixelSpacing", "a pixel spacing"),
    ):
        lacking = [file.name for file, header in headers.items() if not header.get(name)]
        if lacking:
            raise DataError(
                f"{path}: expected {what} in each file of the series, found none in {lacking[0]} ({len(lacking)} of "
                f"{len(headers)} files); if these are separate images, give each file by itself."
            )
    first = next(iter(headers.values()))
    for name, tolerance in (("Rows", 0), ("Columns", 0), ("PixelSpacing", 1e-4), ("ImageOrientationPatient", 1e-3)):
        expected = np.asarray(first.get(name), dtype=float)
        for file, header in headers.items():
            found = np.asarray(header.get(name), dtype=float)
            if found.shape != expected.shape or np.abs(found - expected).max() > tolerance:
                raise DataError(
                    f"{path}: expected slices of one size and orientation, found {name} {found.tolist()} in "
                    f"{file.name} but {expected.tolist()} in others; remove scouts and other series."
                )
    places = {file: np.asarray(header.ImagePositionPatient, dtype=float) for file, header in headers.items()}
    order = sorted(places, key=lambda file: places[file] @ normal)
    heights = np.array([places[file] @ normal for file in order])
    gaps = np.diff(heights)
    usual = float(np.median(gaps[gaps > 1e-3])) if (gaps > 1e-3).any() else 0.0
    for index in np.flatnonzero(gaps <= max(SLICE_GAP_TOLERANCE * usual, 1e-3)):
        raise DataError(
            f"{path}: expected each slice position once, found {order[index].name} and {order[index + 1].name} both at "
            f"{heights[index]:.2f} mm; remove the duplicates, or split the series by time or echo."
        )
    for index in np.flatnonzero(np.abs(gaps - usual) > SLICE_GAP_TOLERANCE * usual):
        raise DataError(
            f"{path}: expected slices {usual:.2f} mm apart, found a gap of {gaps[index]:.2f} mm between "
            f"{order[index].name} and {order[index + 1].name}; a slice is missing or the spacing is irregular: export "
            "the whole series again."
        )
    step = (places[order[-1]] - places[order[0]]) / (len(order) - 1)
    strays = max(np.linalg.norm(places[file] - places[order[0]] - step * n) for n, file in enumerate(order))
    tilt = np.linalg.norm(step - (step @ normal) * normal)
    if tilt > SHEAR_TOLERANCE * usual or strays > 2 * SLICE_GAP_TOLERANCE * usual:
        raise DataError(
            f"{path}: expected slices stacked evenly along their normal, found them shifted sideways by {tilt:.2f} mm "
            f"each and up to {strays:.2f} mm out of line (tilted gantry?); resample the series to a rectangular grid."
        )
    return order, step


def _dicom_pixels(file: Path) -> np.ndarray:
    """(frames, rows, columns, C) float32: rescaled (HU for CT), MONOCHROME1 inverted, colours as RGB of 0..255."""
    dataset = open_dicom(file, pixels=True)
    frames = int(dataset.get("NumberOfFrames") or 1)
    samples = int(dataset.get("SamplesPerPixel") or 1)
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_compressed and syntax != RLELossless:
        # GDCM knows every codec, and rescales, inverts and converts colours itself. Uncompressed MONOCHROME1 of 12
        # bits it refuses, so those files go through pydicom.
        return decode_dicom(file, (frames, dataset.Rows, dataset.Columns), max(samples, 3)).astype(np.float32)
    pixels = dataset.pixel_array
    photometric = dataset.PhotometricInterpretation
    if photometric == "PALETTE COLOR":
        pixels, samples = apply_color_lut(pixels, dataset)[..., :3], 3
        if pixels.dtype == np.uint16:
            pixels = pixels / 257.0
    elif samples == 3:
        pixels = convert_color_space(pixels, photometric, "RGB") if photometric != "RGB" else pixels
    else:
        if photometric == "MONOCHROME1":
            # Lowest plus highest storable value: 2 ** bits - 1 unsigned, -1 signed.
            turning_point = -1.0 if dataset.PixelRepresentation else 2.0**dataset.BitsStored - 1
            pixels = turning_point - pixels
        pixels = pixels * float(dataset.get("RescaleSlope") or 1.0) + float(dataset.get("RescaleIntercept") or 0.0)
    return pixels.reshape(frames, dataset.Rows, dataset.Columns, samples).astype(np.float32)
