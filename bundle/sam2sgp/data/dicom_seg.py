"""DICOM Segmentation objects (SEG) of class maps.

In: a class map (Z, H, W) in display orientation and the DICOM series or file that it belongs to. Out: one file with a
binary segment per class found, which refers to the source's own slices, so that viewers and archives show it in place;
and back again, to the voxel. Objects are built and read by highdicom.
"""

import os
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import RLELossless, generate_uid

import sam2sgp
from sam2sgp.data.classes import renumbered
from sam2sgp.data.io import Geometry, dicom_slices, is_dicom_seg, writing
from sam2sgp.data.io.dicom_file import UNCOMPRESSED, frame_shape, open_dicom
from sam2sgp.data.io.dicom_segmentation import CLASS_VALUE_FOUND
from sam2sgp.data.io.limits import default_memory
from sam2sgp.errors import DataError

# `highdicom` takes a quarter of a second to import, so it is imported where a SEG is written or read.
if TYPE_CHECKING:
    from highdicom.seg import Segmentation, SegmentDescription

PRODUCT = "SAM2-SGP for MONAI"
# Sets the series apart from those of scanners, which count from 1.
SERIES_NUMBER = 300
# Value representation LO.
LONGEST_LABEL = 64
# Segments are numbered without gaps; their description holds the class value.
CLASS_VALUE = "class {value}"
# Class maps are kept in files of 16 bits, and nobody segments so many structures.
LARGEST_CLASS, MOST_SEGMENTS = 65535, 1024
# Attributes that the standard wants present and lets be empty; anonymised files often lack them altogether.
MAY_BE_EMPTY = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
)


class DicomSourceError(DataError):
    """DICOM files that no segmentation object can refer to."""


def write_dicom_seg(
    path: str | os.PathLike,
    labels: np.ndarray,
    geometry: Geometry,
    source: str | os.PathLike,
    class_names: dict[int, str],
    approved: bool = False,
    keep_empty: bool = False,
) -> bool:
    """Write a class map as a DICOM Segmentation object, whole or not at all.

    Segments are binary, numbered from 1 in the order of class values, and bear the class names. Classes that are not
    in the map get no segment, and slices without a segment no frame. All source slices are referenced.

    Args:
        path: ends in `.dcm`. Its folder is made if missing.
        labels: (Z, H, W) integers, 0 is background.
        geometry: of the source, as `read_image` gave it.
        source: a DICOM series folder, an enhanced multi-frame file, or the file of a single slice; compressed or not.
        class_names: by value.
        approved: whether a person has approved the class map: its segments are then called semi-automatic, else
            automatic.
        keep_empty: whether a map without a class is written too, as the statement that none of `class_names` is in the
            image: each is a segment with one frame, without a voxel, since DICOM has no segmentation without frames.

    Returns:
        Whether there was something to write. If not, a segmentation that an earlier run left at `path` is removed.

    Raises:
        DicomSourceError: the source is a cine loop, lacks identifiers or its frame of reference, or is not one regular
            series.
        DataError: the file can't be written.
    """
    path = Path(path)
    native = geometry.to_native(labels)
    found = [int(value) for value in np.unique(native) if value]
    values = found or (sorted(class_names) if keep_empty else [])
    if not values:
        if is_dicom_seg(path):
            path.unlink()
        return False
    numbers = np.zeros(values[-1] + 1, dtype=np.min_scalar_type(len(values)))
    numbers[values] = np.arange(1, len(values) + 1)
    # A file's grid is (column, row, slice), with slices in the order of its headers.
    segments = renumbered(native.transpose(2, 1, 0), numbers)
    descriptions = [_description(number, class_names[value], approved) for number, value in enumerate(values, 1)]
    headers, frames = _source_images(source, geometry)
    if len(headers) == 1:
        # An enhanced file keeps its frames in an order of its own.
        segments = segments[np.argsort(frames)]
    elif not found:
        segments = segments[:1]
    segmentation = _segmentation(source, headers[: len(segments)], segments, descriptions, approved)
    _refer_to(segmentation, headers[len(segments) :])
    for value, segment in zip(values, segmentation.SegmentSequence, strict=True):
        segment.SegmentDescription = CLASS_VALUE.format(value=value)
    # Class names may hold any letter.
    segmentation.SpecificCharacterSet = "ISO_IR 192"
    with writing(path, "a DICOM segmentation") as part:
        segmentation.save_as(part)
    return True


