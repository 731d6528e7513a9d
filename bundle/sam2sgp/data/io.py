"""Reading images and labels of every supported format as slices, and writing labels back on the file's own grid.

In: NIfTI, NRRD, MetaImage, DICOM series folders, single DICOM files and pictures (PNG, JPEG, TIFF, BMP).
Out: slices (Z, C, H, W) or class maps (Z, H, W) in display orientation, with a `Geometry` that leads back exactly.
Class maps and maps of probabilities or uncertainty are written on the file's own grid.
Voxels are only permuted and flipped, never resampled. All functions may be called from several threads at once.
"""

import gzip
import os
import re
import threading
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pydicom
from nibabel.orientations import io_orientation
from nibabel.volumeutils import array_to_file
from PIL import Image
from pydicom.pixel_data_handlers.util import apply_color_lut, convert_color_space
from pydicom.uid import RLELossless, SegmentationStorage

from sam2sgp.errors import ConfigError, DataError
from sam2sgp.files import replacing

NIFTI_SUFFIXES = (".nii.gz", ".nii")
ITK_SUFFIXES = (".seg.nrrd", ".nrrd", ".mha", ".mhd")
DICOM_SUFFIXES = (".dcm",)
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
# Of results, for volumes and for pictures.
OUTPUT_SUFFIX = {False: ".nii.gz", True: ".png"}
MAP_SUFFIX = {False: ".nii.gz", True: ".tif"}
SUFFIXES = NIFTI_SUFFIXES + ITK_SUFFIXES + DICOM_SUFFIXES + PICTURE_SUFFIXES

# An axis this much coarser than the other two is the one that was scanned in slices.
THICK_AXIS_RATIO = 1.5
# Corners of image and label may differ by this part of a voxel: headers hold rounded numbers.
GRID_TOLERANCE = 1e-2
# DICOM positions are decimal strings that scanners round; a missing slice changes a gap by 100 %.
SLICE_GAP_TOLERANCE = 5e-2
# A sheared stack (gantry tilt) has no rectangular voxels, so no viewer would show a label on it in place.
SHEAR_TOLERANCE = 1e-2
# A picture of this many values that reaches 255 is a resized (blurred) mask, not a class map with an ignore label.
BLURRED_MASK_VALUES = 32
# Modalities whose multi-frame files are films: their frames have no positions of their own to lose.
CINE_MODALITIES = ("US", "IVUS", "XA", "RF", "ES", "OP")
MM_PER_UNIT = {"meter": 1e3, "micron": 1e-3}

# ITK's Python wrapping loads its modules lazily, which isn't safe from several threads.
_ITK_LOCK = threading.Lock()


@dataclass(frozen=True, eq=False)
class Geometry:
    """The way between a file's own grid and slices in display orientation.

    Attributes:
        native_shape: of the file's grid without channels: (X, Y, Z), (X, Y) or, for pictures, (rows, columns).
        affine: (4, 4) float64, voxel -> world in mm, RAS+ as in nibabel; identity for pictures.
        is_picture: a PNG, JPEG, TIFF or BMP.
        axes: the native axis that runs along (slice, row, column); axis 2 of a 2D grid has length 1.
        flips: whether (slice, row, column) run against that native axis.
        slice_axis: canonical axis along which slices are taken: 0 left, 1 posterior, 2 superior.
    """

    native_shape: tuple[int, ...]
    affine: np.ndarray
    is_picture: bool
    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    slice_axis: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(Z, H, W) in display orientation."""
        full = self._full_shape
        return tuple(full[axis] for axis in self.axes)

    @property
    def spacing(self) -> tuple[float, float, float] | None:
        """(slice, row, column) in mm to six digits; None for pictures, whose spacing is unknown.

        Headers hold affines in single precision. What that leaves of a voxel's size differs between an upright and an
        oblique volume, and would decide whether a region of interest begins one pixel earlier.
        """
        if self.is_picture:
            return None
        sizes = np.linalg.norm(self.affine[:3, :3], axis=0)
        return tuple(float(f"{sizes[axis]:.6g}") for axis in self.axes)

    @property
    def is_isotropic(self) -> bool:
        """A volume of voxels about as long along every axis, which may be sliced along any."""
        sizes = np.linalg.norm(self.affine[:3, :3], axis=0)
        return not self.is_picture and min(self.shape) > 1 and sizes.max() < THICK_AXIS_RATIO * sizes.min()

    @property
    def _full_shape(self) -> tuple[int, ...]:
        return self.native_shape + (1,) * (3 - len(self.native_shape))

    def from_native(self, array: np.ndarray) -> np.ndarray:
        """An array of `native_shape`, any dtype, as slices (Z, H, W). Raises ValueError for another shape."""
        if array.shape != self.native_shape:
            raise ValueError(f"expected an array of shape {self.native_shape}, found {array.shape}")
        return self._display(array.reshape(self._full_shape))

    def to_native(self, labels: np.ndarray) -> np.ndarray:
        """Slices (Z, H, W), any dtype, as an array of `native_shape`: the exact inverse of `from_native`.

        Raises ValueError for another shape.
        """
        if labels.shape != self.shape:
            raise ValueError(f"expected slices of shape {self.shape}, found {labels.shape}")
        flipped = np.flip(labels, [axis for axis in range(3) if self.flips[axis]])
        return np.ascontiguousarray(flipped.transpose(np.argsort(self.axes))).reshape(self.native_shape)

    def _display(self, array: np.ndarray) -> np.ndarray:
        """(n0, n1, n2, ...) -> (Z, H, W, ...)."""
        turned = array.transpose(*self.axes, *range(3, array.ndim))
        return np.ascontiguousarray(np.flip(turned, [axis for axis in range(3) if self.flips[axis]]))


@dataclass
class MedicalImage:
    """An image as read from disk.

    Attributes:
        slices: (Z, C, H, W) float32, the file's own finite intensities (HU for CT), in display orientation.
        geometry: the way back to the file's grid.
        modality: the DICOM tag's value ("CT", "MR", "PT", "US", "CR", "DX"); None if the file doesn't say.
        is_rgb: a colour image, whose values lie in 0..255.
        path: of the file or series folder.
    """

    slices: np.ndarray
    geometry: Geometry
    modality: str | None
    is_rgb: bool
    path: str


@dataclass
class _Grid:
    """A file's content: array (n0, n1, n2, C) on its own grid, of which `native_shape` leaves out added axes."""

    array: np.ndarray
    native_shape: tuple[int, ...]
    affine: np.ndarray
    is_picture: bool = False
    is_rgb: bool = False
    modality: str | None = None
    # Only for pictures: 8 bits deep, and stored as JPEG.
    is_8_bit: bool = False
    is_jpeg: bool = False


