"""Images that are Python objects, brought to files that every other part reads, and results brought back.

In: a path, a NumPy array, a torch tensor, or an image of nibabel, SimpleITK or ITK. Out: a file in a folder, and the
way from slices on the file's grid back to an object of the same kind on the same grid.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nibabel.spatialimages import SpatialImage
from PIL import Image

from sam2sgp.data.io import Geometry
from sam2sgp.errors import DataError

# From so many rows and columns on, an array whose last axis has 1, 3 or 4 entries is meant as a 2D image, not as a
# volume, and one whose first axis has 3 or 4 may be.
LEAST_ROWS = 16
KINDS = "a path, a NumPy array, a torch tensor, or an image of nibabel, SimpleITK or ITK"


@dataclass(frozen=True)
class ImageFile:
    """An object as a file.

    path: of the file. restore: from values (Z, H, W) on the grid of a `Geometry` of that file to an object of the same
    kind as the one given; a path's is an array in the order of the file's own axes.
    """

    path: Path
    restore: Callable[[np.ndarray, Geometry], Any]


def as_file(
    image: Any, folder: Path, name: str, spacing: tuple[float, ...] | None = None, is_label: bool = False
) -> ImageFile:
    """Write an image, or a class map, where it is not in a file yet.

    Args:
        image: a path; an array or tensor, (H, W), (H, W, 3) of bytes for colours, or (Z, H, W) with the patient's left
            on the right and his front at the top, as radiologists look at slices; or an image with a place of its own.
        folder: where to write. name: the file's stem.
        spacing: of an array (row, column) or (slice, row, column) in mm. Without it a volume's voxels are cubes.
        is_label: whether it is a class map, which has no colours.

    Raises:
        DataError: another kind of object, shape or type of values, or a spacing that is given twice. An image of 3 or 4
            slices lacks its spacing, so that it may as well be one in colour, with its channels first.
    """
    kind = type(image).__module__.split(".")[0]
    is_array = isinstance(image, np.ndarray | torch.Tensor)
    if spacing is not None and not is_array:
        raise DataError(f"{name}: expected `spacing` only with arrays, which have none; leave it out.")
    if isinstance(image, str | Path):
        return ImageFile(Path(image).expanduser().absolute(), _native)
    if is_array:
        if spacing is None and not is_label:
            _check_slices(image.shape, name)
        return _of_array(image, folder, name, spacing)
    if isinstance(image, SpatialImage):
        path = folder / f"{name}.nii"
        nib.save(nib.Nifti1Image(image.dataobj, image.affine, image.header), path)
        return ImageFile(path, lambda values, geometry: _of_nibabel(image, _native(values, geometry)))
    if kind in ("SimpleITK", "itk"):
        return _of_itk(image, folder, name, kind)
    raise DataError(f"{name}: expected {KINDS}, found {type(image).__name__}.")


def _native(values: np.ndarray, geometry: Geometry) -> np.ndarray:
    return values[0] if geometry.is_picture else geometry.to_native(values)


def _check_slices(shape: tuple[int, ...], name: str) -> None:
    """Raise DataError where slices may be channels, which torch has first."""
    if len(shape) == 3 and shape[0] in (3, 4) and min(shape[1:]) >= LEAST_ROWS:
        raise DataError(
            f"{name}: expected (Z, H, W) with `spacing` or, bytes in colour, (H, W, 3), found {tuple(shape)} without; "
            f"give spacing=(slice, row, column) in mm for a volume of {shape[0]} slices, or move the channels of a "
            "colour image to the end and convert them to uint8 from 0 to 255."
        )


def _of_array(
    image: np.ndarray | torch.Tensor, folder: Path, name: str, spacing: tuple[float, ...] | None
) -> ImageFile:
    array = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else image
    array = array.astype(np.uint8) if array.dtype == bool else array
    is_colour = array.ndim == 3 and array.shape[-1] == 3 and array.dtype == np.uint8
    dimensions = 2 if is_colour else array.ndim
    if dimensions == 3 and array.shape[-1] in (3, 4) and min(array.shape[:2]) >= LEAST_ROWS:
        raise DataError(
            f"{name}: expected colours as bytes of shape (H, W, 3), found {array.dtype} {array.shape}; bring them to "
            "0 to 255, convert to uint8 and leave out a fourth channel."
        )
    if dimensions == 3 and array.shape[-1] == 1 and min(array.shape[:2]) >= LEAST_ROWS:
        raise DataError(f"{name}: expected a 2D image of shape (H, W), found {array.shape}; leave out the last axis.")
    if dimensions not in (2, 3) or not array.size or array.dtype.kind not in "iuf":
        raise DataError(
            f"{name}: expected numbers of shape (H, W), (Z, H, W) or, bytes in colour, (H, W, 3), found "
            f"{array.dtype} {array.shape}."
        )
    if spacing is not None and (len(spacing) != dimensions or not min(spacing) > 0):
        raise DataError(f"{name}: expected {dimensions} sizes above 0 in mm as `spacing`, found {spacing}.")
    if dimensions == 2 and spacing is None and (is_colour or array.dtype == np.uint8):
        path = folder / f"{name}.png"
        Image.fromarray(array).save(path)
        return ImageFile(path, lambda values, _: _like(image, values[0]))
    if is_colour:
        raise DataError(f"{name}: expected colours without `spacing`; leave it out.")
    sizes = (*reversed(spacing or (1.0,) * dimensions), *((1.0,) * (3 - dimensions)))
    # Rows run to the patient's left, columns to his back and slices to his head, as in DICOM: no axis is turned.
    affine = np.diag([-sizes[0], -sizes[1], sizes[2], 1.0])
    path = folder / f"{name}.nii"
    stored = _storable(array)
    nib.save(nib.Nifti1Image(stored.T, affine, dtype=stored.dtype), path)
    return ImageFile(path, lambda values, geometry: _like(image, _native(values, geometry).T))


def _storable(array: np.ndarray) -> np.ndarray:
    """The array in a type that NIfTI has and every reader knows; images end up in single precision in any case."""
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    if array.dtype.itemsize < 8:
        return array
    limits = np.iinfo(np.int32)
    fits = limits.min <= array.min() and array.max() <= limits.max
    return array.astype(np.int32 if fits else np.float32)


def _like(image: np.ndarray | torch.Tensor, values: np.ndarray) -> np.ndarray | torch.Tensor:
    values = np.ascontiguousarray(values)
    return torch.from_numpy(values).to(image.device) if isinstance(image, torch.Tensor) else values


def _of_nibabel(image: SpatialImage, values: np.ndarray) -> nib.Nifti1Image:
    header = image.header.copy() if isinstance(image.header, nib.Nifti1Header) else None
    made = nib.Nifti1Image(values, image.affine, header, dtype=values.dtype)
    made.header.set_slope_inter(1, 0)
    return made


def _of_itk(image: Any, folder: Path, name: str, kind: str) -> ImageFile:
    path = folder / f"{name}.mha"
    if kind == "SimpleITK":
        import SimpleITK

        SimpleITK.WriteImage(image, str(path))
        make = SimpleITK.GetImageFromArray
    else:
        # Who has such an image has the library, which nothing else here needs.
        itk = import_module("itk")
        itk.imwrite(image, str(path))
        make = itk.image_from_array

    def restore(values: np.ndarray, geometry: Geometry) -> Any:
        made = make(np.ascontiguousarray(_native(values, geometry).T))
        made.CopyInformation(image)
        return made

    return ImageFile(path, restore)