def _segmentation(
    source: str | os.PathLike,
    headers: list[Dataset],
    segments: np.ndarray,
    descriptions: "list[SegmentDescription]",
    approved: bool,
) -> "Segmentation":
    """The object of segment numbers (frames, rows, columns) on the images of these headers."""
    from highdicom.seg import Segmentation, SegmentationTypeValues

    try:
        return Segmentation(
            source_images=headers,
            pixel_array=segments,
            segmentation_type=SegmentationTypeValues.BINARY,
            segment_descriptions=descriptions,
            series_instance_uid=generate_uid(),
            series_number=SERIES_NUMBER,
            sop_instance_uid=generate_uid(),
            instance_number=1,
            manufacturer=PRODUCT,
            manufacturer_model_name=sam2sgp.__name__,
            software_versions=sam2sgp.__version__,
            device_serial_number=sam2sgp.__version__,
            series_description=f"{PRODUCT} {'approved label' if approved else 'segmentation'}",
            content_description="Research only, not for diagnosis",
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DicomSourceError(
            f"{source}: expected DICOM that a segmentation can refer to, found that it can't ({error}); use the "
            "series as the scanner or archive gives it, or the class map."
        ) from error


def _refer_to(segmentation: Dataset, headers: list[Dataset]) -> None:
    """Name further images of the series, of which no frame is."""
    references = segmentation.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    for header in headers:
        reference = Dataset()
        reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = header.SOPClassUID, header.SOPInstanceUID
        references.append(reference)


def read_dicom_seg(
    path: str | os.PathLike,
    geometry: Geometry,
    source: str | os.PathLike,
    value_of: Callable[[str], int] | None = None,
    limit: int | None = None,
) -> tuple[np.ndarray, dict[int, str]]:
    """Read a DICOM Segmentation object as the class map of the series that it refers to.

    Args:
        path: of the object.
        geometry: of the series, as `read_image` gave it.
        source: the series' folder or file.
        value_of: class value (1..65535) for the name of a segment that doesn't say its own, as those of other
            programs don't; without it they are numbered as in the file.
        limit: bytes that its frames may unpack to, one for each voxel; by default `default_memory()`.

    Returns:
        labels: (Z, H, W) uint8 or uint16 in display orientation; slices without a frame are empty.
        names: by class value.

    Raises:
        DataError: the object can't be read, refers to other slices, is too large, or its segments overlap.
    """
    slices = dicom_slices(source)
    try:
        numbers, segments = _segment_numbers(Path(path), slices, default_memory() if limit is None else limit)
    except _Overlapping as error:
        raise DataError(
            f"{path}: expected one class per voxel, found segments that overlap; correct the label."
        ) from error
    except Exception as error:
        # Whatever is wrong with a file of another program: highdicom and pydicom raise types of all kinds for it.
        raise DataError(
            f"{path}: expected a DICOM segmentation of the slices of its series, found that it can't be read as one "
            f"({error}); export it again."
        ) from error
    values = np.zeros(max(segments, default=0) + 1, dtype=np.int64)
    names: dict[int, str] = {}
    for number, (description, name) in segments.items():
        found = CLASS_VALUE_FOUND.fullmatch(description)
        values[number] = int(found[1]) if found else value_of(name) if value_of else number
        first = names.setdefault(int(values[number]), name)
        if first != name and first.casefold() == name.casefold():
            raise DataError(
                f"{path}: expected names of segments that differ in more than upper and lower case, found {first!r} "
                f"and {name!r}; make them one segment, or rename one."
            )
    if values.max() > LARGEST_CLASS:
        raise DataError(f"{path}: expected class values up to {LARGEST_CLASS}, found {values.max()}; correct it.")
    classes = renumbered(numbers, values.astype(np.uint8 if values.max() <= 255 else np.uint16))
    native = classes.transpose(2, 1, 0).reshape(geometry.native_shape)
    return geometry.from_native(native), names


class _Overlapping(Exception):
    """Two segments share a voxel."""


def _segment_numbers(
    path: Path, slices: list[tuple[Dataset, int]], limit: int
) -> tuple[np.ndarray, dict[int, tuple[str, str]]]:
    """(slices, rows, columns) numbers of segments, 0 for none, and of each segment its description and its label.

    One segment after the other is unpacked, and of each only the slices that it has frames of: a file of a few
    megabytes may name a thousand segments of a large series.
    """
    from highdicom.seg import segread

    header = open_dicom(path, pixels=True, limit=sys.maxsize)
    _check_frames(header, slices[0][0], limit)
    segmentation = segread(path)
    uids = [str(header.SOPInstanceUID) for header, _ in slices]
    # Slices without a frame are empty, so those of another series would all be.
    strangers = {uid for _, _, uid in segmentation.get_source_image_uids()} - set(uids)
    if strangers:
        raise ValueError(f"it refers to {len(strangers)} other images")
    is_enhanced = len(set(uids)) < len(slices)
    place_of = {
        (uid, frame + 1 if is_enhanced else 0): place
        for place, (uid, (_, frame)) in enumerate(zip(uids, slices, strict=True))
    }
    places: dict[int, set[int]] = defaultdict(set)
    for groups in segmentation.PerFrameFunctionalGroupsSequence:
        number = int(groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        for derivation in groups.DerivationImageSequence:
            for image in derivation.SourceImageSequence:
                frame = int(image.ReferencedFrameNumber) if is_enhanced else 0
                places[number].add(place_of[str(image.ReferencedSOPInstanceUID), frame])
    numbers = np.zeros((len(slices), header.Rows, header.Columns), np.min_scalar_type(max(places, default=0)))
    for number, found in places.items():
        wanted = {"segment_numbers": [number], "assert_missing_frames_are_empty": True}
        its = sorted(found)
        if is_enhanced:
            order = [slices[place][1] + 1 for place in its]
            frames = segmentation.get_pixels_by_source_frame(uids[0], order, **wanted)
        else:
            frames = segmentation.get_pixels_by_source_instance([uids[place] for place in its], **wanted)
        masks = frames[..., 0] > 0.5
        stack = numbers[its]
        if stack[masks].any():
            raise _Overlapping()
        stack[masks] = number
        numbers[its] = stack
    described = {int(number): segmentation.get_segment_description(number) for number in segmentation.segment_numbers}
    return numbers, {
        number: (str(segment.get("SegmentDescription") or ""), str(segment.segment_label))
        for number, segment in described.items()
    }


def _check_frames(header: Dataset, image: Dataset, limit: int) -> None:
    """Raise ValueError for a segmentation that takes more to read than one of the image can. `limit`: in bytes."""
    syntax = header.file_meta.TransferSyntaxUID
    if syntax not in (*UNCOMPRESSED, RLELossless):
        # highdicom would have it decoded in this process, see `sam2sgp.data.io.decoding`.
        raise ValueError(f"it is stored as {syntax.name}, not uncompressed or as RLE")
    if header.get("DimensionOrganizationType") == "TILED_FULL":
        raise ValueError("it consists of tiles, not of slices")
    frames, rows, columns = frame_shape(header)
    if (rows, columns) != (image.Rows, image.Columns):
        raise ValueError(
            f"it has frames of {rows} x {columns} pixels where the series has {image.Rows} x {image.Columns}"
        )
    segments = len(header.get("SegmentSequence") or [])
    if segments > MOST_SEGMENTS or frames * rows * columns > limit:
        raise ValueError(
            f"it has {segments} segments and {frames * rows * columns >> 20} MB of pixels, more than "
            f"{MOST_SEGMENTS} or {limit >> 20}"
        )


def _source_images(source: str | os.PathLike, geometry: Geometry) -> tuple[list[Dataset], list[int]]:
    """Headers in the order of slices, and the frame of each slice.

    Headers are completed with what highdicom relies on and files may lack. Raises DicomSourceError for a cine loop, and
    for several multi-frame files.
    """
    slices = dicom_slices(source)
    headers = list({id(header): header for header, _ in slices}.values())
    frames = [frame for _, frame in slices]
    is_enhanced = len(headers) == 1 and "PerFrameFunctionalGroupsSequence" in headers[0]
    if len(headers) < len(slices) and not is_enhanced:
        raise DicomSourceError(
            f"{source}: expected one slice per file, or one enhanced multi-frame file with positions, found a cine "
            "loop or several such files, whose frames a segmentation can't refer to; use the class map."
        )
    spacing = float(np.linalg.norm(geometry.affine[:3, 2]))
    for header in headers:
        for name in MAY_BE_EMPTY:
            if name not in header:
                setattr(header, name, None)
        if header.get("PatientSex") not in ("M", "F", "O"):
            header.PatientSex = None
        if not is_enhanced:
            # A classic image with this tag, which is allowed to say 1, would be taken for a multi-frame object.
            header.pop("NumberOfFrames", None)
            if "ImagePositionPatient" not in header:
                # Such as a radiograph: it has no place in its frame of reference.
                header.pop("FrameOfReferenceUID", None)
            elif not header.get("SliceThickness"):
                header.SliceThickness = spacing
        if len(headers) > 1:
            header.SpacingBetweenSlices = spacing
        for name in ("LossyImageCompressionRatio", "LossyImageCompressionMethod"):
            if name not in header:
                setattr(header, name, None)
    return headers, frames


def _description(number: int, name: str, approved: bool) -> "SegmentDescription":
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.seg import SegmentDescription

    category, kind = _property_codes(name)
    return SegmentDescription(
        segment_number=number,
        # A backslash separates values.
        segment_label=name.replace("\\", "/")[:LONGEST_LABEL],
        segmented_property_category=category,
        segmented_property_type=kind,
        algorithm_type="SEMIAUTOMATIC" if approved else "AUTOMATIC",
        algorithm_identification=AlgorithmIdentificationSequence(
            sam2sgp.__name__, codes.cid7162.ArtificialIntelligence, sam2sgp.__version__
        ),
    )


def _property_codes(name: str) -> tuple[Code, Code]:
    """SNOMED CT category and type of a segment: of a few very common class names, else of some tissue."""
    word = " ".join(name.lower().replace("_", " ").replace("-", " ").split())
    anatomy, lesions = codes.cid7150.AnatomicalStructure, codes.cid7150.MorphologicallyAbnormalStructure
    known = {
        "aorta": (anatomy, codes.SCT.Aorta),
        "bone": (anatomy, codes.SCT.Bone),
        "brain": (anatomy, codes.SCT.Brain),
        "breast": (anatomy, codes.SCT.Breast),
        "colon": (anatomy, codes.SCT.Colon),
        "esophagus": (anatomy, codes.SCT.Esophagus),
        "gallbladder": (anatomy, codes.SCT.Gallbladder),
        "heart": (anatomy, codes.SCT.Heart),
        "hippocampus": (anatomy, codes.SCT.Hippocampus),
        "kidney": (anatomy, codes.SCT.Kidney),
        "left atrium": (anatomy, codes.SCT.LeftAtrium),
        "left ventricle": (anatomy, codes.SCT.LeftVentricle),
        "liver": (anatomy, codes.SCT.Liver),
        "lung": (anatomy, codes.SCT.Lung),
        "pancreas": (anatomy, codes.SCT.Pancreas),
        "prostate": (anatomy, codes.SCT.Prostate),
        "right atrium": (anatomy, codes.SCT.RightAtrium),
        "right ventricle": (anatomy, codes.SCT.RightVentricle),
        "spleen": (anatomy, codes.SCT.Spleen),
        "stomach": (anatomy, codes.SCT.Stomach),
        "cyst": (lesions, codes.SCT.Cyst),
        "edema": (lesions, codes.SCT.Edema),
        "lesion": (lesions, codes.SCT.Lesion),
        "neoplasm": (lesions, codes.SCT.Neoplasm),
        "nodule": (lesions, codes.SCT.Nodule),
        "tumor": (lesions, codes.SCT.Neoplasm),
        "tumour": (lesions, codes.SCT.Neoplasm),
    }
    plural = word.removesuffix("s")
    return known.get(word) or known.get(plural) or (codes.cid7150.Tissue, codes.SCT.Tissue)