def read_image(path: str | os.PathLike, slice_axis: str | int = "auto") -> MedicalImage:
    """Read an image in the orientation in which a radiologist looks at it.

    Axial slices have rows running to posterior and columns to the patient's left, and go from inferior to superior.
    Sagittal: rows to inferior, columns to posterior. Coronal: rows to inferior, columns to left. Pictures stay as
    they are, with Z = 1. Oblique volumes are turned to the closest of these by permutations and flips alone.

    Args:
        path: a NIfTI, NRRD, MetaImage, DICOM or picture file, or the folder of one DICOM series.
        slice_axis: canonical axis to slice along: 0 left (sagittal), 1 posterior (coronal), 2 superior (axial); or
            "auto", the axis whose spacing is at least 1.5 times the others', else 2. A grid that is one voxel thick
            along a single axis is always one slice.

    NaN and infinite voxels become the smallest finite value, with a warning that names the file.

    Raises:
        DataError: the file is missing, damaged, empty, without a finite value, or a series that is not one regular
            stack of slices.
    """
    grid = _read_grid(path)
    geometry = _geometry(grid, slice_axis)
    # Turned before it grows to 32 bits, and the file's own copy let go: a long CT is gigabytes.
    stored, grid.array = geometry._display(grid.array), None
    with np.errstate(over="ignore"):
        array = stored.astype(np.float32)
    del stored
    finite = np.isfinite(array)
    if not finite.all():
        if not finite.any():
            raise DataError(f"{path}: expected intensities, found no finite value; export the image again.")
        warnings.warn(
            f"{path}: {array.size - int(finite.sum())} of {array.size} values are NaN or infinite; they are read as "
            "the smallest finite value.",
            stacklevel=2,
        )
        array[~finite] = array[finite].min()
    slices = np.ascontiguousarray(np.moveaxis(array, 3, 1))
    return MedicalImage(slices, geometry, grid.modality, grid.is_rgb, str(path))


def read_label(path: str | os.PathLike, geometry: Geometry | None = None, slice_axis: str | int = "auto") -> np.ndarray:
    """Read a class map in its image's display orientation.

    Args:
        path: a label file of any format that `read_image` reads.
        geometry: of the image. The label may have its axes in another order or direction, as long as its voxels are
            the image's; for pictures only the size counts. Without it the label's own geometry is taken.
        slice_axis: as for `read_image`; used only without `geometry`.

    Returns:
        (Z, H, W) int64, 0 is background. An 8-bit picture of 0 and 255 alone is read as 0 and 1; a palette picture
        as its indices.

    Raises:
        DataError: the file can't be read, doesn't lie on the image's grid, or holds something else than class values.
    """
    grid = _read_grid(path, label=True)
    if grid.array.shape[3] != 1:
        raise DataError(
            f"{path}: expected a class map with one value per voxel, found {grid.array.shape[3]} channels; store the "
            "label as a single map of class values."
        )
    values = _class_values(path, grid)
    if geometry is None:
        return _geometry(grid, slice_axis)._display(values)
    return geometry._display(_align(path, values, grid, geometry))


