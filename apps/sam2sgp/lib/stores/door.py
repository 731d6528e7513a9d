"""Files of clients, before they are kept or read: each is parsed once, and what is kept is what was parsed.

In: a file that a client sent, or a member of a packed file. Out: a file whose content is of the kind of its name,
stands by itself and fits in memory, or an error of one sentence. It is the client's own, byte for byte, where the
format leaves nothing to interpret; else it is written again from what was understood:

    NIfTI                   a fixed header that can't refer to anything: kept
    NRRD, MetaImage         a text header: written again with the known fields, voxels and segment names as sent
    DICOM                   kept, but for a preamble of 128 bytes, which means nothing to DICOM and much to others
    PNG, JPEG, TIFF, BMP    kept; only the named format's decoder ever sees them

Volumes are unpacked piece by piece and not kept, pictures in a process of their own. Header and file must agree about
the size of the voxels, and the memory that these take as float32 is bounded: see `sam2sgp.data.io.limits`. All
functions may be called from several threads at once.
"""

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pydicom

from lib.checks import RequestError, TooLarge, UnsupportedFile, supported_suffix
from sam2sgp.data.io import ITK_SUFFIXES, NIFTI_SUFFIXES, PICTURE_SUFFIXES, dicom_files, is_dicom
from sam2sgp.data.io.decoding import decode_picture
from sam2sgp.data.io.dicom_file import frame_shape, open_dicom, samples_of
from sam2sgp.data.io.formats import PICTURE_FORMATS, has_dicom_magic
from sam2sgp.data.io.itk import raw_header
from sam2sgp.data.io.labels import LABEL_BYTES
from sam2sgp.data.io.limits import BYTES_IN_MEMORY, SMALL_ENOUGH
from sam2sgp.data.io.nifti_file import check_nifti, nifti_header
from sam2sgp.errors import DataError, FormatError, TooLargeError

HDF5 = b"\x89HDF\r\n\x1a\n"
# A container's signature may stand behind a block of any content whose size is a power of two.
SMALLEST_BLOCK = 512
DICOM = b"DICM"
PREAMBLE = 128


class ImageTooLarge(TooLarge):
    """A file promises more voxels than the server takes; the file itself isn't too large."""

    status = 422


class NoImage(UnsupportedFile):
    """A DICOM object without pixels, such as an archive's table of contents."""


@contextmanager
def admitted(path: str | Path, limit: int, name: str | None = None, label: bool = False) -> Iterator[Path]:
    """The path of an upload that may be kept and read: the given one, or one that goes when the block ends.

    Args:
        path: of the uploaded file.
        limit: bytes that its voxels may take as float32.
        name: what to call it in errors and to take the suffix from; by default the path's own name.
        label: a class map, which may have shrunk more than an image can.

    Raises:
        UnsupportedFile: another content than the suffix says, one that refers to further files, or not written as the
            format demands.
        ImageTooLarge: its voxels take more than `limit` bytes.
        DataError: it promises voxels that it doesn't hold.
    """
    path, name = Path(path), name or Path(path).name
    # The slices of a series often have names without a suffix.
    suffix = ".dcm" if is_dicom(path) else supported_suffix(name)
    with ExitStack() as stack:
        kept = path
        with _refusing(path, name):
            _check_signatures(path, name, suffix)
            if suffix in ITK_SUFFIXES:
                header = raw_header(path)
                header.check(label=label, limit=limit)
                kept = _another(stack, suffix)
                header.save(kept)
            elif suffix in NIFTI_SUFFIXES:
                check_nifti(path, label, limit)
            elif suffix in PICTURE_FORMATS:
                decode_picture(path, label, [PICTURE_FORMATS[suffix]], limit)
            else:
                _check_dicom(path, limit)
                if _has_preamble(path):
                    kept = _another(stack, suffix)
                    _copy_without_preamble(path, kept)
        yield kept


def _another(stack: ExitStack, suffix: str) -> Path:
    """A path to write to. Its folder is made only where it is needed: of a series' thousands of files few need it."""
    return Path(stack.enter_context(tempfile.TemporaryDirectory()), f"content{suffix}")


