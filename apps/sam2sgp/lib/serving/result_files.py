"""Results as files and as JSON: class maps on their image's own grid in the format asked for.

In: class values (Z, H, W) in display orientation and the image's `Geometry`. Out: a file, which the caller removes.
"""

import base64
import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from monailabel.transform.writer import write_itk

from lib.checks import RequestError, StorageError
from sam2sgp.data.io import Geometry, itk_affine, output_suffix, read_label, write_label
from sam2sgp.errors import DataError

NIFTI = (".nii.gz",)
NRRD = (".nrrd",)
PICTURES = (".png",)
EXTENSIONS = NIFTI + NRRD + PICTURES
# ITK, and so 3D Slicer, takes a picture for a slice of 1 mm pixels in LPS, columns first.
PICTURE_AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])


def write_result(labels: np.ndarray, geometry: Geometry, extension: str | None = None) -> Path:
    """Write a class map to a new temporary file.

    Args:
        labels: (Z, H, W) integers.
        geometry: of the image.
        extension: `.nii.gz`, `.nrrd` or, for pictures and single slices, `.png`; None for the image's own kind.

    Raises:
        RequestError: the image can't be had in that format.
        StorageError: the file can't be written.
    """
    extension = (extension or output_suffix(geometry)).lower()
    if extension not in EXTENSIONS:
        raise RequestError(f"result_extension: expected one of {', '.join(EXTENSIONS)}, found {extension!r}.")
    if extension in PICTURES and labels.shape[0] > 1:
        raise RequestError(
            f"result_extension: expected a volume format for {labels.shape[0]} slices, found {extension!r}; ask for "
            ".nii.gz or .nrrd."
        )
    try:
        handle, name = tempfile.mkstemp(suffix=extension)
        os.close(handle)
        path = Path(name)
        try:
            _write(path, labels, geometry, extension)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    except (OSError, DataError) as error:
        cause = error.__cause__ if isinstance(error, DataError) else error
        if not isinstance(cause, OSError):
            raise
        raise StorageError(
            f"result: expected to write it to a temporary file, found {cause.strerror or cause}; nothing was changed: "
            "free some space in the server's folder of temporary files, then try again."
        ) from error
    return path


def _write(path: Path, labels: np.ndarray, geometry: Geometry, extension: str) -> None:
    if extension in PICTURES:
        flat = geometry if geometry.is_picture else _picture_geometry(labels.shape)
        write_label(path, labels, flat)
        return
    volume = _volume_geometry(geometry) if geometry.is_picture else geometry
    if extension in NIFTI:
        write_label(path, labels, volume)
        return
    _write_nrrd(path, labels, volume)


def _write_nrrd(path: Path, labels: np.ndarray, volume: Geometry) -> None:
    native = volume.to_native(labels)
    native = native.reshape(native.shape + (1,) * (3 - native.ndim))
    kind = np.uint8 if native.max(initial=0) <= 255 else np.uint16
    write_itk(native, str(path), itk_affine(volume), kind, True)
    # ITK says nothing of a disk that got full.
    try:
        whole = np.array_equal(read_label(path, volume), labels)
    except DataError:
        whole = False
    if not whole:
        raise OSError(errno.EIO, "that the file is not what was written, as on a full disk")


def uncertainty_map(values: np.ndarray, geometry: Geometry) -> dict[str, Any]:
    """A map (Z, H, W) of [0, 1] as JSON: its mean, the mean of each slice, and a file of 0..255 in base64."""
    levels = np.round(values.astype(np.float32) * 255).astype(np.uint8)
    path = write_result(levels, geometry)
    try:
        content = base64.b64encode(path.read_bytes()).decode("ascii")
    finally:
        path.unlink()
    means = values.astype(np.float64).mean((1, 2))
    return {
        "mean": round(float(means.mean()), 4),
        "slices": [round(float(mean), 4) for mean in means],
        "extension": output_suffix(geometry),
        "map": content,
    }


def _picture_geometry(shape: tuple[int, ...]) -> Geometry:
    """A picture that shows one slice as it is displayed."""
    return Geometry(shape[1:], np.eye(4), True, (2, 0, 1), (False, False, False), 2)


def _volume_geometry(geometry: Geometry) -> Geometry:
    """A picture as ITK reads it: (columns, rows, 1), as stored, without regard to an EXIF tag."""
    rows, columns = geometry.native_shape
    across, along = (1 - axis for axis in geometry.axes[1:])
    return Geometry((columns, rows, 1), PICTURE_AFFINE, False, (2, across, along), geometry.flips, 2)