def is_binary_255(path: str | os.PathLike) -> bool:
    """Whether a label is an 8-bit picture of 0 and 255 alone, so that outputs can be coded alike.

    Raises DataError if the file can't be read.
    """
    if _suffix(path) not in PICTURE_SUFFIXES:
        return False
    grid = _read_grid(path, label=True)
    return grid.is_8_bit and bool(np.isin(grid.array, (0, 255)).all() and (grid.array == 255).any())


def write_label(path: str | os.PathLike, labels: np.ndarray, geometry: Geometry, binary_255: bool = False) -> None:
    """Write a class map on the grid of the image that `geometry` comes from; whole or not at all.

    Args:
        path: ends in `output_suffix(geometry)`. Its folder is made if missing.
        labels: (Z, H, W) integers, 0..65535. Stored as 8 bits if they fit, else as 16.
        geometry: the image's. A volume keeps its shape and affine (mm; sform and qform set).
        binary_255: for pictures: store class 1 as 255.

    Raises:
        DataError: the shape is not the image's, a value doesn't fit, or the file can't be written.
    """
    path = Path(path)
    if labels.shape != geometry.shape:
        raise DataError(f"{path}: expected a class map of shape {geometry.shape}, found {labels.shape}.")
    if labels.dtype.kind not in "iub":
        raise DataError(f"{path}: expected integer class values, found {labels.dtype}.")
    if not str(path).lower().endswith(output_suffix(geometry)):
        raise DataError(f"{path}: expected a file name that ends in {output_suffix(geometry)}.")
    lowest, highest = int(labels.min()), int(labels.max())
    limit = 1 if binary_255 and geometry.is_picture else 65535
    if lowest < 0 or highest > limit:
        raise DataError(f"{path}: expected class values 0..{limit}, found {lowest}..{highest}.")
    native = geometry.to_native(labels).astype(np.uint8 if highest <= 255 else np.uint16)
    if not geometry.is_picture:
        image = nib.Nifti1Image(native, geometry.affine)
        _set_space(image.header, geometry)
    else:
        image = Image.fromarray(native * 255 if binary_255 else native)
    with writing(path, "a label") as part:
        image.save(part, format="PNG") if geometry.is_picture else nib.save(image, part)


def write_map(path: str | os.PathLike, values: np.ndarray, geometry: Geometry) -> None:
    """Write a map of real values on the grid of the image that `geometry` comes from, as float32; whole or not at all.

    Args:
        path: ends in `map_suffix(geometry)`. Its folder is made if missing.
        values: (Z, H, W) or, for several channels, (Z, C, H, W), of a floating-point type. Converted piece by piece, so
            that a large float16 map never exists as float32.
        geometry: the image's. A volume is written as NIfTI with its shape (X, Y, Z) or (X, Y, Z, C) and its affine; a
            picture as a TIFF with one page a channel.

    Raises:
        DataError: the shape is not the image's, or the file can't be written.
    """
    path = Path(path)
    if values.ndim not in (3, 4) or (values.shape[0], *values.shape[-2:]) != geometry.shape:
        raise DataError(f"{path}: expected a map of slices of shape {geometry.shape}, found {values.shape}.")
    if not str(path).lower().endswith(map_suffix(geometry)):
        raise DataError(f"{path}: expected a file name that ends in {map_suffix(geometry)}.")
    channels = [values] if values.ndim == 3 else list(values.swapaxes(0, 1))
    with writing(path, "a map") as part:
        if geometry.is_picture:
            pages = [Image.fromarray(geometry.to_native(channel).astype(np.float32)) for channel in channels]
            pages[0].save(part, format="TIFF", save_all=True, append_images=pages[1:], compression="tiff_deflate")
            return
        header = nib.Nifti1Header()
        header.set_data_dtype(np.float32)
        header.set_data_shape(geometry.native_shape if values.ndim == 3 else (*geometry._full_shape, len(channels)))
        _set_space(header, geometry)
        with nib.openers.Opener(part, "wb") as file:
            header.write_to(file)
            for channel in channels:
                array_to_file(geometry.to_native(channel), file, np.float32, offset=None)


def _set_space(header: nib.Nifti1Header, geometry: Geometry) -> None:
    header.set_xyzt_units("mm")
    header.set_qform(geometry.affine, code=1)
    header.set_sform(geometry.affine, code=1)


@contextmanager
def writing(path: str | os.PathLike, what: str) -> Iterator[Path]:
    """`sam2sgp.files.replacing` for a result, `what` ("a label"); raises DataError where it can't be written."""
    try:
        with replacing(path) as part:
            yield part
    except OSError as error:
        raise DataError(
            f"{path}: expected to write {what} there, found {error.strerror or error}; free some space or choose "
            "another folder."
        ) from error


def output_suffix(geometry: Geometry) -> str:
    """The suffix of a label written for an image of this geometry: ".png" for pictures, ".nii.gz" for volumes."""
    return OUTPUT_SUFFIX[geometry.is_picture]


def map_suffix(geometry: Geometry) -> str:
    """The suffix of a map of real values: ".tif" for pictures, ".nii.gz" for volumes."""
    return MAP_SUFFIX[geometry.is_picture]


