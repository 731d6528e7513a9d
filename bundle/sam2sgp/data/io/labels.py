"""Reading class maps on their image's grid, and writing class maps and maps of real values on it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.openers import Opener
from nibabel.volumeutils import array_to_file
from PIL import Image
from scipy.ndimage import maximum_filter, minimum_filter

from sam2sgp.data.io import dicom_segmentation, itk
from sam2sgp.data.io.formats import (
    DICOM_SUFFIXES,
    NRRD_SUFFIXES,
    PICTURE_SUFFIXES,
    is_dicom_seg,
    map_suffix,
    output_suffix,
    suffix_of,
)
from sam2sgp.data.io.geometry import Geometry, Grid, geometry_of, rounded
from sam2sgp.data.io.images import read_grid
from sam2sgp.data.io.limits import SMALL_ENOUGH
from sam2sgp.data.io.nifti import result_header
from sam2sgp.errors import DataError
from sam2sgp.files import replacing

# Corners of image and label may differ by this part of a voxel: headers hold rounded numbers.
GRID_TOLERANCE = 1e-2
# A label may take this many bytes of memory for each voxel of its image: colours of 32 bits, all alike.
LABEL_BYTES = 16
# Real values that are off a whole number by more are no class values.
NOT_WHOLE = 1e-3
# Results have 16 bits.
LARGEST_CLASS = 65535
# A picture of this many values that reaches 255 is a resized (blurred) mask, not a class map with an ignore label.
BLURRED_MASK_VALUES = 32
# So is one of fewer values that reaches this one and has two neighbouring values above classes' usual ones: of a mask
# that was stored as JPEG before, white became 250 to 255.
NEARLY_WHITE, USUAL_CLASSES = 240, 32
# And so is one of which the values between black and white, two or more, lie along the border of the two: of so many of
# their pixels, both are at most two pixels away.
LEAST_GREYS, BORDER_SHARE = 2, 0.9


def read_label(path: str | os.PathLike, geometry: Geometry | None = None, slice_axis: str | int = "auto") -> np.ndarray:
    """Read a class map in its image's display orientation.

    Args:
        path: a label file of any format that `read_image` reads.
        geometry: of the image. The label may have its axes in another order or direction, as long as its voxels are
            the image's by the qform or the sform of either; for pictures only the size as displayed counts. A
            `.seg.nrrd` may be cropped. Without `geometry` the label's own is taken.
        slice_axis: as for `read_image`; used only without `geometry`.

    Returns:
        (Z, H, W) uint8, or uint16 where a value is beyond 255: a long volume has gigabytes of voxels. 0 is background.
        A picture of only 0 and its highest value (255, or 65535 of 16 bits) is read as 0 and 1, a palette picture as
        its indices, one in black and white as white.

    Raises:
        DataError: the file can't be read, doesn't lie on the image's grid, or holds something else than class values.
    """
    # A label is as large as its image, or wrong.
    limit = None if geometry is None else max(SMALL_ENOUGH, int(np.prod(geometry.shape)) * LABEL_BYTES)
    grid = read_grid(path, label=True, limit=limit)
    if grid.array.shape[3] != 1:
        raise DataError(
            f"{path}: expected a class map with one value per voxel, found {grid.array.shape[3]} channels; store the "
            "label as a single map of class values."
        )
    values = _class_values(path, grid)
    if geometry is None:
        return geometry_of(grid, slice_axis).display(values)
    if grid.is_picture:
        return _align_picture(path, geometry_of(grid, slice_axis).display(values), geometry)
    return geometry.display(_align(path, values, grid, geometry))


def is_binary_255(path: str | os.PathLike) -> bool:
    """Whether a label is an 8-bit picture of only 0 and 255, so that outputs can be coded alike.

    Raises DataError if the file can't be read.
    """
    if suffix_of(path) not in PICTURE_SUFFIXES:
        return False
    grid = read_grid(path, label=True)
    return grid.is_8_bit and bool(np.isin(grid.array, (0, 255)).all() and (grid.array == 255).any())


def segment_names(path: str | os.PathLike) -> dict[int, str]:
    """What a segmentation of 3D Slicer (NRRD) or of DICOM calls its class values; {} for other files.

    Raises DataError as `read_label`.
    """
    path, suffix = Path(path), suffix_of(path)
    if suffix in NRRD_SUFFIXES:
        return itk.segment_names(path)
    is_seg = (not suffix or suffix in DICOM_SUFFIXES) and is_dicom_seg(path)
    return dicom_segmentation.segment_names(path) if is_seg else {}


def may_be_turned(path: str | os.PathLike, geometry: Geometry) -> bool:
    """Whether a picture's label may be drawn on the picture as stored, and not as an EXIF tag turns it for display.

    That is so where turning leaves the size and the label has no such tag itself. Raises DataError as `read_label`.
    """
    stays = (2, 0, 1), (False, False, False)
    if not geometry.is_picture or (geometry.axes, geometry.flips) == stays:
        return False
    if geometry.shape[1:] != geometry.native_shape or suffix_of(path) not in PICTURE_SUFFIXES:
        return False
    own = geometry_of(read_grid(path, label=True), "auto")
    return (own.axes, own.flips) == stays


def softened_border(labels: np.ndarray) -> int | None:
    """The value of a picture's label (1, H, W) that is only found along the border of 255 and 0; None if there is none.

    It may be a class, or the border of a mask that was smoothed or reduced.
    """
    found = np.unique(labels)
    if len(labels) > 1 or len(found) != 3:
        return None
    return int(found[1]) if _is_antialiased(labels[0], found, least=1) else None


def write_label(path: str | os.PathLike, labels: np.ndarray, geometry: Geometry, binary_255: bool = False) -> None:
    """Write a class map on the grid of the image that `geometry` comes from; whole or not at all.

    Args:
        path: ends in `output_suffix(geometry)`. Its folder is made if missing.
        labels: (Z, H, W) integers, 0..65535. Stored as 8 bits if they fit, else as 16.
        geometry: the image's. A volume keeps its shape and place, of NIfTI both forms with their codes; a picture is
            written as it is displayed.
        binary_255: for pictures: store class 1 as 255.

    Raises:
        DataError: the shape is not the image's, a value doesn't fit, or the file can't be written.
    """
    path = Path(path)
    if labels.shape != geometry.shape:
        raise DataError(f"{path}: expected a class map of shape {geometry.shape}, found {labels.shape}.")
    if labels.dtype.kind not in "iub":
        raise DataError(f"{path}: expected integer class values, found {labels.dtype}.")
    if not str(path).lower().endswith(output_suffix(geometry)):
        raise DataError(f"{path}: expected a file name that ends in {output_suffix(geometry)}.")
    lowest, highest = int(labels.min()), int(labels.max())
    limit = 1 if binary_255 and geometry.is_picture else LARGEST_CLASS
    if lowest < 0 or highest > limit:
        raise DataError(f"{path}: expected class values 0..{limit}, found {lowest}..{highest}.")
    kind = np.uint8 if highest <= 255 else np.uint16
    with writing(path, "a label") as part:
        if geometry.is_picture:
            Image.fromarray(labels[0].astype(kind) * (255 if binary_255 else 1)).save(part, format="PNG")
            return
        header = result_header(geometry)
        image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
        image = image_class(geometry.to_native(labels.astype(kind)), None, header, dtype=kind)
        # nibabel leaves out the sign of voxel sizes.
        image.header["pixdim"][1:4] = header["pixdim"][1:4]
        nib.save(image, part)


def write_map(path: str | os.PathLike, values: np.ndarray, geometry: Geometry) -> None:
    """Write a map of real values on the grid of the image that `geometry` comes from, as float32; whole or not at all.

    Args:
        path: ends in `map_suffix(geometry)`. Its folder is made if missing.
        values: (Z, H, W) or, for several channels, (Z, C, H, W), of a floating-point type. Converted piece by piece, so
            that a large float16 map never exists as float32.
        geometry: the image's. A volume is written as NIfTI with its shape (X, Y, Z) or (X, Y, Z, C) and its affine; a
            picture as a TIFF with one page a channel.

    Raises:
        DataError: the shape is not the image's, or the file can't be written.
    """
    path = Path(path)
    if values.ndim not in (3, 4) or (values.shape[0], *values.shape[-2:]) != geometry.shape:
        raise DataError(f"{path}: expected a map of slices of shape {geometry.shape}, found {values.shape}.")
    if not str(path).lower().endswith(map_suffix(geometry)):
        raise DataError(f"{path}: expected a file name that ends in {map_suffix(geometry)}.")
    channels = [values] if values.ndim == 3 else list(values.swapaxes(0, 1))
    with writing(path, "a map") as part:
        if geometry.is_picture:
            pages = [Image.fromarray(channel[0].astype(np.float32)) for channel in channels]
            pages[0].save(part, format="TIFF", save_all=True, append_images=pages[1:], compression="tiff_deflate")
            return
        header = result_header(geometry)
        header.set_data_dtype(np.float32)
        header.set_data_shape(geometry.native_shape if values.ndim == 3 else (*geometry.full_shape, len(channels)))
        with Opener(part, "wb") as file:
            header.write_to(file)
            for channel in channels:
                array_to_file(geometry.to_native(channel), file, np.float32, offset=None)


@contextmanager
def writing(path: str | os.PathLike, what: str) -> Iterator[Path]:
    """`sam2sgp.files.replacing` for a result, `what` ("a label"); raises DataError where it can't be written."""
    try:
        with replacing(Path(path)) as part:
            yield part
    except OSError as error:
        raise DataError(
            f"{path}: expected to write {what} there, found {error.strerror or error}; free some space or choose "
            "another folder."
        ) from error