def label_limit(image: str | Path, limit: int) -> int:
    """Bytes that a label may take as float32: no more than one that `read_label` takes for this image.

    Class maps shrink by so much that a label may promise anything, and unpacking that would take long. So the image's
    header is looked at first.

    Args:
        image: of the server's own, a file or a folder of DICOM files.
        limit: for any image.
    """
    image = Path(image)
    suffix = "" if image.is_dir() else supported_suffix(image)
    try:
        if suffix in ITK_SUFFIXES:
            voxels = math.prod(raw_header(image, detached=True).shape)
        elif suffix in NIFTI_SUFFIXES:
            voxels = math.prod(nifti_header(image, limit=limit).get_data_shape())
        elif suffix in PICTURE_SUFFIXES:
            return limit
        else:
            files = dicom_files(image) if image.is_dir() else [image]
            voxels = sum(math.prod(frame_shape(_dicom_header(file, limit))) for file in files)
    except (DataError, AttributeError):
        # What is wrong with the image is said where it is read.
        return limit
    return min(limit, max(SMALL_ENOUGH, voxels * LABEL_BYTES))


def admit(path: Path, limit: int) -> None:
    """Judge an upload of the server's own, in place: see `admitted`."""
    with admitted(path, limit) as content:
        if content != path:
            shutil.copyfile(content, path)


def check_instance(path: Path, limit: int) -> pydicom.Dataset:
    """The header of a DICOM file that comes from an archive, judged as `admitted` does, which raises the same."""
    with _refusing(path, path.name):
        return _dicom_header(path, limit)


def check_series(folder: Path, limit: int, name: str) -> None:
    """Judge all files of a series together. Raises ImageTooLarge where they take more memory than `limit`."""
    headers = [check_instance(file, limit) for file in folder.iterdir()]
    images = [header for header in headers if "Rows" in header]
    taken = sum(math.prod(frame_shape(header)) * samples_of(header) for header in images) * BYTES_IN_MEMORY
    if taken > limit:
        raise ImageTooLarge(
            f"{name}: expected at most {limit >> 20} MB of voxels, found {taken >> 20} MB; split the series."
        )


def _check_dicom(path: Path, limit: int) -> None:
    """Judge a DICOM file."""
    if "Rows" not in _dicom_header(path, limit):
        raise NoImage(f"{path.name}: expected a DICOM image, found an object without pixels; leave it out.")


def _has_preamble(path: Path) -> bool:
    """Whether there is anything in the preamble of a DICOM file."""
    if not has_dicom_magic(path):
        return False  # It begins with its first element.
    with open(path, "rb") as file:
        return any(file.read(PREAMBLE))


def _copy_without_preamble(path: Path, target: Path) -> None:
    shutil.copyfile(path, target)
    with open(target, "r+b") as copy:
        copy.write(bytes(PREAMBLE))


def _dicom_header(path: Path, limit: int) -> pydicom.Dataset:
    try:
        return open_dicom(path, limit=limit)
    except DataError:
        raise
    except Exception as error:
        # pydicom raises struct's, zlib's and its own types for a file that isn't DICOM.
        raise FormatError(
            f"{path}: expected the content of DICOM, found another ({error}); export it again."
        ) from error


def _check_signatures(path: Path, name: str, suffix: str) -> None:
    """Refuse files that other programs take for something else than their name says."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = 0
        while start < size:
            file.seek(start)
            if file.read(len(HDF5)) == HDF5:
                raise FormatError(f"{name}: expected {suffix} only, found that it is HDF5 too; export it again.")
            start = max(2 * start, SMALLEST_BLOCK)
        file.seek(PREAMBLE)
        if suffix != ".dcm" and file.read(len(DICOM)) == DICOM:
            raise FormatError(f"{name}: expected {suffix} only, found that it is DICOM too; export it again.")


@contextmanager
def _refusing(path: Path, name: str) -> Iterator[None]:
    """Errors get the name under which the client knows the file, and a status of their own."""
    try:
        yield
    except RequestError:
        raise
    except DataError as error:
        kind = {FormatError: UnsupportedFile, TooLargeError: ImageTooLarge}.get(type(error), DataError)
        raise kind(str(error).replace(str(path), name)) from error
