"""Writes small NIfTI files for tests."""

from pathlib import Path

import nibabel as nib
import numpy as np

OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.3, -0.2, 0.25) @ np.diag([0.8, 0.9, 3.0]), [12.0, -34.0, 56.0]
)


def save_nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.0, 1.0, 1.0]) if affine is None else affine), path)
    return path


def reoriented(array: np.ndarray, affine: np.ndarray, codes: str) -> nib.Nifti1Image:
    image = nib.Nifti1Image(array, affine)
    target = nib.orientations.axcodes2ornt(tuple(codes))
    return image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(affine), target))
