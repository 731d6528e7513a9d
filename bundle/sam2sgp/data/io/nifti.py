"""Reading NIfTI files, and the headers of those that are written."""

from pathlib import Path

import nibabel as nib
import numpy as np

from sam2sgp.data.io.formats import data_files, suffix_of
from sam2sgp.data.io.geometry import Geometry, Grid, check_one_volume, with_channels
from sam2sgp.data.io.limits import check_memory
from sam2sgp.data.io.nifti_file import open_nifti, stored_voxel_sizes
from sam2sgp.errors import DataError

# Headers of pairs: their class, and where which magic stands.
PAIRS = ((nib.Nifti1Pair, 344, b"ni1\0"), (nib.Nifti2Pair, 4, b"ni2\0"))
LONGEST_MAGIC = 348
# pixdim and sform may give a voxel sizes that differ by this part: they are rounded differently.
SIZE_TOLERANCE = 1e-3
MM_PER_UNIT = {"meter": 1e3, "micron": 1e-3}
# Of a NIfTI header, all that says where its voxels lie.
PLACING_FIELDS = (
    "pixdim",
    "xyzt_units",
    "dim_info",
    "qform_code",
    "quatern_b",
    "quatern_c",
    "quatern_d",
    "qoffset_x",
    "qoffset_y",
    "qoffset_z",
    "sform_code",
    "srow_x",
    "srow_y",
    "srow_z",
)


def read_nifti(path: Path, label: bool = False, limit: int | None = None) -> Grid:
    """A NIfTI file's volume, or its colours (RGB24, RGBA32, or a vector of three or four bytes).

    Raises DataError for several volumes in one file, which are time points or channels, and for complex numbers.
    """
    is_pair = suffix_of(path) == ".img"
    image = _open_pair(path, limit) if is_pair else open_nifti(path, label, limit)
    array = np.asanyarray(image.dataobj)
    if array.dtype.kind == "c":
        raise DataError(f"{path}: expected real intensities, found complex numbers; export magnitudes.")
    if array.dtype.names is not None:
        array = np.stack([array[name] for name in array.dtype.names[:3]], -1)
        is_rgb, spatial = True, array.shape[:-1]
    else:
        is_rgb = array.dtype == np.uint8 and array.ndim == 5 and array.shape[3] == 1 and array.shape[4] in (3, 4)
        array, spatial = (array[..., 0, :3], array.shape[:3]) if is_rgb else (array, array.shape)
    check_one_volume(path, spatial[3:])
    spatial = spatial[:3]
    header = image.header
    scale = MM_PER_UNIT.get(header.get_xyzt_units()[0], 1.0)
    affine, *others = (_in_mm(affine, scale) for affine in (image.affine, *_other_affines(header)))
    sizes = header["pixdim"][1:4] if is_pair else stored_voxel_sizes(path)
    lacks_sizes = header["sform_code"] <= 0 and not (np.isfinite(sizes) & (sizes != 0)).all()
    warnings = ["Its header gives voxels no size (pixdim is 0), so sizes count voxels."] if lacks_sizes else []
    if _sform_of_other_sizes(header) is not None:
        found = (", ".join(f"{size:.4g}" for size in sizes) for sizes in (header["pixdim"][1:4], _sizes(header)))
        warnings.append(
            "Its header contradicts itself on the size of a voxel (pixdim {}; sform {}): the sform counts, ITK and 3D "
            "Slicer go by pixdim; correct the header.".format(*found)
        )
    header = header.copy()
    if (sizes < 0).any():
        warnings.append(
            f"Its header gives voxels negative sizes (pixdim {', '.join(f'{size:.4g}' for size in sizes)}), by which "
            "ITK and 3D Slicer mirror an image and others don't: their sign is left out; correct the header."
        )
        header["pixdim"][1:4] = sizes
        others = [other * _signs(header) for other in (*others, affine)] + others
    return Grid(
        with_channels(array, spatial),
        spatial,
        affine,
        is_rgb=is_rgb,
        has_spacing=not lacks_sizes,
        affines=tuple(others),
        nifti=header,
        warnings=warnings,
    )


