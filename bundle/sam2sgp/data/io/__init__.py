"""Reading images and labels of every supported format as slices, and writing labels back on the file's own grid.

In: NIfTI, NRRD, MetaImage, DICOM series folders, single DICOM files and pictures (PNG, JPEG, TIFF, BMP).
Out: slices (Z, C, H, W) or class maps (Z, H, W) in display orientation, with a `Geometry` that leads back exactly.
Class maps and maps of probabilities or uncertainty are written on the file's own grid.
Voxels are only permuted and flipped, never resampled. All functions may be called from several threads at once.
"""

from sam2sgp.data.io.dicom import dicom_headers, dicom_slices
from sam2sgp.data.io.formats import (
    DETACHED_SUFFIXES,
    ITK_SUFFIXES,
    NIFTI_SUFFIXES,
    PICTURE_SUFFIXES,
    SUFFIXES,
    data_files,
    dicom_files,
    image_stem,
    is_dicom,
    is_dicom_seg,
    is_image,
    is_picture,
    map_suffix,
    output_suffix,
    result_endings,
    without_pixels,
)
from sam2sgp.data.io.geometry import PLANES, Geometry
from sam2sgp.data.io.images import MedicalImage, read_geometry, read_image
from sam2sgp.data.io.labels import (
    is_binary_255,
    may_be_turned,
    read_label,
    segment_names,
    softened_border,
    write_label,
    write_map,
    writing,
)
from sam2sgp.data.io.nifti import itk_affine
from sam2sgp.data.io.picture_files import png_palette

__all__ = [
    "DETACHED_SUFFIXES",
    "ITK_SUFFIXES",
    "NIFTI_SUFFIXES",
    "PICTURE_SUFFIXES",
    "PLANES",
    "SUFFIXES",
    "Geometry",
    "MedicalImage",
    "data_files",
    "dicom_files",
    "dicom_headers",
    "dicom_slices",
    "image_stem",
    "is_binary_255",
    "is_dicom",
    "is_dicom_seg",
    "is_image",
    "is_picture",
    "itk_affine",
    "map_suffix",
    "may_be_turned",
    "output_suffix",
    "png_palette",
    "read_geometry",
    "read_image",
    "read_label",
    "result_endings",
    "segment_names",
    "softened_border",
    "without_pixels",
    "write_label",
    "write_map",
    "writing",
]