def _class_values(path: str | os.PathLike, grid: Grid) -> np.ndarray:
    """(n0, n1, n2) class values of a label's grid, as uint8 or uint16."""
    values = grid.array[..., 0]
    is_real = values.dtype.kind == "f"
    if is_real:
        _check_whole(path, values)
    # Before they are converted, in which values beyond 64 bits would become others.
    lowest, highest = values.min(), values.max()
    if is_real:
        lowest, highest = np.round(lowest), np.round(highest)
    for bound in (lowest, highest):
        if not 0 <= bound <= LARGEST_CLASS:
            raise DataError(
                f"{path}: expected class values from 0 (background) up to {LARGEST_CLASS}, found {bound:g}; renumber "
                "them."
            )
    kind = np.uint8 if highest <= 255 else np.uint16
    values = _rounded(values, kind) if is_real else values.astype(kind)
    if grid.is_picture and highest == 65535 and np.isin(values, (0, 65535)).all():
        return (values == 65535).astype(np.uint8)
    if grid.is_8_bit:
        found = np.unique(values)
        if np.isin(found, (0, 255)).all():
            return values // 255
        if grid.is_jpeg:
            raise DataError(
                f"{path}: expected a class map, found a JPEG of {len(found)} values; lossy compression blurs class "
                "values: threshold the mask and store it as PNG."
            )
        high = found[found > USUAL_CLASSES]
        has_neighbours = found[-1] >= NEARLY_WHITE and (np.diff(high) == 1).any()
        has_many = found[-1] == 255 and len(found) >= BLURRED_MASK_VALUES
        if has_neighbours or has_many or _is_antialiased(values[..., 0], found):
            raise DataError(
                f"{path}: expected a class map, found {len(found)} values from {found[0]} to {found[-1]}; this looks "
                "like a mask that was blurred, resized, stored as JPEG before, or a photograph: threshold it and store "
                "whole class values. If these are classes, store them with 16 bits."
            )
    return values