def result_endings(path: str | os.PathLike, maps: Sequence[str] = (), dicom_seg: bool = False) -> list[str]:
    """What is added to a query's stem to name its results: its label, `maps` by name, and a DICOM segmentation."""
    picture = is_picture(path)
    endings = [OUTPUT_SUFFIX[picture], *(f"_{name}{MAP_SUFFIX[picture]}" for name in maps)]
    return endings + [".dcm"] * dicom_seg


def is_picture(path: str | os.PathLike) -> bool:
    """Whether an image is a picture, not a volume, by its name."""
    path = Path(path)
    return _suffix(path) in PICTURE_SUFFIXES and not path.is_dir()


def image_stem(path: str | os.PathLike) -> str:
    """File name without an image suffix (`.nii.gz` counts as one); of a DICOM series folder, the folder's name."""
    path = Path(path)
    suffix = _suffix(path)
    return path.name[: -len(suffix)] if suffix and not path.is_dir() else path.name


def is_image(path: str | os.PathLike) -> bool:
    """Whether a path is an image by its suffix, a DICOM file by content, or a folder that holds DICOM files."""
    path = Path(path)
    if path.name.startswith("."):
        return False
    if path.is_dir():
        return bool(dicom_files(path))
    return bool(_suffix(path)) or _has_dicom_magic(path)


def dicom_files(folder: str | os.PathLike) -> list[Path]:
    """The DICOM files directly in a folder, by name.

    DICOMDIR, segmentations (SEG), other files and subfolders are left out.
    """
    return [
        path
        for path in sorted(Path(folder).iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.name != "DICOMDIR"
        and is_dicom(path)
        and not is_dicom_seg(path)
    ]


def is_dicom(path: str | os.PathLike) -> bool:
    """Whether an image is DICOM: a folder, or a file by its suffix or, without one, by its content."""
    path = Path(path)
    suffix = _suffix(path)
    return path.is_dir() or suffix in DICOM_SUFFIXES or (not suffix and _has_dicom_magic(path))


def is_dicom_seg(path: str | os.PathLike) -> bool:
    """Whether a file is a DICOM Segmentation object, by its file meta information."""
    try:
        return pydicom.filereader.read_file_meta_info(path).get("MediaStorageSOPClassUID") == SegmentationStorage
    except Exception:  # whatever is wrong with a damaged file, reading it as an image tells
        return False


def dicom_headers(path: str | os.PathLike) -> list[pydicom.Dataset]:
    """Headers, without pixels, of a DICOM series folder or file, in the order of slices along the grid's third axis.

    Raises:
        DataError: as `read_image` does for a series that is not one regular stack of slices.
    """
    path = Path(path)
    return list(_dicom_stack(path, dicom_files(path) if path.is_dir() else [path])[0].values())


def _suffix(path: str | os.PathLike) -> str:
    """The known image suffix of a path, lower case, or ""."""
    name = Path(path).name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix) and name != suffix), "")


