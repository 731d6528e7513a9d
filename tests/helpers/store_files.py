"""Volumes, labels and what a folder holds, for tests of datastores."""

from pathlib import Path

import nibabel as nib
import numpy as np

LIMIT = 64 << 20
SIZE = (12, 10, 4)


def volume(path: Path, values: np.ndarray | None = None, size=SIZE) -> Path:
    rng = np.random.default_rng(0)
    array = rng.normal(size=size).astype(np.float32) if values is None else values
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    return path


def label(path: Path, value: int = 1, size=SIZE) -> Path:
    array = np.zeros(size, np.uint8)
    array[2:5, 2:5] = value
    return volume(path, array)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