def _is_antialiased(values: np.ndarray, found: np.ndarray, least: int = LEAST_GREYS) -> bool:
    """Whether a picture (rows, columns) of some values is a mask with a softened border, such as a reduced one.

    Classes of their own have pixels around which there is nothing else.
    """
    grey = (values > 0) & (values < 255)
    if found[0] != 0 or found[-1] != 255 or len(found) - 2 < least:
        return False
    lowest, highest = minimum_filter(values, 3), maximum_filter(values, 3)
    if (lowest == highest)[grey].any() or not (lowest == 255).any():
        return False
    is_border = (minimum_filter(values, 5) == 0) & (maximum_filter(values, 5) == 255)
    return bool(is_border[grey].mean() >= BORDER_SHARE)


def _check_whole(path: str | os.PathLike, values: np.ndarray) -> None:
    """Raise DataError for real values (n0, n1, n2) that aren't whole."""
    for slab in _slabs(values):
        if not np.isfinite(slab).all() or (np.abs(slab - np.round(slab)) > NOT_WHOLE).any():
            break
    else:
        return
    finite = np.isfinite(values)
    whole = np.where(finite, values, 0)
    example = values[~finite | (np.abs(whole - np.round(whole)) > NOT_WHOLE)].flat[0]
    raise DataError(
        f"{path}: expected whole class values, found {example:g}; a probability map or a lossy mask isn't a class map: "
        "threshold it and store whole numbers."
    )


