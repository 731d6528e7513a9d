"""Reading NRRD and MetaImage files, and compressed DICOM, by ITK."""

import threading
from pathlib import Path

import itk
import numpy as np

from sam2sgp.data.io.geometry import Grid, with_channels
from sam2sgp.errors import DataError

# ITK's Python wrapping loads its modules lazily, which isn't safe from several threads.
ITK_LOCK = threading.Lock()


def read_itk(path: Path) -> Grid:
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
    is_rgb = component == "unsigned_char" and components in (3, 4) and dimension <= 3
    if is_rgb:
        array = array[..., :3]
    spatial = array.shape[:spatial_axes]
    return Grid(with_channels(array, spatial), spatial, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine, is_rgb=is_rgb)


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
