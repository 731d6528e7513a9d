"""Reading NRRD and MetaImage files, and compressed DICOM, by ITK."""

import re
import threading
from pathlib import Path

import itk
import nrrd
import numpy as np

from sam2sgp.data.io.geometry import Grid, check_one_volume, with_channels
from sam2sgp.errors import DataError

LONGEST_HEADER = 1 << 16
SPACING_FIELDS = (b"space directions:", b"spacings:", b"elementspacing", b"elementsize")
SEGMENT_VALUE = re.compile(r"Segment(\d+)_LabelValue")
# ITK's Python wrapping loads its modules lazily, which isn't safe from several threads.
ITK_LOCK = threading.Lock()


def read_itk(path: Path, label: bool) -> Grid:
    """An NRRD or MetaImage file's volume or colours; as a label, a Slicer segmentation of any number of layers.

    Raises DataError for several volumes or components in one file, and for complex numbers.
    """
    segments = _segments(path) if label and path.name.lower().endswith(".nrrd") else []
    with ITK_LOCK:
        reader_io = itk.ImageIOFactory.CreateImageIO(str(path), itk.CommonEnums.IOFileMode_ReadMode)
        if reader_io is None:
            raise DataError(f"{path}: expected an NRRD or MetaImage file, found another content; export it again.")
        image, array = itk_array(path, reader_io)
        dimension = image.GetImageDimension()
        spatial_axes = min(dimension, 3)
        affine = np.eye(4)
        direction = itk.array_from_matrix(image.GetDirection())[:spatial_axes, :spatial_axes]
        affine[:spatial_axes, :spatial_axes] = direction * np.asarray(image.GetSpacing())[:spatial_axes]
        affine[:spatial_axes, 3] = np.asarray(image.GetOrigin())[:spatial_axes]
        pixel_type = reader_io.GetPixelTypeAsString(reader_io.GetPixelType())
        component = reader_io.GetComponentTypeAsString(reader_io.GetComponentType())
    if pixel_type == "complex":
        raise DataError(f"{path}: expected real intensities, found complex numbers; export magnitudes.")
    # ITK's arrays are (z, y, x) with components last.
    array = array.transpose(*range(dimension)[::-1], *range(dimension, array.ndim))
    components = array.shape[dimension] if array.ndim > dimension else 1
    check_one_volume(path, array.shape[3:dimension])
    is_rgb = components in (3, 4) and (component == "unsigned_char" or pixel_type in ("rgb", "rgba")) and not segments
    if is_rgb:
        array = array[..., :3]
    elif components > 1 and not segments:
        check_one_volume(path, (components,))
    spatial = array.shape[:spatial_axes]
    array = with_channels(array, spatial)
    return Grid(
        _one_map(path, array, segments) if segments else array,
        spatial,
        np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine,
        is_rgb=is_rgb,
        has_spacing=_has_spacing(path),
        may_be_cropped=bool(segments) or path.name.lower().endswith(".seg.nrrd"),
    )


def _has_spacing(path: Path) -> bool:
    """Whether the header says how large a voxel is, where ITK would make it 1 mm."""
    with open(path, "rb") as file:
        head = file.read(LONGEST_HEADER).lower()
    return any(field in head for field in SPACING_FIELDS)


def _segments(path: Path) -> list[tuple[int, int]]:
    """(layer, value) of each segment of a file that 3D Slicer wrote; [] for other files."""
    header = nrrd.read_header(str(path))
    numbers = sorted(int(found[1]) for key in header if (found := SEGMENT_VALUE.fullmatch(key)))
    return [
        (int(header.get(f"Segment{number}_Layer", 0)), int(header[f"Segment{number}_LabelValue"])) for number in numbers
    ]


def _one_map(path: Path, layers: np.ndarray, segments: list[tuple[int, int]]) -> np.ndarray:
    """Layers (n0, n1, n2, L) of a segmentation as one class map (n0, n1, n2, 1).

    Classes are the label values of the segments; where layers use one value for different segments, the segments'
    numbers, counted from 1. Raises DataError where segments overlap.
    """
    if layers.shape[3] == 1:
        return layers
    distinct = len({value for _, value in segments}) == len(segments)
    classes = np.zeros((*layers.shape[:3], 1), np.int64)
    for number, (layer, value) in enumerate(segments, 1):
        mask = layers[..., layer, None] == value
        if (classes[mask] > 0).any():
            raise DataError(
                f"{path}: expected one class per voxel, found segments that overlap; correct the segmentation, or "
                "export each segment by itself."
            )
        classes[mask] = value if distinct else number
    return classes


def itk_array(path: Path, reader_io) -> tuple:
    reader_io.SetFileName(str(path))
    reader_io.ReadImageInformation()
    component = reader_io.GetComponentTypeAsString(reader_io.GetComponentType())
    exact_as_float = component in ("float", "char", "unsigned_char", "short", "unsigned_short")
    kind = itk.Image if reader_io.GetNumberOfComponents() == 1 else itk.VectorImage
    image_type = kind[itk.F if exact_as_float else itk.D, reader_io.GetNumberOfDimensions()]
    reader = itk.ImageFileReader[image_type].New(FileName=str(path), ImageIO=reader_io)
    reader.Update()
    return reader.GetOutput(), itk.array_from_image(reader.GetOutput())