def _rounded(values: np.ndarray, kind: type) -> np.ndarray:
    """Real values, rounded, as an integer type that holds them."""
    made: np.ndarray = np.empty_like(values, kind, subok=False)
    for part, slab in zip(_slabs(made), _slabs(values), strict=True):
        part[...] = np.round(slab)
    return made


def _slabs(values: np.ndarray) -> np.ndarray:
    """A view of (n0, n1, n2) along the axis that comes last in memory: of a long volume, what is made of all values at
    a time is gigabytes."""
    axis = max(range(values.ndim), key=lambda axis: abs(values.strides[axis]) if values.shape[axis] > 1 else 0)
    return np.moveaxis(values, axis, 0)


def _align_picture(path: str | os.PathLike, shown: np.ndarray, geometry: Geometry) -> np.ndarray:
    """A picture's class map as displayed (1, H, W) on its image's slices, which it must be as large as.

    Raises DataError for another size, and for a volume's slice that is displayed otherwise than it is stored.
    """
    if not geometry.is_picture and (geometry.axes != (2, 1, 0) or any(geometry.flips) or geometry.shape[0] > 1):
        raise DataError(
            f"{path}: expected a label with the affine of its volume, found a picture; store the label as NIfTI."
        )
    if shown.shape != geometry.shape:
        hint = ""
        if geometry.is_picture and shown.shape[1:] == geometry.native_shape:
            hint = " before its EXIF tag turns it for display: draw the label on the picture as displayed"
        expected, found = ("x".join(str(length) for length in sizes[1:]) for sizes in (geometry.shape, shown.shape))
        raise DataError(
            f"{path}: expected a label of its image's size {expected} (rows x columns), found {found}"
            + (f", the image's size{hint}." if hint else "; check that it belongs to this image, or resample it.")
        )
    return shown


def _align(path: str | os.PathLike, values: np.ndarray, grid: Grid, geometry: Geometry) -> np.ndarray:
    """A volume label's values (n0, n1, n2) on the image's own grid, found by permuting and flipping axes.

    Programs place the voxels of one NIfTI file differently where its two forms differ, so a label lies on its image if
    any of its affines agrees with any of the image's. Where several do, voxels in the same order are the same.

    Raises DataError if no order of axes lays the label's voxels on the image's.
    """
    shape = geometry.full_shape
    if geometry.is_picture:
        # Both ITK and MONAI store a picture's columns as the first axis of a volume, whatever affine they give it.
        values = values.transpose(1, 0, 2)
        if values.shape != shape:
            raise _wrong_size(path, geometry, values.shape)
        return values
    pairs = list(product((grid.affine, *grid.affines), (geometry.affine, *geometry.affines)))
    if grid.may_be_cropped and values.shape != shape:
        return _laid_in_place(path, values, pairs, geometry)
    found = [_closest_order(values.shape, label, shape, image) for label, image in pairs]
    fits = [fit for fit in found if fit is not None]
    if not fits:
        raise _wrong_size(path, geometry, grid.native_shape)
    close = [fit for fit in fits if fit[2] <= GRID_TOLERANCE]
    if not close:
        raise DataError(
            f"{path}: expected the label on its image's grid, found corners up to {fits[0][2]:.2f} voxels away (affine "
            f"of the label {rounded(grid.affine)}, of the image {rounded(geometry.affine)}); check that it belongs to "
            "this image, or resample it to the image."
        )
    order, flips, _ = next((fit for fit in close if fit[0] == (0, 1, 2) and not any(fit[1])), close[0])
    return np.flip(values.transpose(order), [axis for axis in range(3) if flips[axis]])


