"""Reading DICOM: a series folder or an enhanced multi-frame file as one regular stack of slices, or a single image.

Slices are put in the order of their positions (PS3.3 C.7.6.2). Anything but one stack of equal slices at equal
distances is refused: it has no rectangular grid of voxels on which a class map could be written.
"""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom import Dataset

from sam2sgp.data.io.dicom_file import samples_of
from sam2sgp.data.io.dicom_pixels import frame_item, is_inverted, read_dataset, read_frames, upper_bits_warning
from sam2sgp.data.io.formats import dicom_files
from sam2sgp.data.io.geometry import Grid
from sam2sgp.data.io.limits import check_memory
from sam2sgp.errors import DataError

# DICOM positions are decimal strings that scanners round; a missing slice changes a gap by 100 %.
SLICE_GAP_TOLERANCE = 5e-2
# What is rounded away may make up more of a thin slice, but never so much that a missing slice could hide in it.
LARGEST_ROUNDING = 0.25
# A sheared stack (gantry tilt) has no rectangular voxels, so no viewer would show a label on it in place.
SHEAR_TOLERANCE = 1e-2
# Directions are unit vectors at right angles, but for rounding.
DIRECTION_TOLERANCE = 1e-2
# Modalities whose multi-frame files are cine loops: their frames have no positions of their own to lose.
CINE_MODALITIES = ("US", "IVUS", "XA", "RF", "ES", "OP")
# Of ultrasound regions (PS3.3 C.8.5.5): two-dimensional format, centimetres.
REGION_2D, UNIT_CM = 1, 3
MM_PER_CM = 10.0


@dataclass(frozen=True)
class _Slice:
    """One frame of a file, and where it lies (LPS, mm); None for what its header doesn't say."""

    file: Path
    frame: int
    header: Dataset
    position: np.ndarray | None
    orientation: np.ndarray | None
    spacing: tuple[float, ...] | None
    # The last decimal place to which positions are given, in mm.
    precision: float

    @property
    def name(self) -> str:
        return f"{self.file.name} frame {self.frame + 1}" if _frame_count(self.header) > 1 else self.file.name


def read_dicom(path: Path, files: list[Path], limit: int | None = None) -> Grid:
    """The one series in `files` as a stack of slices, or a single image or cine loop.

    Raises DataError unless they are one regular stack of slices, of at most `limit` bytes as float32.
    """
    slices, step, warnings = _dicom_stack(path, files)
    first = slices[0]
    shape = len(slices), int(first.header.Rows or 0), int(first.header.get("Columns") or 0)
    check_memory(path, shape, samples_of(first.header), limit)
    orientation = _orientation(first)
    spacing = first.spacing or _region_spacing(first.header)
    affine = np.eye(4)
    affine[:3, 0] = orientation[:3] * (spacing or (1.0, 1.0))[1]
    affine[:3, 1] = orientation[3:] * (spacing or (1.0, 1.0))[0]
    affine[:3, 2] = step
    affine[:3, 3] = (0.0, 0.0, 0.0) if first.position is None else first.position
    array = _pixels(slices).transpose(2, 1, 0, 3)
    # Frames without a position, as of a video, have no distance.
    is_video = len(slices) > 1 and first.position is None
    return Grid(
        array,
        array.shape[:3],
        np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine,
        is_rgb=array.shape[3] == 3,
        modality=str(first.header.get("Modality") or "") or None,
        units=str(first.header.get("Units") or "") or None,
        has_spacing=spacing is not None and not is_video,
        warnings=warnings,
    )


def dicom_headers(path: str | os.PathLike) -> list[Dataset]:
    """Headers, without pixels, of a DICOM series folder or file, in the order of slices along the grid's third axis.

    An enhanced multi-frame file has one header.

    Raises:
        DataError: as `read_image` does for a series that is not one regular stack of slices.
    """
    return list({id(header): header for header, _ in dicom_slices(path)}.values())


def dicom_slices(path: str | os.PathLike) -> list[tuple[Dataset, int]]:
    """Header of its file, and number of its frame (from 0), of each slice along the grid's third axis.

    Raises:
        DataError: as `dicom_headers`.
    """
    path = Path(path)
    slices = _dicom_stack(path, dicom_files(path) if path.is_dir() else [path])[0]
    return [(piece.header, piece.frame) for piece in slices]


