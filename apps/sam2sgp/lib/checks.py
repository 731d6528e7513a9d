"""What a client may send: names and tags, judged before anything is read, written or deleted; files are for `door`.

In: strings. Out: the same string, or an error of one sentence that carries its HTTP status. Nothing here touches the
datastore. All functions may be called from several threads at once.
"""

import re
import unicodedata
from collections.abc import Iterable
from enum import Enum
from pathlib import Path

from sam2sgp.data.io import DETACHED_SUFFIXES, SUFFIXES
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


class RequestError(DataError):
    """What a client asks for can't be done as it is."""

    status = 400


class Unauthorized(RequestError):
    """It isn't said who asks, or not so that it can be believed."""

    status = 401


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


def check_looks(image_id: str, known: Iterable[str]) -> None:
    """Raise Conflict where people, or a disk that knows no case, would take an id for another one.

    Such as one whose accents are letters of their own. Letters of other alphabets that look alike are not told apart.
    """
    look = _look(image_id)
    twin = next((other for other in known if other != image_id and _look(other) == look), None)
    if twin is not None:
        raise Conflict(
            f"image {ascii(image_id)}: expected an id that doesn't look like another, found {ascii(twin)}; choose "
            "another id."
        )


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


def supported_suffix(name: str | Path) -> str:
    """The supported suffix that a file name ends in, in lower case. Raises UnsupportedFile if there is none."""
    lower = Path(name).name.lower()
    suffix = next((suffix for suffix in SUFFIXES if lower.endswith(suffix)), None)
    if suffix is None:
        raise UnsupportedFile(f"{_shown(Path(name).name)}: expected a name that ends in one of {', '.join(SUFFIXES)}.")
    if suffix in DETACHED_SUFFIXES:
        raise UnsupportedFile(
            f"{_shown(Path(name).name)}: expected an image in one file, found its header or its voxels only; send it "
            "as .nrrd or .nii.gz."
        )
    return suffix


def unpacked_limit(max_upload_mb: float) -> int:
    """Bytes that an upload may unpack to."""
    return int(max_upload_mb * UNPACKED_PER_UPLOAD * (1 << 20))


def image_limit(settings) -> int:
    """Bytes that the voxels of one image may take as float32."""
    return min(int(settings.max_image_mb * (1 << 20)), unpacked_limit(settings.max_upload_mb))


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


def _look(image_id: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", image_id).casefold())


def _shown(text: object) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