def _closest_order(
    found: tuple[int, ...], label_affine: np.ndarray, shape: tuple[int, ...], image_affine: np.ndarray
) -> tuple[tuple[int, ...], tuple[bool, ...], float] | None:
    """Order and flips of a label's axes that bring its corners closest to the image's, and how far they are, in voxels.

    None if its lengths are not the image's in any order.
    """
    # In image voxels: where do the label's corners lie?
    to_voxel = np.linalg.inv(image_affine) @ label_affine
    corners = np.array(list(product(*((0, length - 1) for length in shape))), dtype=float)
    best = None
    for order in permutations(range(3)):
        if tuple(found[axis] for axis in order) != shape:
            continue
        for flips in product((False, True), repeat=3):
            index = np.empty_like(corners)
            index[:, order] = np.where(flips, np.array(shape) - 1 - corners, corners)
            offset = float(np.abs(index @ to_voxel[:3, :3].T + to_voxel[:3, 3] - corners).max())
            if best is None or offset < best[2]:
                best = order, flips, offset
    return best


def _laid_in_place(
    path: str | os.PathLike, values: np.ndarray, pairs: list[tuple[np.ndarray, np.ndarray]], geometry: Geometry
) -> np.ndarray:
    """A cropped segmentation on its image's whole grid.

    Raises DataError if its voxels aren't the image's, or some of a class lie outside.
    """
    shape = np.array(geometry.full_shape)
    corners = np.array(list(product(*((0, length - 1) for length in values.shape))), dtype=float)
    for label_affine, image_affine in pairs:
        to_voxel = np.linalg.inv(image_affine) @ label_affine
        axes = np.abs(to_voxel[:3, :3]).argmax(axis=0)
        if sorted(axes) != [0, 1, 2]:
            continue
        # (image axis, label axis), -1 or 1 where one runs along the other.
        turn = np.zeros((3, 3))
        turn[axes, range(3)] = np.sign(to_voxel[axes, range(3)])
        places = corners @ to_voxel[:3, :3].T + to_voxel[:3, 3]
        start = np.round(places.min(axis=0)).astype(int)
        turned = corners @ turn.T
        if np.abs(places - (turned - turned.min(axis=0) + start)).max() > GRID_TOLERANCE:
            continue
        order = np.argsort(axes)
        flips = [axis for axis in range(3) if turn[axis, order[axis]] < 0]
        laid = np.flip(values.transpose(order), flips)
        inside = tuple(slice(max(0, -first), max(0, last)) for first, last in zip(start, shape - start, strict=True))
        kept = laid[inside]
        if np.count_nonzero(kept) < np.count_nonzero(laid):
            raise DataError(
                f"{path}: expected the segments within their image, found voxels of them outside; check that it "
                "belongs to this image, or crop it."
            )
        whole = np.zeros(tuple(shape), values.dtype)
        first = np.maximum(start, 0)
        whole[tuple(slice(low, low + length) for low, length in zip(first, kept.shape, strict=True))] = kept
        return whole
    raise DataError(
        f"{path}: expected the segments on the voxels of their image ({'x'.join(map(str, shape))}), found a part of "
        f"{'x'.join(map(str, values.shape))} voxels that lie between them or are turned; export the segmentation with "
        "the image as its reference volume."
    )


def _wrong_size(path: str | os.PathLike, geometry: Geometry, found: tuple[int, ...]) -> DataError:
    expected, got = ("x".join(str(length) for length in shape) for shape in (geometry.full_shape, found))
    return DataError(
        f"{path}: expected a label of its image's size {expected}, found {got}; check that it belongs to this image, "
        "or resample it."
    )
