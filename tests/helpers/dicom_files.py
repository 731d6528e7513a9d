"""Writes small DICOM series, whole or with a chosen defect, for tests of reading."""

import io
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, generate_uid

STORAGE_CLASS = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "PT": "1.2.840.10008.5.1.4.1.1.128",
    "US": "1.2.840.10008.5.1.4.1.1.6.1",
    "DX": "1.2.840.10008.5.1.4.1.1.1.1",
    "SEG": "1.2.840.10008.5.1.4.1.1.66.4",
}


def write_dicom(path: Path, pixels: np.ndarray, modality: str = "CT", series_uid: str | None = None, **tags) -> Path:
    """Write one image: pixels (rows, columns) or (rows, columns, 3), of 8 or 16 bits. A tag of None is left out."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = STORAGE_CLASS[modality]
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.is_little_endian, dataset.is_implicit_VR = True, False
    bits = pixels.dtype.itemsize * 8
    colour = pixels.ndim == 3
    values = {
        "SOPClassUID": meta.MediaStorageSOPClassUID,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "StudyInstanceUID": generate_uid(),
        "SeriesInstanceUID": series_uid or generate_uid(),
        "SeriesDescription": "synthetic",
        "PatientID": "P1",
        "Modality": modality,
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "SamplesPerPixel": 3 if colour else 1,
        "PhotometricInterpretation": "RGB" if colour else "MONOCHROME2",
        "PlanarConfiguration": 0 if colour else None,
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "PixelData": pixels.tobytes(),
        **tags,
    }
    for name, value in values.items():
        if value is not None:
            setattr(dataset, name, value)
    dataset.save_as(path, write_like_original=False)
    return path


def write_compressed(path: Path, source: Path, syntax: UID) -> Path:
    """Write the one frame of a file compressed by RLE, JPEG 2000 without loss, or JPEG of 8 bits."""
    dataset = pydicom.dcmread(source)
    if syntax in (JPEG2000Lossless, JPEGBaseline8Bit):
        stream = io.BytesIO()
        settings = {"no_jp2": True} if syntax == JPEG2000Lossless else {}
        Image.fromarray(dataset.pixel_array).save(stream, "JPEG2000" if settings else "JPEG", **settings)
        dataset.PixelData = encapsulate([stream.getvalue()])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = syntax
    else:
        dataset.compress(syntax)
    dataset.save_as(path)
    return path


def write_object(path: Path, storage_class: str, modality: str, meta: bool = True) -> Path:
    """Write an object without pixels, such as a structured report; `meta`: with file meta information."""
    write_dicom(path, np.zeros((1, 1), np.uint8), "CT")
    dataset = pydicom.dcmread(path)
    for name in ("Rows", "Columns", "PixelData", "BitsAllocated", "BitsStored", "HighBit", "SamplesPerPixel"):
        del dataset[name]
    dataset.SOPClassUID, dataset.Modality = storage_class, modality
    dataset.file_meta.MediaStorageSOPClassUID = storage_class
    if meta:
        dataset.save_as(path)
    else:
        with open(path, "wb") as file:
            target = pydicom.filebase.DicomFileLike(file)
            target.is_little_endian, target.is_implicit_VR = True, False
            pydicom.filewriter.write_dataset(target, dataset)
    return path


def write_series(
    folder: Path,
    volume: np.ndarray,
    spacing: tuple[float, float, float] = (2.5, 0.8, 0.7),
    origin: tuple[float, float, float] = (-10.0, 20.0, 30.0),
    orientation: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    skip: tuple[int, ...] = (),
    repeat: tuple[int, ...] = (),
    slopes: list[float] | None = None,
    intercept: float = -1024.0,
    shuffle: bool = True,
    **tags,
) -> Path:
    """Write volume (slices, rows, columns) as a series; spacing (slice, row, column) and origin in mm, LPS.

    `skip` leaves slices out, `repeat` writes slices twice; `slopes` gives each slice its own rescale slope. File names
    don't follow slice order when `shuffle` is set, as is usual in archives.
    """
    folder.mkdir(parents=True, exist_ok=True)
    series_uid = generate_uid()
    normal = np.cross(orientation[:3], orientation[3:])
    places = [place for place in range(len(volume)) if place not in skip] + list(repeat)
    names = np.random.default_rng(0).permutation(len(places)) if shuffle else np.arange(len(places))
    for name, place in zip(names, places, strict=True):
        position = np.asarray(origin) + normal * spacing[0] * place
        values = {
            "InstanceNumber": place + 1,
            "ImagePositionPatient": [float(f"{value:.6f}") for value in position],
            "ImageOrientationPatient": list(orientation),
            "PixelSpacing": [spacing[1], spacing[2]],
            "SliceThickness": spacing[0],
            "RescaleSlope": 1.0 if slopes is None else slopes[place],
            "RescaleIntercept": intercept,
            **tags,
        }
        write_dicom(folder / f"IM{name:04d}.dcm", volume[place], series_uid=series_uid, **values)
    return folder


def item(**tags) -> Sequence:
    """A sequence of one item with these tags."""
    dataset = Dataset()
    for name, value in tags.items():
        setattr(dataset, name, value)
    return Sequence([dataset])


def write_enhanced(
    path: Path,
    volume: np.ndarray,
    order: list[int],
    spacing: tuple[float, float, float] = (2.5, 0.8, 0.7),
    slopes: list[float] | None = None,
    **tags,
) -> Path:
    """Write volume (slices, rows, columns) as one enhanced CT whose frames come in `order`, each with its own slope."""
    frames = []
    for place in order:
        groups = Dataset()
        groups.PlanePositionSequence = item(ImagePositionPatient=[-10.0, 20.0, 30.0 + spacing[0] * place])
        slope = 1.0 if slopes is None else slopes[place]
        groups.PixelValueTransformationSequence = item(RescaleSlope=slope, RescaleIntercept=-1024.0)
        frames.append(groups)
    shared = item(
        PlaneOrientationSequence=item(ImageOrientationPatient=[1.0, 0.0, 0.0, 0.0, 1.0, 0.0]),
        PixelMeasuresSequence=item(PixelSpacing=list(spacing[1:]), SliceThickness=spacing[0]),
    )
    values = {
        "NumberOfFrames": len(order),
        "SharedFunctionalGroupsSequence": shared,
        "PerFrameFunctionalGroupsSequence": Sequence(frames),
        "PixelData": volume[order].tobytes(),
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2.1",
        **tags,
    }
    return write_dicom(path, volume[0], **values)