def _pixels(slices: list[_Slice]) -> np.ndarray:
    """(slices, rows, columns, C) float32 in the order of `slices`; each file is read once."""
    wanted: dict[Path, list[tuple[int, int]]] = defaultdict(list)
    for place, piece in enumerate(slices):
        wanted[piece.file].append((place, piece.frame))
    stack = None
    for file, places in wanted.items():
        frames = read_frames(file)
        if stack is None:
            stack = np.empty((len(slices), *frames.shape[1:]), np.float32)
        for place, frame in places:
            stack[place] = frames[frame]
    assert stack is not None
    return stack


def _dicom_stack(path: Path, files: list[Path]) -> tuple[list[_Slice], np.ndarray, list[str]]:
    """The slices of the one series in `files` in order, the step (3,) in mm from one to the next, and warnings.

    Raises DataError unless they are one regular stack of slices, or a single file.
    """
    headers = {file: read_dataset(file, pixels=False) for file in files}
    without = {file.name: str(header.get("Modality")) for file, header in headers.items() if "Rows" not in header}
    headers = {file: header for file, header in headers.items() if "Rows" in header}
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(without.values()).items()))
    if not headers:
        found = f"objects without pixels only ({kinds})" if without else "no DICOM image"
        raise DataError(
            f"{path}: expected a DICOM series, found {found}; check the path, and convert contours "
            "(RTSTRUCT) to a DICOM segmentation or a NIfTI class map."
        )
    warnings = [f"DICOM files without pixels in its folder are not used ({kinds})."] if without else []
    warnings += sorted({warning for header in headers.values() if (warning := upper_bits_warning(header))})
    _check_one_series(path, list(headers.values()))
    for file, header in headers.items():
        _check_kind(file, header)
    slices = [piece for file, header in _once(headers).items() for piece in _slices(file, header)]
    first = slices[0]
    orientation = _orientation(first)
    normal = np.cross(orientation[:3], orientation[3:])
    if len(slices) > 1 and not (len({piece.file for piece in slices}) == 1 and first.position is None):
        return *_stack(path, slices, normal), warnings
    measures = frame_item(first.header, 0, "PixelMeasuresSequence") or first.header
    thickness = float(measures.get("SpacingBetweenSlices") or measures.get("SliceThickness") or 0.0)
    return slices, normal * (abs(thickness) if thickness and len(slices) == 1 else 1.0), warnings


def _once(headers: dict[Path, Dataset]) -> dict[Path, Dataset]:
    """Files without copies of the same instance, which have its UID, its position and its pixels."""
    first: dict[tuple, Path] = {}
    kept = {}
    for file, header in headers.items():
        key = str(header.get("SOPInstanceUID")), str(header.get("ImagePositionPatient"))
        if key in first and _pixel_digest(file) == _pixel_digest(first[key]):
            continue
        first.setdefault(key, file)
        kept[file] = header
    return kept


def _pixel_digest(file: Path) -> bytes:
    return hashlib.sha256(read_dataset(file).get("PixelData") or b"").digest()


def _slices(file: Path, header: Dataset) -> list[_Slice]:
    """The frames of a file; those of an enhanced object lie where their functional groups say."""
    slices = []
    # Of a cine loop, the header may say where the probe was, but not where each frame is.
    own = Dataset() if _frame_count(header) > 1 else header
    for frame in range(_frame_count(header)):
        position = (frame_item(header, frame, "PlanePositionSequence") or own).get("ImagePositionPatient")
        orientation = (frame_item(header, frame, "PlaneOrientationSequence") or header).get("ImageOrientationPatient")
        measures = frame_item(header, frame, "PixelMeasuresSequence") or header
        spacing = next(
            (
                tuple(float(value) for value in measures[name].value)
                for name in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
                if measures.get(name) and min(measures[name].value) > 0
            ),
            None,
        )
        slices.append(
            _Slice(
                file,
                frame,
                header,
                _numbers(file, "ImagePositionPatient", position, 3),
                _directions(file, orientation),
                spacing,
                max(10.0 ** -_decimals(str(value)) for value in position) if position else 0.0,
            )
        )
    return slices


