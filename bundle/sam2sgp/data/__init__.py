"""Data: reading and writing files, and data folders."""

from sam2sgp.data.classes import check_label_values, class_names, complete_class_names
from sam2sgp.data.coding import are_binary_255
from sam2sgp.data.dicom_seg import read_dicom_seg, write_dicom_seg
from sam2sgp.data.folders import DEFAULT_PATIENT_PATTERN, Datalist, load_datalist, load_queries, skipped_in
from sam2sgp.data.io import (
    Geometry,
    MedicalImage,
    dicom_files,
    image_stem,
    is_binary_255,
    is_image,
    output_suffix,
    read_geometry,
    read_image,
    read_label,
    write_label,
    write_map,
)
from sam2sgp.data.split import subset
from sam2sgp.data.tree import Skipped

__all__ = [
    "DEFAULT_PATIENT_PATTERN",
    "Datalist",
    "Geometry",
    "MedicalImage",
    "Skipped",
    "are_binary_255",
    "check_label_values",
    "class_names",
    "complete_class_names",
    "dicom_files",
    "image_stem",
    "is_binary_255",
    "is_image",
    "load_datalist",
    "load_queries",
    "output_suffix",
    "read_dicom_seg",
    "read_geometry",
    "read_image",
    "read_label",
    "skipped_in",
    "subset",
    "write_dicom_seg",
    "write_label",
    "write_map",
]
