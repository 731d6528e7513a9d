"""Reading NIfTI files, and the headers of those that are written."""

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np

from sam2sgp.data.io.formats import suffix_of
from sam2sgp.data.io.geometry import Geometry, Grid, with_channels
from sam2sgp.errors import DataError

MM_PER_UNIT = {"meter": 1e3, "micron": 1e-3}


def read_nifti(path: Path) -> Grid:
    if suffix_of(path) == ".nii.gz":
        # Through memory: gzip checks its sum only at the end of the stream, which nibabel alone doesn't reach.
        content = gzip.decompress(path.read_bytes())
        is_nifti2 = int.from_bytes(content[:4], "little") == 540 or int.from_bytes(content[:4], "big") == 540
        image = (nib.Nifti2Image if is_nifti2 else nib.Nifti1Image).from_bytes(content)
    else:
        image = nib.load(path)
        if not isinstance(image, nib.Nifti1Pair):
            raise DataError(
                f"{path}: expected NIfTI, found {type(image).__name__}, whose header does not say which side is left; "
                "convert it to NIfTI."
            )
    array = np.asanyarray(image.dataobj)
    if array.dtype.kind == "c":
        raise DataError(f"{path}: expected real intensities, found complex numbers; export magnitudes.")
    is_rgb = array.dtype.names is not None
    if is_rgb:
        array = np.stack([array[name] for name in array.dtype.names[:3]], -1)
    spatial = array.shape[: min(array.ndim - is_rgb, 3)]
    affine = image.affine.astype(np.float64)
    affine[:3] *= MM_PER_UNIT.get(image.header.get_xyzt_units()[0], 1.0)
    return Grid(with_channels(array, spatial), spatial, affine, is_rgb=is_rgb)


def set_space(header: nib.Nifti1Header, geometry: Geometry) -> None:
    header.set_xyzt_units("mm")
    header.set_qform(geometry.affine, code=1)
    header.set_sform(geometry.affine, code=1)
