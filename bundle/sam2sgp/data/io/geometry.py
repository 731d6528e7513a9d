"""The way between a file's own grid and slices in display orientation.

Voxels are only permuted and flipped, never resampled.
"""

from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import io_orientation

from sam2sgp.errors import ConfigError, DataError

# An axis this much coarser than the other two is the one that was scanned in slices.
THICK_AXIS_RATIO = 1.5
# By the axis along which slices are taken.
PLANES = ("sagittal", "coronal", "axial")


@dataclass(frozen=True, eq=False)
class Geometry:
    """The way between a file's own grid and slices in display orientation.

    Attributes:
        native_shape: of the file's grid without channels: (X, Y, Z), (X, Y) or, for pictures, (rows, columns) as
            stored, which are not those displayed where an EXIF tag says that the camera was turned.
        affine: (4, 4) float64, voxel -> world in mm, RAS+ as in nibabel; identity for pictures.
        is_picture: a PNG, JPEG, TIFF or BMP.
        axes: the native axis that runs along (slice, row, column); axis 2 of a 2D grid has length 1.
        flips: whether (slice, row, column) run against that native axis.
        slice_axis: canonical axis along which slices are taken: 0 left, 1 posterior, 2 superior.
        has_spacing: whether the file says how large its voxels are; if not, the affine counts in voxels.
        affines: other affines by which programs place the same voxels, such as the second form of a NIfTI header.
        nifti: the header of a NIfTI file, which results take over; None for other formats.
    """

    native_shape: tuple[int, ...]
    affine: np.ndarray
    is_picture: bool
    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    slice_axis: int
    has_spacing: bool = True
    affines: tuple[np.ndarray, ...] = ()
    nifti: nib.Nifti1Header | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(Z, H, W) in display orientation."""
        full = self.full_shape
        slices, rows, columns = (full[axis] for axis in self.axes)
        return slices, rows, columns

    @property
    def spacing(self) -> tuple[float, float, float] | None:
        """(slice, row, column) in mm to six digits; None where it is unknown, as for pictures.

        Headers hold affines in single precision. What that leaves of a voxel's size differs between an upright and an
        oblique volume, and would decide whether a region of interest begins one pixel earlier.
        """
        if self.is_picture or not self.has_spacing:
            return None
        sizes = np.linalg.norm(self.affine[:3, :3], axis=0)
        between, row, column = (float(f"{sizes[axis]:.6g}") for axis in self.axes)
        return between, row, column

    @property
    def full_shape(self) -> tuple[int, ...]:
        return self.native_shape + (1,) * (3 - len(self.native_shape))

    def from_native(self, array: np.ndarray) -> np.ndarray:
        """An array of `native_shape`, any dtype, as slices (Z, H, W). Raises ValueError for another shape."""
        if array.shape != self.native_shape:
            raise ValueError(f"expected an array of shape {self.native_shape}, found {array.shape}")
        return self.display(array.reshape(self.full_shape))

    def to_native(self, labels: np.ndarray) -> np.ndarray:
        """Slices (Z, H, W), any dtype, as an array of `native_shape`: the exact inverse of `from_native`.

        Raises ValueError for another shape.
        """
        if labels.shape != self.shape:
            raise ValueError(f"expected slices of shape {self.shape}, found {labels.shape}")
        flipped = np.flip(labels, [axis for axis in range(3) if self.flips[axis]])
        return np.ascontiguousarray(flipped.transpose(np.argsort(self.axes))).reshape(self.native_shape)

    def display(self, array: np.ndarray) -> np.ndarray:
        """(n0, n1, n2, ...) -> (Z, H, W, ...)."""
        turned = array.transpose(*self.axes, *range(3, array.ndim))
        return np.ascontiguousarray(np.flip(turned, [axis for axis in range(3) if self.flips[axis]]))


@dataclass
class Grid:
    """A file's content: array (n0, n1, n2, C) on its own grid, of which `native_shape` leaves out added axes."""

    array: np.ndarray
    native_shape: tuple[int, ...]
    affine: np.ndarray
    is_picture: bool = False
    is_rgb: bool = False
    modality: str | None = None
    # Of the values, as a DICOM header says (PET): "BQML", "GML".
    units: str | None = None
    # As in `Geometry`.
    has_spacing: bool = True
    affines: tuple[np.ndarray, ...] = ()
    nifti: nib.Nifti1Header | None = None
    # Only for labels: a segmentation that may be stored as the part of its image's grid that holds it.
    may_be_cropped: bool = False
    # Only for pictures: 8 bits deep, stored as JPEG, the native axis that runs along (row, column) as displayed, and
    # whether (row, column) run against it.
    is_8_bit: bool = False
    is_jpeg: bool = False
    axes: tuple[int, int] = (0, 1)
    flips: tuple[bool, bool] = (False, False)
    # Sentences on what may be wrong with it.
    warnings: list[str] = field(default_factory=list)


def geometry_of(grid: Grid, slice_axis: str | int) -> Geometry:
    if slice_axis not in ("auto", 0, 1, 2):
        raise ConfigError(f"slice_axis: expected 'auto', 0, 1 or 2, found {slice_axis!r}.")
    if grid.is_picture:
        return Geometry(grid.native_shape, grid.affine, True, (2, *grid.axes), (False, *grid.flips), 2, False)
    orientation = io_orientation(np.diag([-1.0, -1.0, 1.0, 1.0]) @ grid.affine)
    native = np.argsort(orientation[:, 0])
    against = orientation[native, 1] < 0
    sizes = np.linalg.norm(grid.affine[:3, :3], axis=0)[native]
    flat = [axis for axis in range(3) if grid.array.shape[native[axis]] == 1]
    if len(flat) == 1:
        chosen = flat[0]
    elif slice_axis != "auto":
        chosen = int(slice_axis)
    else:
        thickest = int(np.argmax(sizes))
        others = np.delete(sizes, thickest)
        chosen = thickest if sizes[thickest] >= THICK_AXIS_RATIO * np.median(others) else 2
    # Canonical axes (0 left, 1 posterior, 2 superior) of (slice, row, column); rows of upright views run downwards.
    canonical, downwards = {0: ((0, 2, 1), True), 1: ((1, 2, 0), True), 2: ((2, 1, 0), False)}[chosen]
    slices, rows, columns = (int(native[axis]) for axis in canonical)
    # Whether they run against their canonical directions.
    turned = [bool(against[axis]) for axis in canonical]
    return Geometry(
        grid.native_shape,
        grid.affine,
        False,
        (slices, rows, columns),
        (turned[0], turned[1] != downwards, turned[2]),
        chosen,
        has_spacing=grid.has_spacing,
        affines=grid.affines,
        nifti=grid.nifti,
    )


def with_channels(array: np.ndarray, spatial: tuple[int, ...]) -> np.ndarray:
    """(n0, n1[, n2][, ...]) -> (n0, n1, n2, C)."""
    channels = int(np.prod(array.shape[len(spatial) :], dtype=int))
    return array.reshape(*spatial, *(1,) * (3 - len(spatial)), channels)


def check_one_volume(path: Path, more: tuple[int, ...]) -> None:
    """Raise DataError where axes beyond the third are longer than 1."""
    if any(length > 1 for length in more):
        counted = " x ".join(str(length) for length in more if length > 1)
        raise DataError(
            f"{path}: expected one volume, found {counted} along further axes, which may be time points or channels; "
            "store the one to segment as a file of its own (for example by nibabel's four_to_three or FSL's fslsplit), "
            "for queries and support alike."
        )


def rounded(affine: np.ndarray) -> list:
    return np.round(affine[:3], 3).tolist()