def _open_pair(path: Path, limit: int | None) -> nib.Nifti1Pair:
    """The image of a header in one file and voxels in another, both plain files of one folder.

    Raises DataError for an Analyze file, and for anything else.
    """
    header = next((file for file in data_files(path) if not file.is_symlink()), None)
    if header is None:
        raise DataError(f"{path}: expected its header in a .hdr file of the same folder, found none; copy it there.")
    with open(header, "rb") as file:
        content = file.read(LONGEST_MAGIC)
    kind = next((kind for kind, where, magic in PAIRS if content[where:].startswith(magic)), None)
    if kind is None:
        raise DataError(
            f"{path}: expected a NIfTI pair, found another header, such as Analyze's, which does not say which side is "
            "left; convert it to NIfTI."
        )
    # Not by nibabel's guess: some of the classes that it may choose look for further files.
    files = {"header": nib.FileHolder(str(header)), "image": nib.FileHolder(str(path))}
    image = kind.from_file_map(files)
    check_memory(path, image.shape, limit=limit)
    return image


def _in_mm(affine: np.ndarray, scale: float) -> np.ndarray:
    affine = np.array(affine, dtype=np.float64)
    affine[:3] *= scale
    return affine


def _other_affines(header: nib.Nifti1Header) -> list[np.ndarray]:
    """Affines by which other programs place the voxels than nibabel, which takes the sform if there are two forms.

    ITK mostly takes the qform then; without any form it takes the axes as left, posterior and superior. Of a sform it
    takes directions and place only, and sizes from pixdim.
    """
    forms = [form for form, code in (header.get_sform(coded=True), header.get_qform(coded=True)) if code > 0]
    if forms:
        of_itk = _sform_of_other_sizes(header)
        return forms[1:] + ([of_itk] if of_itk is not None else [])
    return [np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.diag([*header["pixdim"][1:4], 1.0])]


def _sizes(header: nib.Nifti1Header) -> np.ndarray:
    """Of a voxel, by the sform."""
    return np.linalg.norm(header.get_sform()[:3, :3], axis=0)


def _sform_of_other_sizes(header: nib.Nifti1Header) -> np.ndarray | None:
    """A sform with the voxel sizes of pixdim, where it is the only form and has other ones; else None."""
    if header["sform_code"] <= 0 or header["qform_code"] > 0:
        return None
    axes = slice(min(int(header["dim"][0]), 3))
    stated, sizes = np.abs(header["pixdim"][1:4].astype(float))[axes], _sizes(header)[axes]
    is_sound = np.isfinite([stated, sizes]).all() and stated.all() and sizes.all()
    if not is_sound or np.allclose(stated, sizes, SIZE_TOLERANCE, 0):
        return None
    affine = header.get_sform().astype(float)
    affine[:3, axes] *= stated / sizes
    return affine


def itk_affine(geometry: Geometry) -> np.ndarray:
    """(4, 4) voxel -> world in mm, RAS+, as ITK and so 3D Slicer place an image's voxels.

    ITK takes the sform only where its code is 1 (scanner) or there is no qform, and voxel sizes from pixdim, with sign.
    """
    if geometry.nifti is None or not geometry.affines:
        return geometry.affine
    is_sform_first = geometry.nifti["sform_code"] == 1 and geometry.nifti["qform_code"] > 0
    return geometry.affine * _signs(geometry.nifti) if is_sform_first else geometry.affines[0]


def _signs(header: nib.Nifti1Header) -> np.ndarray:
    """(4,) of the columns of an affine, as ITK takes them from pixdim."""
    return np.array([*np.where(header["pixdim"][1:4] < 0, -1.0, 1.0), 1.0])


def result_header(geometry: Geometry) -> nib.Nifti1Header:
    """A header that places a result exactly as its image: both forms with their codes, voxel sizes and units.

    An image of another format gives its affine to both forms.
    """
    if geometry.nifti is not None:
        header = type(geometry.nifti)()
        for name in PLACING_FIELDS:
            header[name] = geometry.nifti[name]
        return header
    header = nib.Nifti1Header()
    header.set_data_shape(geometry.full_shape)
    header.set_xyzt_units("mm" if geometry.has_spacing else "unknown")
    header.set_qform(geometry.affine, code=1)
    header.set_sform(geometry.affine, code=1)
    return header
