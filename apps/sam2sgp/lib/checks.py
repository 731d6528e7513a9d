"""What a client may send: names, tags and files, judged before anything is read, written or deleted.

In: strings and uploaded files. Out: the same string, or an error of one sentence that carries its HTTP status. Nothing
here touches the datastore. All functions may be called from several threads at once.
"""

import gzip
import os
import re
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian

from sam2sgp.data.io import ITK_SUFFIXES, NIFTI_SUFFIXES, PICTURE_SUFFIXES, SUFFIXES, is_dicom
from sam2sgp.errors import DataError

# File systems allow 255 bytes for a name, of which the suffix and the temporary folder's own letters take some.
LONGEST_ID = 180
LONGEST_FILE_NAME = 255
TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]{0,63}")
UID = re.compile(r"(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*))+")
LONGEST_UID = 64
# What names a segment in DICOM, where a backslash separates values and spaces at the ends are no part of them.
LONGEST_CLASS_NAME = 64
# Class maps are kept in files of 16 bits.
LARGEST_CLASS = 65535
MOST_CLASSES = 1024
# An upload may unpack to this many times the limit of uploads: labels compress by far more than images.
UNPACKED_PER_UPLOAD = 8
CHUNK = 1 << 20
# Text headers of NRRD and MetaImage files end long before this.
LONGEST_HEADER = 1 << 16
PICTURE_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
}
ITEM_SIZES = {"char": 1, "uchar": 1, "int8": 1, "uint8": 1, "short": 2, "ushort": 2, "int16": 2, "uint16": 2}


class RequestError(DataError):
    """What a client asks for can't be done as it is."""

    status = 400


class Forbidden(RequestError):
    """The server's settings don't allow it."""

    status = 403


class NotFound(RequestError):
    """There is no such image, label or session."""

    status = 404


class Conflict(RequestError):
    """It would replace or mix up something that is already there."""

    status = 409


class TooLarge(RequestError):
    """An upload, or what it unpacks to, is larger than the server takes."""

    status = 413


class UnsupportedFile(RequestError):
    """A file's content isn't what its name says, or of no supported kind."""

    status = 415


class BadLabel(RequestError):
    """A label doesn't fit its image or holds undeclared values."""

    status = 422


class Stalled(RequestError):
    """A request's body comes too slowly or not at all."""

    status = 408


class StorageError(RequestError):
    """The disk is full or the folder can't be written."""

    status = 507


def check_id(text: str, what: str = "image id") -> str:
    """The id itself, which is the stem of one file's name.

    Raises RequestError for anything that could lead elsewhere or that a file system can't hold: separators, a leading
    dot, control characters, broken UTF-8, more than `LONGEST_ID` bytes.
    """
    return _check_name(text, what, LONGEST_ID)


def check_file_name(text: str, what: str = "file name") -> str:
    """The name itself, without any folder. Raises RequestError as `check_id` does."""
    return _check_name(text, what, LONGEST_FILE_NAME)


def check_tag(text: str) -> str:
    """A label's tag as a plain string: a letter or digit, then up to 63 of letters, digits, `_`, `+` and `-`."""
    tag = text.value if isinstance(text, Enum) else text
    if not isinstance(tag, str) or not TAG.fullmatch(tag):
        raise RequestError(
            f"label tag {_shown(tag)}: expected up to 64 letters, digits, '_', '+' or '-', such as 'final'; correct it."
        )
    return tag


def check_uid(text: str, what: str = "image id") -> str:
    """A DICOM UID as it is: numbers joined by dots, at most 64 characters."""
    if not isinstance(text, str) or len(text) > LONGEST_UID or not UID.fullmatch(text):
        raise RequestError(f"{what} {_shown(text)}: expected a DICOM UID such as 1.2.840.1; take an id from the list.")
    return text


def check_label_info(entries: object) -> None:
    """The classes that come with a label, `[{"idx": value, "name": text}]`, as far as they are read.

    Raises RequestError for a value or a name that some file, archive or viewer can't hold.
    """
    if not isinstance(entries, list):
        return
    if len(entries) > MOST_CLASSES:
        raise RequestError(f"label_info: expected at most {MOST_CLASSES} classes, found {len(entries)}; send fewer.")
    for entry in entries:
        if not isinstance(entry, dict):
            continue
        value, name = entry.get("idx"), entry.get("name")
        if isinstance(value, int) and value > LARGEST_CLASS:
            raise RequestError(f"label_info: expected values up to {LARGEST_CLASS}, found {_shown(value)}; correct it.")
        if not name or isinstance(name, int | float):
            continue
        if not isinstance(name, str) or clean_class_name(name) != name:
            raise RequestError(
                f"label_info: expected class names of up to {LONGEST_CLASS_NAME} printable characters without "
                f"backslashes and outer spaces, found {_shown(name)}; rename the class."
            )