def _has_dicom_magic(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _read_grid(path: str | os.PathLike, label: bool = False) -> _Grid:
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: expected an image, found no such file or folder; check the path.")
    suffix = _suffix(path)
    try:
        if path.is_dir():
            grid = _read_dicom(path, dicom_files(path))
        elif suffix in NIFTI_SUFFIXES:
            grid = _read_nifti(path)
        elif suffix in ITK_SUFFIXES:
            grid = _read_itk(path)
        elif suffix in PICTURE_SUFFIXES:
            grid = _read_picture(path, label)
        elif suffix in DICOM_SUFFIXES or _has_dicom_magic(path):
            grid = _read_dicom(path, [path])
        else:
            raise DataError(
                f"{path}: expected NIfTI, NRRD, MetaImage, DICOM, PNG, JPEG, TIFF or BMP, found another kind of file; "
                "convert it to one of these."
            )
    except DataError:
        raise
    except Exception as error:
        # The libraries raise types of their own, and zlib's and struct's, for the same thing: a damaged file.
        found = " ".join(str(error).split())[-300:] or type(error).__name__
        raise DataError(
            f"{path}: expected a readable image, found that reading fails ({found}); check the file's permissions, or "
            "copy or export it again."
        ) from error
    if 0 in grid.array.shape:
        raise DataError(f"{path}: expected an image, found an empty grid {grid.native_shape}; export it again.")
    if not np.isfinite(grid.affine).all() or abs(np.linalg.det(grid.affine[:3, :3])) < 1e-12:
        raise DataError(
            f"{path}: expected an affine that gives each voxel a place and a size, found {_rounded(grid.affine)}; "
            "correct the file's header."
        )
    return grid


def _read_nifti(path: Path) -> _Grid:
    if _suffix(path) == ".nii.gz":
        # Through memory: gzip checks its sum only at the end of the stream, which nibabel alone doesn't reach.
        content = gzip.decompress(path.read_bytes())
        is_nifti2 = int.from_bytes(content[:4], "little") == 540 or int.from_bytes(content[:4], "big") == 540
        image = (nib.Nifti2Image if is_nifti2 else nib.Nifti1Image).from_bytes(content)
    else:
        image = nib.load(path)
    array = np.asanyarray(image.dataobj)
    if array.dtype.kind == "c":
        raise DataError(f"{path}: expected real intensities, found complex numbers; export magnitudes.")
    is_rgb = array.dtype.names is not None
    if is_rgb:
        array = np.stack([array[name] for name in array.dtype.names[:3]], -1)
    spatial = array.shape[: min(array.ndim - is_rgb, 3)]
    affine = image.affine.astype(np.float64)
    affine[:3] *= MM_PER_UNIT.get(image.header.get_xyzt_units()[0], 1.0)
    return _Grid(_with_channels(array, spatial), spatial, affine, is_rgb=is_rgb)


def _read_itk(path: Path) -> _Grid:
    with _ITK_LOCK:
        reader_io = itk.ImageIOFactory.CreateImageIO(str(path), itk.CommonEnums.IOFileMode_ReadMode)
        if reader_io is None:
            raise DataError(f"{path}: expected an NRRD or MetaImage file, found another content; export it again.")
        image, array = _itk_array(path, reader_io)
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
    return _Grid(_with_channels(array, spatial), spatial, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine, is_rgb=is_rgb)


def _itk_array(path: Path, reader_io) -> tuple:
    reader_io.SetFileName(str(path))
    reader_io.ReadImageInformation()
    component = reader_io.GetComponentTypeAsString(reader_io.GetComponentType())
    exact_as_float = component in ("float", "char", "unsigned_char", "short", "unsigned_short")
    kind = itk.Image if reader_io.GetNumberOfComponents() == 1 else itk.VectorImage
    image_type = kind[itk.F if exact_as_float else itk.D, reader_io.GetNumberOfDimensions()]
    reader = itk.ImageFileReader[image_type].New(FileName=str(path), ImageIO=reader_io)
    reader.Update()
    return reader.GetOutput(), itk.array_from_image(reader.GetOutput())


def _with_channels(array: np.ndarray, spatial: tuple[int, ...]) -> np.ndarray:
    """(n0, n1[, n2][, ...]) -> (n0, n1, n2, C)."""
    channels = int(np.prod(array.shape[len(spatial) :], dtype=int))
    return array.reshape(*spatial, *(1,) * (3 - len(spatial)), channels)


def _read_picture(path: Path, label: bool) -> _Grid:
    with Image.open(path) as image:
        if image.format == "TIFF" and image.n_frames > 1:
            raise DataError(
                f"{path}: expected one picture, found {image.n_frames} pages; store each page as a picture, or the "
                "stack as a NIfTI volume."
            )
        # Known only before the pixels are decoded.
        arguments = image.tile[0].args if image.tile else ""
        stored_as = str(arguments if isinstance(arguments, str) else arguments[0])
        image.load()
        is_jpeg = image.format in ("JPEG", "MPO")
        array = _picture_label(path, image, stored_as) if label else _picture_image(image)
    is_8_bit = array.dtype == np.uint8
    channels = 1 if array.ndim == 2 else array.shape[2]
    return _Grid(
        array.reshape(*array.shape[:2], 1, channels),
        array.shape[:2],
        np.eye(4),
        is_picture=True,
        is_rgb=channels == 3,
        is_8_bit=is_8_bit,
        is_jpeg=is_jpeg,
    )


def _picture_image(image: Image.Image) -> np.ndarray:
    if image.mode in ("LA", "La"):
        return np.asarray(image.getchannel(0))
    if image.mode in ("1", "L", "F") or image.mode.startswith("I"):
        return _grey(image)
    if image.mode in ("P", "PA"):
        # By way of RGBA, because Pillow warns of palettes with transparency otherwise.
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))


def _picture_label(path: Path, image: Image.Image, stored_as: str) -> np.ndarray:
    if image.mode in ("1", "P", "F") or image.mode.startswith("I"):
        return _grey(image)
    if ";16" in stored_as:
        raise DataError(
            f"{path}: expected a class map, found colours or transparency of 16 bits; store it as grey, 8 or 16 bits."
        )
    if image.mode in ("L", "LA", "La", "PA"):
        values = np.asarray(image.getchannel(0))
        # Pillow stretches grey values of 2 and 4 bits to 0..255.
        low_depth = re.match(r"L;([24])", stored_as)
        return values // (255 // (2 ** int(low_depth[1]) - 1)) if low_depth else values
    colours = np.asarray(image.convert("RGB"))
    if (colours != colours[..., :1]).any():
        raise DataError(
            f"{path}: expected a class map, found a colour picture; store class values as grey or palette indices."
        )
    return colours[..., 0]