def _numbers(file: Path, name: str, values: Sequence | None, count: int) -> np.ndarray | None:
    """As many finite numbers; None where there are no values. Raises DataError for others."""
    if not values:
        return None
    found = np.asarray(values, dtype=float)
    if found.shape != (count,) or not np.isfinite(found).all():
        raise DataError(
            f"{file}: expected {count} numbers as {name}, found {found.tolist()}; correct the header or export the "
            "image again."
        )
    return found


def _directions(file: Path, values: Sequence | None) -> np.ndarray | None:
    """`ImageOrientationPatient` (6,), two unit vectors at right angles (PS3.3 C.7.6.2.1.1); None where it lacks."""
    found = _numbers(file, "ImageOrientationPatient", values, 6)
    if found is None:
        return None
    row, column = found[:3], found[3:]
    off = np.abs([row @ row - 1.0, column @ column - 1.0, row @ column]).max()
    if off > DIRECTION_TOLERANCE:
        raise DataError(
            f"{file}: expected two unit vectors at right angles as ImageOrientationPatient, found {found.tolist()}; "
            "correct the header or export the image again."
        )
    return found


def _decimals(number: str) -> int:
    """Decimal places to which a number is written, at least 0: 2 of "-1.25", 6 of "1.5e-5"."""
    mantissa, _, exponent = number.lower().partition("e")
    return max(0, len(mantissa.partition(".")[2]) - int(exponent or 0))


def _frame_count(header: Dataset) -> int:
    return int(header.get("NumberOfFrames") or 1)


def _orientation(piece: _Slice) -> np.ndarray:
    """Directions (6,) of a row and of a column, LPS; those of an axial slice where the header has none."""
    return np.array((1.0, 0.0, 0.0, 0.0, 1.0, 0.0)) if piece.orientation is None else piece.orientation


def _region_spacing(header: Dataset) -> tuple[float, float] | None:
    """Pixel spacing (row, column) in mm by the calibrated regions of an ultrasound image.

    None unless all two-dimensional regions in centimetres agree.
    """
    found = {
        (round(abs(float(region.PhysicalDeltaY)), 9), round(abs(float(region.PhysicalDeltaX)), 9))
        for region in header.get("SequenceOfUltrasoundRegions") or []
        if region.get("RegionSpatialFormat") == REGION_2D
        and region.get("PhysicalUnitsXDirection") == region.get("PhysicalUnitsYDirection") == UNIT_CM
    }
    if len(found) != 1:
        return None
    row, column = (MM_PER_CM * delta for delta in found.pop())
    return (row, column) if row and column else None


def _check_one_series(path: Path, headers: list[Dataset]) -> None:
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


def _check_kind(file: Path, header: Dataset) -> None:
    modality, frames = header.get("Modality"), _frame_count(header)
    if modality == "SEG":
        raise DataError(f"{file}: expected an image, found a DICOM segmentation; convert it to a NIfTI class map.")
    groups = header.get("PerFrameFunctionalGroupsSequence") or []
    has_positions = len(groups) == frames and all("PlanePositionSequence" in group for group in groups)
    if frames > 1 and not has_positions and modality not in CINE_MODALITIES:
        raise DataError(
            f"{file}: expected a position for each frame of a multi-frame object, found none for its {frames} frames; "
            "convert it to NIfTI or to a classic series."
        )


