"""Reading NRRD and MetaImage files."""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sam2sgp.data.io import metaimage, nrrd
from sam2sgp.data.io.geometry import Grid, check_one_volume, with_channels
from sam2sgp.data.io.raw import RawHeader
from sam2sgp.errors import DataError

SEGMENT_VALUE = re.compile(r"Segment(\d+)_LabelValue")


class _Segment(NamedTuple):
    """A segment of a file that 3D Slicer wrote: where it is stored, and what it is called."""

    layer: int
    value: int
    name: str


def raw_header(path: Path, detached: bool = False) -> RawHeader:
    """Of an NRRD or MetaImage file, by its suffix; see `sam2sgp.data.io.raw`."""
    kind = metaimage if path.suffix.lower() in (".mha", ".mhd") else nrrd
    return kind.read_header(path, detached)


def read_itk(path: Path, label: bool = False, limit: int | None = None) -> Grid:
    """An NRRD or MetaImage file's volume or colours; as a label, a Slicer segmentation of any number of layers.

    Raises DataError for several volumes or components in one file, and for complex numbers.
    """
    header = raw_header(path, detached=True)
    if header.is_complex:
        raise DataError(f"{path}: expected real intensities, found complex numbers; export magnitudes.")
    segments = _segments(path, header.fields) if label else []
    check_one_volume(path, header.shape[3:])
    is_rgb = header.dtype == np.uint8 and header.channels in (3, 4) and not segments
    if header.channels and not is_rgb and not segments:
        check_one_volume(path, (header.channels,))
    array = header.read(label, limit)
    if is_rgb:
        array = array[..., :3]
    spatial = array.shape[: min(len(header.shape), 3)]
    array = with_channels(array, spatial)
    return Grid(
        _one_map(path, array, segments) if segments else array,
        spatial,
        np.diag([-1.0, -1.0, 1.0, 1.0]) @ header.affine,
        is_rgb=is_rgb,
        has_spacing=header.has_spacing,
        may_be_cropped=bool(segments) or path.name.lower().endswith(".seg.nrrd"),
    )


def segment_names(path: Path) -> dict[int, str]:
    """Names of the segments of an NRRD file that 3D Slicer wrote, by the class values that they have in its class map;
    {} for other files."""
    header = raw_header(path, detached=True)
    segments = _segments(path, header.fields)
    is_layered = (header.channels or 1) > 1
    values = _class_values(segments) if is_layered else [segment.value for segment in segments]
    return {value: segment.name for value, segment in zip(values, segments, strict=True) if segment.name}


def _segments(path: Path, fields: dict[str, str]) -> list[_Segment]:
    """The segments of a file that 3D Slicer wrote; [] for other files."""
    numbers = sorted(int(found[1]) for key in fields if (found := SEGMENT_VALUE.fullmatch(key)))
    try:
        return [
            _Segment(
                int(fields.get(f"Segment{number}_Layer", 0)),
                int(fields[f"Segment{number}_LabelValue"]),
                fields.get(f"Segment{number}_Name", ""),
            )
            for number in numbers
        ]
    except ValueError as error:
        raise DataError(
            f"{path}: expected whole numbers for the layers and label values of segments, found others ({error}); save "
            "the segmentation again."
        ) from error


def _class_values(segments: list[_Segment]) -> list[int]:
    """Of segments in layers: their values where these differ, else their numbers, counted from 1."""
    values = [segment.value for segment in segments]
    return values if len(set(values)) == len(values) else list(range(1, len(values) + 1))


def _one_map(path: Path, layers: np.ndarray, segments: list[_Segment]) -> np.ndarray:
    """Layers (n0, n1, n2, L) of a segmentation as one class map (n0, n1, n2, 1), see `_class_values`.

    Raises DataError where segments overlap.
    """
    if layers.shape[3] == 1:
        return layers
    values = _class_values(segments)
    is_own = values == [segment.value for segment in segments]
    kind = layers.dtype if is_own else np.min_scalar_type(len(segments))
    classes = np.zeros((*layers.shape[:3], 1), kind)
    for segment, value in zip(segments, values, strict=True):
        mask = layers[..., segment.layer, None] == segment.value
        if (classes[mask] > 0).any():
            raise DataError(
                f"{path}: expected one class per voxel, found segments that overlap; correct the segmentation, or "
                "export each segment by itself."
            )
        # A value beyond what layers hold is nowhere.
        if mask.any():
            classes[mask] = value
    return classes