def _grey(image: Image.Image) -> np.ndarray:
    """Pixels of a one-channel picture as stored, where Pillow alone gets TIFF's rarer codings wrong."""
    array = np.asarray(image)
    if image.format == "TIFF":
        bits, photometric = image.tag_v2.get(258, (1,))[0], image.tag_v2.get(262)
        if array.dtype == np.int32 and bits == 32 and image.tag_v2.get(339, (1,))[0] == 1:
            array = array.view(np.uint32)
        if array.dtype.kind == "u" and bits == 16 and photometric == 0:
            array = 65535 - array
    return array


def _read_dicom(path: Path, files: list[Path]) -> _Grid:
    """The one series in `files` as a stack of slices, or a single file."""
    headers, step = _dicom_stack(path, files)
    first = next(iter(headers.values()))
    orientation = _orientation(first)
    row_spacing, column_spacing = (
        float(value) for value in first.get("PixelSpacing") or first.get("ImagerPixelSpacing") or (1.0, 1.0)
    )
    affine = np.eye(4)
    affine[:3, 0] = orientation[:3] * column_spacing
    affine[:3, 1] = orientation[3:] * row_spacing
    affine[:3, 2] = step
    affine[:3, 3] = first.get("ImagePositionPatient") or (0.0, 0.0, 0.0)
    pixels = np.concatenate([_dicom_pixels(file) for file in headers])
    array = pixels.transpose(2, 1, 0, 3)
    modality = str(first.get("Modality") or "") or None
    is_rgb = array.shape[3] == 3
    return _Grid(array, array.shape[:3], np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine, is_rgb=is_rgb, modality=modality)


def _dicom_stack(path: Path, files: list[Path]) -> tuple[dict[Path, pydicom.Dataset], np.ndarray]:
    """Headers of the one series in `files` in the order of its slices, and the step (3,) in mm from one to the next.

    Raises DataError unless they are one regular stack of slices, or a single file.
    """
    headers = {file: _dicom_header(file) for file in files}
    headers = {file: header for file, header in headers.items() if "Rows" in header}
    if not headers:
        raise DataError(f"{path}: expected a DICOM series, found no DICOM image; check the path.")
    _check_one_series(path, list(headers.values()))
    for file, header in headers.items():
        _check_kind(file, header)
    first = next(iter(headers.values()))
    orientation = _orientation(first)
    normal = np.cross(orientation[:3], orientation[3:])
    if len(headers) > 1:
        order, step = _stack(path, headers, normal)
        return {file: headers[file] for file in order}, step
    is_film = int(first.get("NumberOfFrames") or 1) > 1
    thickness = 0.0 if is_film else float(first.get("SpacingBetweenSlices") or first.get("SliceThickness") or 0.0)
    return headers, normal * (abs(thickness) or 1.0)


def _orientation(header: pydicom.Dataset) -> np.ndarray:
    """Directions (6,) of a row and of a column, LPS; those of an axial slice where the header has none."""
    return np.asarray(header.get("ImageOrientationPatient") or (1, 0, 0, 0, 1, 0), dtype=float)


def _dicom_header(file: Path) -> pydicom.Dataset:
    try:
        return pydicom.dcmread(file, stop_before_pixels=True)
    except Exception as error:
        raise DataError(
            f"{file}: expected a DICOM file, found a damaged one or another format ({error}); copy it again."
        ) from error


def _check_one_series(path: Path, headers: list[pydicom.Dataset]) -> None:
    series: dict[str, list] = defaultdict(list)
    for header in headers:
        series[str(header.get("SeriesInstanceUID"))].append(header)
    if len(series) > 1:
        listed = "; ".join(
            f"{uid} ({group[0].get('Modality', '?')}, {group[0].get('SeriesDescription', 'no description')}, "
            f"{len(group)} files)"
            for uid, group in sorted(series.items())
        )
        raise DataError(
            f"{path}: expected one DICOM series, found {len(series)}: {listed}; put each series in a folder of its own."
        )


def _check_kind(file: Path, header: pydicom.Dataset) -> None:
    modality = header.get("Modality")
    if modality == "SEG":
        raise DataError(f"{file}: expected an image, found a DICOM segmentation; convert it to a NIfTI class map.")
    frames = int(header.get("NumberOfFrames") or 1)
    if "PerFrameFunctionalGroupsSequence" in header or (frames > 1 and modality not in CINE_MODALITIES):
        raise DataError(
            f"{file}: expected one slice per file, found a multi-frame object of {frames} frames; convert it to NIfTI "
            "or to a classic series."
        )