def _stack(path: Path, slices: list[_Slice], normal: np.ndarray) -> tuple[list[_Slice], np.ndarray]:
    """Slices in the order of their positions along the normal, and the step in mm from one to the next.

    Raises DataError unless they are one regular stack of equal slices.
    """
    for name, what in (
        ("position", "slice positions"),
        ("orientation", "a slice orientation"),
        ("spacing", "a pixel spacing"),
    ):
        lacking = [piece.name for piece in slices if getattr(piece, name) is None]
        if lacking:
            raise DataError(
                f"{path}: expected {what} in each file of the series, found none in {lacking[0]} ({len(lacking)} of "
                f"{len(slices)} slices); if these are separate images, give each file by itself."
            )
    first = slices[0]
    for name, of, tolerance in (
        ("Rows and Columns", lambda piece: (piece.header.Rows, piece.header.Columns), 0),
        ("values per pixel", lambda piece: samples_of(piece.header), 0),
        ("inversion (PhotometricInterpretation)", lambda piece: is_inverted(piece.header), 0),
        ("PixelSpacing", lambda piece: piece.spacing, 1e-4),
        ("ImageOrientationPatient", lambda piece: piece.orientation, 1e-3),
    ):
        expected = np.asarray(of(first), dtype=float)
        for piece in slices:
            found = np.asarray(of(piece), dtype=float)
            if found.shape != expected.shape or np.abs(found - expected).max() > tolerance:
                raise DataError(
                    f"{path}: expected slices of one size and orientation, found {name} {found.tolist()} in "
                    f"{piece.name} but {expected.tolist()} in others; remove scouts and other series."
                )
    order = sorted(slices, key=lambda piece: piece.position @ normal)
    positions = np.array([piece.position for piece in order])
    heights = positions @ normal
    gaps = np.diff(heights)
    usual = float(np.median(gaps[gaps > 1e-3])) if (gaps > 1e-3).any() else 0.0
    for index in np.flatnonzero(gaps <= max(SLICE_GAP_TOLERANCE * usual, 1e-3)):
        raise DataError(
            f"{path}: expected each slice position once, found {order[index].name} and {order[index + 1].name} both at "
            f"{heights[index]:.2f} mm; split the series by time, echo or phase, or remove the copies."
        )
    step = (positions[-1] - positions[0]) / (len(order) - 1)
    strays = positions - positions[0] - step * np.arange(len(order))[:, None]
    # Each end of a distance between two positions is off by half of the last place.
    rounding = min(max(piece.precision for piece in slices), LARGEST_ROUNDING * usual)
    along = np.abs(strays @ normal)
    if along.max() > SLICE_GAP_TOLERANCE * usual + rounding:
        raise _uneven(path, order, gaps, usual, rounding)
    sideways = np.linalg.norm(strays - np.outer(strays @ normal, normal), axis=1).max()
    tilt = np.linalg.norm(step - (step @ normal) * normal)
    allowed = SHEAR_TOLERANCE * usual + rounding / (len(order) - 1)
    if tilt > allowed or sideways > 2 * SLICE_GAP_TOLERANCE * usual + rounding:
        raise DataError(
            f"{path}: expected slices stacked evenly along their normal, found them shifted sideways by {tilt:.2f} mm "
            f"each and up to {sideways:.2f} mm out of line (tilted gantry?); resample the series to a rectangular grid."
        )
    return order, step


def _uneven(path: Path, order: list[_Slice], gaps: np.ndarray, usual: float, rounding: float) -> DataError:
    """The error for single gaps that are whole multiples of the others (slices are missing), or for uneven spacing."""
    index = int(np.argmax(np.abs(gaps - usual)))
    where = f"a gap of {gaps[index]:.2f} mm between {order[index].name} and {order[index + 1].name}"
    odd = np.abs(gaps - usual) > SLICE_GAP_TOLERANCE * usual + rounding
    multiples = np.round(gaps / usual)
    is_multiple = np.abs(gaps - multiples * usual) <= multiples * (SLICE_GAP_TOLERANCE * usual + rounding)
    if is_multiple.all() and not (odd[1:] & odd[:-1]).any():
        missing = round(float(multiples.sum())) - len(gaps)
        lacking = "a slice is missing" if missing == 1 else f"{missing} slices are missing"
        return DataError(
            f"{path}: expected slices {usual:.2f} mm apart, found {where}; {lacking}: get the whole series again."
        )
    return DataError(
        f"{path}: expected slices {usual:.2f} mm apart, found {where} (from {gaps.min():.2f} to {gaps.max():.2f} mm); "
        "the series was taken with several spacings and has no regular grid: resample it to equal spacing (dcm2niix "
        "writes such a volume with _Eq in its name), or give each evenly spaced part by itself."
    )