def clean_class_name(text: str) -> str:
    """A class name as close as possible to a text from elsewhere."""
    kept = "".join(letter if letter.isprintable() else " " for letter in text.replace("\\", "/"))
    return kept.strip()[:LONGEST_CLASS_NAME].strip()


def suffix_of(name: str | Path) -> str:
    """The supported suffix that a file name ends in, in lower case. Raises UnsupportedFile if there is none."""
    lower = Path(name).name.lower()
    suffix = next((suffix for suffix in SUFFIXES if lower.endswith(suffix)), None)
    if suffix is None:
        raise UnsupportedFile(f"{_shown(Path(name).name)}: expected a name that ends in one of {', '.join(SUFFIXES)}.")
    if suffix in (".nhdr", ".img"):
        raise UnsupportedFile(
            f"{_shown(Path(name).name)}: expected an image in one file, found its header or its voxels only; send it "
            "as .nrrd or .nii.gz."
        )
    return suffix


def check_content(path: str | Path, limit: int, name: str | None = None) -> None:
    """Compare a file's content with its suffix and its unpacked size with `limit` (bytes), without unpacking it.

    Args:
        path: of the uploaded file.
        limit: how many bytes its voxels may take.
        name: what to call it in errors and to take the suffix from; by default the path's own name.

    Raises:
        UnsupportedFile: another content than the suffix says, or one that refers to further files.
        TooLarge: more than `limit` bytes when unpacked.
    """
    path, name = Path(path), name or Path(path).name
    # The slices of a series often have names without a suffix.
    suffix = "" if is_dicom(path) else suffix_of(name)
    if suffix in NIFTI_SUFFIXES:
        size = _nifti_size(path, name, suffix, limit)
    elif suffix in ITK_SUFFIXES:
        size = _itk_size(path, name, suffix)
    elif suffix in PICTURE_SUFFIXES:
        size = _picture_size(path, name, suffix)
    else:
        size = _dicom_size(path, name)
    if size > limit:
        raise TooLarge(f"{name}: expected at most {limit >> 20} MB of voxels, found {size >> 20} MB; crop the image.")


def unpacked_limit(max_upload_mb: float) -> int:
    """Bytes that an upload may unpack to."""
    return int(max_upload_mb * UNPACKED_PER_UPLOAD * (1 << 20))


@contextmanager
def discarding_if_refused(path: str) -> Iterator[None]:
    """Delete a temporary file if it is refused: MONAI Label's handlers remove an upload only where all went well."""
    try:
        yield
    except BaseException:
        if os.path.dirname(os.path.abspath(path)) == os.path.abspath(tempfile.gettempdir()):
            Path(path).unlink(missing_ok=True)
        raise


def _check_name(text: str, what: str, longest: int) -> str:
    problem = None
    if not isinstance(text, str) or not text:
        problem = "a name"
    else:
        try:
            length = len(text.encode())
        except UnicodeEncodeError:
            length, problem = 0, "valid UTF-8"
        if length > longest:
            problem = f"at most {longest} bytes"
        elif any(letter in "/\\" for letter in text):
            problem = "a name without folders"
        elif not text.isprintable():
            problem = "printable characters"
        elif text[0] == "." or text != text.strip():
            problem = "a name that begins with neither dot nor space"
    if problem:
        raise RequestError(f"{what} {_shown(text)}: expected {problem}; take an id or name from the list of images.")
    return text


def _shown(text: object) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _unlike(name: str, kind: str) -> UnsupportedFile:
    return UnsupportedFile(f"{name}: expected the content of {kind}, found another; export the file again.")


def _nifti_size(path: Path, name: str, suffix: str, limit: int) -> int:
    if suffix == ".nii":
        with open(path, "rb") as file:
            head, size = file.read(540), path.stat().st_size
    else:
        head, size = _inflated(path, name, limit)
        if size > limit:
            return size
    little = {348: b"n+1\0", 540: b"n+2\0"}
    for order in ("little", "big"):
        length = int.from_bytes(head[:4], order)
        magic = head[344:348] if length == 348 else head[4:8]
        if length in little and magic == little[length]:
            return max(size, _nifti_voxels(head, length, order))
    raise _unlike(name, "a NIfTI file")