def _stack(path: Path, headers: dict[Path, pydicom.Dataset], normal: np.ndarray) -> tuple[list[Path], np.ndarray]:
    """Files in the order of their positions along the normal, and the step in mm from one to the next.

    Raises DataError unless they are one regular stack of equal slices.
    """
    for name, what in (
        ("ImagePositionPatient", "slice positions"),
        ("ImageOrientationPatient", "a slice orientation"),
        ("PixelSpacing", "a pixel spacing"),
    ):
        lacking = [file.name for file, header in headers.items() if not header.get(name)]
        if lacking:
            raise DataError(
                f"{path}: expected {what} in each file of the series, found none in {lacking[0]} ({len(lacking)} of "
                f"{len(headers)} files); if these are separate images, give each file by itself."
            )
    first = next(iter(headers.values()))
    for name, tolerance in (("Rows", 0), ("Columns", 0), ("PixelSpacing", 1e-4), ("ImageOrientationPatient", 1e-3)):
        expected = np.asarray(first.get(name), dtype=float)
        for file, header in headers.items():
            found = np.asarray(header.get(name), dtype=float)
            if found.shape != expected.shape or np.abs(found - expected).max() > tolerance:
                raise DataError(
                    f"{path}: expected slices of one size and orientation, found {name} {found.tolist()} in "
                    f"{file.name} but {expected.tolist()} in others; remove scouts and other series."
                )
    places = {file: np.asarray(header.ImagePositionPatient, dtype=float) for file, header in headers.items()}
    order = sorted(places, key=lambda file: places[file] @ normal)
    heights = np.array([places[file] @ normal for file in order])
    gaps = np.diff(heights)
    usual = float(np.median(gaps[gaps > 1e-3])) if (gaps > 1e-3).any() else 0.0
    for index in np.flatnonzero(gaps <= max(SLICE_GAP_TOLERANCE * usual, 1e-3)):
        raise DataError(
            f"{path}: expected each slice position once, found {order[index].name} and {order[index + 1].name} both at "
            f"{heights[index]:.2f} mm; remove the duplicates, or split the series by time or echo."
        )
    for index in np.flatnonzero(np.abs(gaps - usual) > SLICE_GAP_TOLERANCE * usual):
        raise DataError(
            f"{path}: expected slices {usual:.2f} mm apart, found a gap of {gaps[index]:.2f} mm between "
            f"{order[index].name} and {order[index + 1].name}; a slice is missing or the spacing is irregular: export "
            "the whole series again."
        )
    step = (places[order[-1]] - places[order[0]]) / (len(order) - 1)
    strays = max(np.linalg.norm(places[file] - places[order[0]] - step * n) for n, file in enumerate(order))
    tilt = np.linalg.norm(step - (step @ normal) * normal)
    if tilt > SHEAR_TOLERANCE * usual or strays > 2 * SLICE_GAP_TOLERANCE * usual:
        raise DataError(
            f"{path}: expected slices stacked evenly along their normal, found them shifted sideways by {tilt:.2f} mm "
            f"each and up to {strays:.2f} mm out of line (tilted gantry?); resample the series to a rectangular grid."
        )
    return order, step


def _dicom_pixels(file: Path) -> np.ndarray:
    """(frames, rows, columns, C) float32: rescaled (HU for CT), MONOCHROME1 inverted, colours as RGB of 0..255."""
    dataset = pydicom.dcmread(file)
    frames = int(dataset.get("NumberOfFrames") or 1)
    samples = int(dataset.get("SamplesPerPixel") or 1)
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_compressed and syntax != RLELossless:
        # GDCM knows every codec, and rescales, inverts and converts colours itself. Uncompressed MONOCHROME1 of 12
        # bits it refuses, so those files go through pydicom.
        with _ITK_LOCK:
            _, pixels = _itk_array(file, itk.GDCMImageIO.New())
        channels = pixels.size // (frames * dataset.Rows * dataset.Columns)
        return pixels.reshape(frames, dataset.Rows, dataset.Columns, channels).astype(np.float32)
    pixels = dataset.pixel_array
    photometric = dataset.PhotometricInterpretation
    if photometric == "PALETTE COLOR":
        pixels, samples = apply_color_lut(pixels, dataset)[..., :3], 3
        if pixels.dtype == np.uint16:
            pixels = pixels / 257.0
    elif samples == 3:
        pixels = convert_color_space(pixels, photometric, "RGB") if photometric != "RGB" else pixels
    else:
        if photometric == "MONOCHROME1":
            # Lowest plus highest storable value: 2 ** bits - 1 unsigned, -1 signed.
            turning_point = -1.0 if dataset.PixelRepresentation else 2.0**dataset.BitsStored - 1
            pixels = turning_point - pixels
        pixels = pixels * float(dataset.get("RescaleSlope") or 1.0) + float(dataset.get("RescaleIntercept") or 0.0)
    return pixels.reshape(frames, dataset.Rows, dataset.Columns, samples).astype(np.float32)


