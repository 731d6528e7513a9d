"""A small archive's content: phantom patients as DICOM series with the truth about them."""

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from pydicom.uid import generate_uid

from sam2sgp.data import read_image, write_label
from sam2sgp.data.phantom_scenes import CLASS_NAMES, phantom_volume
from tests.helpers.dicom_files import write_dicom, write_series

SIZE, SLICES = (64, 64), 8
LABEL_INFO = [{"name": name, "idx": value} for value, name in CLASS_NAMES.items()]


@dataclass
class Patient:
    """A series on the disk.

    Attributes:
        uid: SeriesInstanceUID. study: StudyInstanceUID. folder: its files. label: NIfTI with the truth on its grid.
    """

    uid: str
    study: str
    folder: Path
    label: Path

    @property
    def truth(self) -> np.ndarray:
        """(X, Y, Z), as stored."""
        return np.asarray(nib.load(self.label).dataobj)


def patient(root: Path, name: str, look: str, seed: int, **options) -> Patient:
    """Write a phantom as a CT or MR series. `options`: of `write_series`."""
    image, label, _ = phantom_volume(look, np.random.default_rng(seed), SIZE, SLICES)
    if look == "mr":
        image = image * (1000 / image.max())
    study = generate_uid()
    tags = {
        "StudyInstanceUID": study,
        "FrameOfReferenceUID": generate_uid(),
        "PatientID": name,
        "PatientName": f"{name}^Phantom",
        "StudyDate": "20240501",
        "StudyTime": "101500",
        "WindowCenter": 40 if look == "ct" else 500,
        "WindowWidth": 400 if look == "ct" else 1000,
        "modality": look.upper(),
        "intercept": 0.0,
        "spacing": (3.0, 0.8, 0.8),
        **options,
    }
    folder = write_series(root / name, np.ascontiguousarray(image.transpose(2, 1, 0)).astype(np.int16), **tags)
    if tags["spacing"][0] < 0:
        # Read from the lowest slice to the highest.
        label = label[:, :, ::-1]
    read = read_image(folder)
    path = root / "labels" / f"{name}.nii.gz"
    write_label(path, read.geometry.from_native(label), read.geometry)
    return Patient(series_uid(folder), study, folder, path)


def picture(root: Path, name: str) -> Path:
    """Write a single ultrasound image."""
    folder = root / name
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (64, 80)).astype(np.uint8)
    write_dicom(folder / "IM0.dcm", pixels, "US", PatientID=name)
    return folder


def series_uid(folder: Path) -> str:
    return str(pydicom.dcmread(next(folder.iterdir()), stop_before_pixels=True).SeriesInstanceUID)
