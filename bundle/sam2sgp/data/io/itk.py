"""Reading NRRD and MetaImage files."""

from pathlib import Path

import numpy as np

from sam2sgp.data.io import metaimage, nrrd
from sam2sgp.data.io.geometry import Grid, with_channels
from sam2sgp.data.io.raw import RawHeader
from sam2sgp.errors import DataError


def raw_header(path: Path, detached: bool = False) -> RawHeader:
    """Of an NRRD or MetaImage file, by its suffix; see `sam2sgp.data.io.raw`."""
    kind = metaimage if path.suffix.lower() in (".mha", ".mhd") else nrrd
    return kind.read_header(path, detached)


def read_itk(path: Path, label: bool = False, limit: int | None = None) -> Grid:
    header = raw_header(path, detached=True)
    if header.is_complex:
        raise DataError(f"{path}: expected real intensities, found complex numbers; export magnitudes.")
    array = header.read(label, limit)
    is_rgb = header.dtype == np.uint8 and header.channels in (3, 4) and len(header.shape) <= 3
    if is_rgb:
        array = array[..., :3]
    spatial = array.shape[: min(len(header.shape), 3)]
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ header.affine
    return Grid(with_channels(array, spatial), spatial, affine, is_rgb=is_rgb)