def _geometry(grid: _Grid, slice_axis: str | int) -> Geometry:
    if slice_axis not in ("auto", 0, 1, 2):
        raise ConfigError(f"slice_axis: expected 'auto', 0, 1 or 2, found {slice_axis!r}.")
    if grid.is_picture:
        return Geometry(grid.native_shape, grid.affine, True, (2, 0, 1), (False, False, False), 2)
    orientation = io_orientation(np.diag([-1.0, -1.0, 1.0, 1.0]) @ grid.affine)
    native = np.argsort(orientation[:, 0])
    against = orientation[native, 1] < 0
    sizes = np.linalg.norm(grid.affine[:3, :3], axis=0)[native]
    flat = [axis for axis in range(3) if grid.array.shape[native[axis]] == 1]
    if len(flat) == 1:
        chosen = flat[0]
    elif slice_axis != "auto":
        chosen = int(slice_axis)
    else:
        thickest = int(np.argmax(sizes))
        others = np.delete(sizes, thickest)
        chosen = thickest if sizes[thickest] >= THICK_AXIS_RATIO * np.median(others) else 2
    # Canonical axes (0 left, 1 posterior, 2 superior) of (slice, row, column); rows of upright views run downwards.
    canonical, downwards = {0: ((0, 2, 1), True), 1: ((1, 2, 0), True), 2: ((2, 1, 0), False)}[chosen]
    axes = tuple(int(native[axis]) for axis in canonical)
    flips = tuple(bool(against[axis]) != (row and downwards) for axis, row in zip(canonical, (0, 1, 0), strict=True))
    return Geometry(grid.native_shape, grid.affine, False, axes, flips, chosen)


def _class_values(path: str | os.PathLike, grid: _Grid) -> np.ndarray:
    """(n0, n1, n2) int64 class values of a label's grid."""
    values = grid.array[..., 0]
    if values.dtype.kind == "f":
        finite = np.isfinite(values)
        whole = np.round(values)
        if not finite.all() or (np.abs(values - whole) > 1e-3).any():
            example = values[~finite | (np.abs(np.where(finite, values - whole, 0)) > 1e-3)].flat[0]
            raise DataError(
                f"{path}: expected whole class values, found {example:g}; a probability map or a lossy mask isn't a "
                "class map: threshold it and store whole numbers."
            )
        values = whole
    values = values.astype(np.int64)
    if values.min() < 0:
        raise DataError(f"{path}: expected class values from 0 (background) up, found {values.min()}; renumber them.")
    if grid.is_8_bit:
        found = np.unique(values)
        if np.isin(found, (0, 255)).all():
            return values // 255
        if grid.is_jpeg:
            raise DataError(
                f"{path}: expected a class map, found a JPEG of {len(found)} values; lossy compression blurs class "
                "values: threshold the mask and store it as PNG."
            )
        if found[-1] == 255 and len(found) >= BLURRED_MASK_VALUES:
            raise DataError(
                f"{path}: expected a class map, found {len(found)} values from {found[0]} to 255; this looks like a "
                "blurred mask or a photograph: threshold it and store whole class values."
            )
    return values


def _align(path: str | os.PathLike, values: np.ndarray, grid: _Grid, geometry: Geometry) -> np.ndarray:
    """A label's values (n0, n1, n2) on the image's own grid, found by permuting and flipping axes.

    Raises DataError if no order of axes lays the label's voxels on the image's.
    """
    if grid.is_picture != geometry.is_picture:
        same_view = geometry.axes == (2, 1, 0) and not any(geometry.flips) and geometry.shape[0] == 1
        if grid.is_picture and not same_view:
            raise DataError(
                f"{path}: expected a label with the affine of its volume, found a picture; store the label as NIfTI."
            )
        # Both ITK and MONAI store a picture's columns as the first axis of a volume, whatever affine they give it.
        values = values.transpose(1, 0, 2)
    shape = geometry._full_shape
    if grid.is_picture or geometry.is_picture:
        if values.shape != shape:
            raise _wrong_size(path, geometry, values.shape)
        return values
    # In image voxels: where do the label's corners lie?
    to_voxel = np.linalg.inv(geometry.affine) @ grid.affine
    corners = np.array(list(product(*((0, length - 1) for length in shape))), dtype=float)
    best, best_offset = None, np.inf
    for order in permutations(range(3)):
        if tuple(values.shape[axis] for axis in order) != shape:
            continue
        for flips in product((False, True), repeat=3):
            index = np.empty_like(corners)
            index[:, order] = np.where(flips, np.array(shape) - 1 - corners, corners)
            offset = np.abs(index @ to_voxel[:3, :3].T + to_voxel[:3, 3] - corners).max()
            if offset < best_offset:
                best, best_offset = (order, flips), offset
    if best is None:
        raise _wrong_size(path, geometry, grid.native_shape)
    if best_offset > GRID_TOLERANCE:
        raise DataError(
            f"{path}: expected the label on its image's grid, found corners up to {best_offset:.2f} voxels away "
            f"(affine of the label {_rounded(grid.affine)}, of the image {_rounded(geometry.affine)}); resample the "
            "label to the image."
        )
    order, flips = best
    return np.flip(values.transpose(order), [axis for axis in range(3) if flips[axis]])


def _wrong_size(path: str | os.PathLike, geometry: Geometry, found: tuple[int, ...]) -> DataError:
    expected, got = ("x".join(str(length) for length in shape) for shape in (geometry._full_shape, found))
    return DataError(
        f"{path}: expected a label of its image's size {expected}, found {got}; check that it belongs to this image, "
        "or resample it."
    )


def _rounded(affine: np.ndarray) -> list:
    return np.round(affine[:3], 3).tolist()