def _nifti_voxels(head: bytes, length: int, order: str) -> int:
    """Bytes that the header claims."""
    sign = "<" if order == "little" else ">"
    if length == 348:
        dims, bits = np.frombuffer(head, f"{sign}i2", 8, 40), int(np.frombuffer(head, f"{sign}i2", 1, 72)[0])
    else:
        dims, bits = np.frombuffer(head, f"{sign}i8", 8, 16), int(np.frombuffer(head, f"{sign}i2", 1, 14)[0])
    return _product(dims[1 : 1 + max(0, min(int(dims[0]), 7))]) * abs(bits) // 8


def _inflated(path: Path, name: str, limit: int) -> tuple[bytes, int]:
    """The first bytes of a gzip file and its unpacked size, or what was reached of it beyond `limit`."""
    head, size = b"", 0
    try:
        with gzip.open(path) as file:
            while size <= limit and (data := file.read(CHUNK)):
                head = head or data[:540]
                size += len(data)
    except EOFError as error:
        raise UnsupportedFile(f"{name}: expected a whole gzip file, found its end missing; send it again.") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise _unlike(name, "a gzip file") from error
    return head, size


def _itk_size(path: Path, name: str, suffix: str) -> int:
    with open(path, "rb") as file:
        head = file.read(LONGEST_HEADER)
    if suffix.endswith(".nrrd"):
        text, end, _ = head.replace(b"\r\n", b"\n").partition(b"\n\n")
        if not text.startswith(b"NRRD000") or not end:
            raise _unlike(name, "an NRRD file")
        fields = _fields(text, ":")
        elsewhere = [key for key in fields if key.replace(" ", "") == "datafile"]
        sizes, kind = fields.get("sizes", ""), fields.get("type", "")
        item = 1 if kind.split()[-1:] == ["char"] else ITEM_SIZES.get(kind.replace("_t", ""), 8)
    else:
        fields = _fields(head.split(b"ElementDataFile")[0], "=")
        where = re.search(rb"(?m)^ElementDataFile[ \t]*=[ \t]*(\S+)", head)
        if "ndims" not in fields or where is None:
            raise _unlike(name, "a MetaImage file")
        elsewhere = where[1] != b"LOCAL"
        sizes, item = fields.get("dimsize", ""), 8
    if elsewhere:
        raise UnsupportedFile(f"{name}: expected voxels in the file itself, found a reference to another.")
    if not re.fullmatch(r"\d+( +\d+)*", sizes):
        raise _unlike(name, "an image with sizes")
    return _product([int(size) for size in sizes.split()]) * item


def _fields(text: bytes, separator: str) -> dict[str, str]:
    lines = (line.partition(separator) for line in text.decode("latin-1").splitlines() if not line.startswith("#"))
    return {key.strip().lower(): value.strip().strip("=") for key, found, value in lines if found}


def _picture_size(path: Path, name: str, suffix: str) -> int:
    try:
        with Image.open(path, formats=[PICTURE_FORMATS[suffix]]) as picture:
            return _product(picture.size) * len(picture.getbands()) * (2 if "16" in picture.mode else 1)
    except Image.DecompressionBombError as error:
        raise TooLarge(f"{name}: expected a picture of usual size, found a huge one ({error}); crop it.") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise _unlike(name, f"a {PICTURE_FORMATS[suffix]} picture") from error


def _dicom_size(path: Path, name: str) -> int:
    try:
        meta = pydicom.filereader.read_file_meta_info(path)
        if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            raise UnsupportedFile(f"{name}: expected DICOM that isn't deflated as a whole; store it in another syntax.")
        header = pydicom.dcmread(path, stop_before_pixels=True)
        samples = int(header.get("SamplesPerPixel") or 1) * int(header.get("NumberOfFrames") or 1)
        shape = [int(header.get("Rows") or 0), int(header.get("Columns") or 0), samples]
        return _product(shape) * int(header.get("BitsAllocated") or 8) // 8
    except RequestError:
        raise
    except Exception as error:
        # pydicom raises struct's, zlib's and its own types for a file that isn't DICOM.
        raise _unlike(name, "a DICOM file") from error


def _product(numbers) -> int:
    product = 1
    for number in numbers:
        product *= max(int(number), 1)
    return product
