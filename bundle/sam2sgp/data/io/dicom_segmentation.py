"""Reading a DICOM Segmentation object (SEG) as a class map that lies where its frames do.

Frames without a voxel may lack, so the map covers the slices between the first and the last frame, and is laid on its
image like any cropped segmentation.
"""

import re
import sys
from pathlib import Path

import numpy as np
from pydicom import Dataset

from sam2sgp.data.io.dicom_pixels import frame_item, read_dataset
from sam2sgp.data.io.geometry import Grid
from sam2sgp.data.io.limits import check_memory
from sam2sgp.errors import DataError

# How this package names the class value of a segment, whose numbers have no gaps.
CLASS_VALUE_FOUND = re.compile(r"class ([1-9][0-9]{0,4})")
# Positions of frames are multiples of the distance between slices, but for rounding.
PLACE_TOLERANCE = 5e-2


def read_segmentation(file: Path, limit: int | None = None) -> Grid:
    """The class map of a segmentation's frames: class values where segments say theirs, else segment numbers.

    Raises DataError where segments overlap, frames don't lie on one grid, or it takes more than `limit` bytes.
    """
    # Segments of one bit each take a small part of what they would as an image.
    dataset = read_dataset(file, limit=sys.maxsize)
    frames = int(dataset.get("NumberOfFrames") or 1)
    pixels = dataset.pixel_array.reshape(frames, dataset.Rows, dataset.Columns)
    # Of fractional segments, voxels of at least half the highest value count.
    threshold = float(dataset.get("MaximumFractionalValue") or 1.0) / 2
    orientation, spacing, positions, numbers = _places(file, dataset, frames)
    normal = np.cross(orientation[:3], orientation[3:])
    heights = positions @ normal
    gaps = np.diff(np.unique(heights.round(4)))
    measures = frame_item(dataset, 0, "PixelMeasuresSequence")
    thickness = float(measures.get("SpacingBetweenSlices") or measures.get("SliceThickness") or 1.0)
    # Slices without a frame make gaps wider, if not all of them.
    multiples = gaps / thickness
    is_whole = np.abs(multiples - multiples.round()).max(initial=0.0) <= PLACE_TOLERANCE
    step = thickness if is_whole else float(gaps.min())
    places = (heights - heights.min()) / step
    aside = positions - positions[heights.argmin()] - np.outer(heights - heights.min(), normal)
    if np.abs(places - places.round()).max() > PLACE_TOLERANCE or np.abs(aside).max() > PLACE_TOLERANCE * step:
        raise DataError(
            f"{file}: expected frames at multiples of one distance, found them unevenly spaced; export the "
            "segmentation as NIfTI or NRRD."
        )
    values = {int(segment.SegmentNumber): _class_value(segment) for segment in dataset.SegmentSequence}
    check_memory(file, (int(places.round().max()) + 1, dataset.Rows, dataset.Columns), limit=limit)
    kind = np.min_scalar_type(max(values.values(), default=0))
    classes = np.zeros((int(places.round().max()) + 1, dataset.Rows, dataset.Columns), kind)
    for frame, (place, number) in enumerate(zip(places.round().astype(int), numbers, strict=True)):
        mask = pixels[frame] >= threshold
        if (classes[place][mask] > 0).any():
            raise DataError(f"{file}: expected one class per voxel, found segments that overlap; correct the label.")
        classes[place][mask] = values[number]
    affine = np.eye(4)
    affine[:3, 0] = orientation[:3] * spacing[1]
    affine[:3, 1] = orientation[3:] * spacing[0]
    affine[:3, 2] = normal * step
    affine[:3, 3] = positions[heights.argmin()]
    array = classes.transpose(2, 1, 0)[..., None]
    return Grid(array, array.shape[:3], np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine, may_be_cropped=True)


def segment_names(file: Path) -> dict[int, str]:
    """Names of the segments by the class values that they have in its class map."""
    segments = read_dataset(file, pixels=False, limit=sys.maxsize).get("SegmentSequence") or []
    return {_class_value(segment): str(segment.get("SegmentLabel") or "") for segment in segments}


def _places(file: Path, dataset: Dataset, frames: int) -> tuple[np.ndarray, list[float], np.ndarray, list[int]]:
    """Orientation (6,) and pixel spacing (row, column) of all frames; position (frames, 3) and segment of each."""
    try:
        orientations = [
            np.asarray(frame_item(dataset, frame, "PlaneOrientationSequence").ImageOrientationPatient, dtype=float)
            for frame in range(frames)
        ]
        positions = np.array(
            [frame_item(dataset, frame, "PlanePositionSequence").ImagePositionPatient for frame in range(frames)],
            dtype=float,
        )
        numbers = [
            int(frame_item(dataset, frame, "SegmentIdentificationSequence").ReferencedSegmentNumber)
            for frame in range(frames)
        ]
        spacing = [float(value) for value in frame_item(dataset, 0, "PixelMeasuresSequence").PixelSpacing]
    except AttributeError as error:
        raise DataError(
            f"{file}: expected a DICOM segmentation whose frames have a place in space, found that they lack it "
            f"({error}); export it as NIfTI or NRRD."
        ) from error
    if max(np.abs(orientation - orientations[0]).max() for orientation in orientations) > 1e-3:
        raise DataError(f"{file}: expected frames of one orientation, found several; export it as NIfTI or NRRD.")
    return orientations[0], spacing, positions, numbers


def _class_value(segment: Dataset) -> int:
    found = CLASS_VALUE_FOUND.fullmatch(str(segment.get("SegmentDescription") or ""))
    return int(found[1]) if found else int(segment.SegmentNumber)
