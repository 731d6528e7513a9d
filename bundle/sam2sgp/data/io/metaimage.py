"""Headers of MetaImage files (.mha, .mhd): https://itk.org/Wiki/MetaIO/Documentation, as its programs write them.

In: a file. Out: a `RawHeader`, as ITK understands the same file. What other keys say, such as a scanner's own, plays
no part.
"""

import re
from pathlib import Path

import numpy as np

from sam2sgp.data.io.nrrd import beside
from sam2sgp.data.io.raw import LONGEST_HEADER, RawHeader
from sam2sgp.errors import FormatError

KEY = re.compile(r"[\w|()\[\]/.,-]+(?: [\w|()\[\]/.,-]+)*", re.ASCII)
WHOLE = re.compile(r"[1-9]\d{0,9}")
NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
LONGEST_LINE = 4096
DATA_FILE = "ElementDataFile"
TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
SYNONYMS = {
    "Position": "Offset",
    "Origin": "Offset",
    "Orientation": "TransformMatrix",
    "Rotation": "TransformMatrix",
    "ElementByteOrderMSB": "BinaryDataByteOrderMSB",
}
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def read_header(path: Path, detached: bool = False) -> RawHeader:
    """A file's header.

    Args:
        path: of a MetaImage file.
        detached: whether the voxels may lie in another file of the same folder.

    Raises:
        FormatError: not MetaImage, or with anything that leaves a doubt about where its voxels are.
    """
    fields, end = _fields(path)
    data_file = fields.pop(DATA_FILE)
    data_path, offset = path, end
    if data_file.upper() != "LOCAL":
        data_path, offset = beside(path, data_file, detached), 0
    if fields.get("ObjectType", "Image") != "Image":
        raise _refused(path, f"ObjectType Image, found {_shown(fields['ObjectType'])}")
    if not _flag(path, fields, "BinaryData", True):
        raise _refused(path, "binary voxels, found them written as text")
    if fields.get("DistanceUnits", "mm") not in ("mm", "?"):
        # ITK passes over it.
        raise _refused(path, f"millimetres as DistanceUnits, found {_shown(fields['DistanceUnits'])}")
    if fields.get("HeaderSize", "0") != "0":
        raise _refused(path, "voxels right behind the header, found bytes to skip")
    sizes = fields.get("DimSize", "").split()
    if not 2 <= len(sizes) <= 4 or fields.get("NDims") != str(len(sizes)) or not all(map(WHOLE.fullmatch, sizes)):
        raise _refused(path, f"NDims from 2 to 4 and as many sizes above zero, found {_shown(fields.get('DimSize'))}")
    channels = fields.get("ElementNumberOfChannels", "1")
    if not WHOLE.fullmatch(channels):
        raise _refused(path, f"a number of channels, found {_shown(channels)}")
    kind = fields.get("ElementType", "")
    dtype = TYPES.get(kind.removesuffix("_ARRAY"))
    if dtype is None:
        raise _refused(path, f"an ElementType such as MET_SHORT, found {_shown(kind)}")
    order = ">" if _flag(path, fields, "BinaryDataByteOrderMSB", False) else "<"
    packed = _flag(path, fields, "CompressedData", False)
    known = [f"{key} = {fields[key]}\n" for key in KEPT if key in fields and key != "ObjectType"]
    return RawHeader(
        path=path,
        data_path=data_path,
        offset=offset,
        encoding="zlib" if packed else "raw",
        dtype=np.dtype(order + dtype),
        shape=tuple(int(size) for size in sizes),
        channels=int(channels) if channels != "1" else None,
        channel_axis=0,
        affine=_affine(path, fields, len(sizes)),
        has_spacing="ElementSpacing" in fields or "ElementSize" in fields,
        is_complex=False,
        fields={},
        canonical="".join(["ObjectType = Image\n", *known]).encode(),
        last=b"CompressedDataSize = %d\n" * packed + f"{DATA_FILE} = LOCAL\n".encode(),
    )


# In this order, as MetaIO writes them.
KEPT = (
    "ObjectType",
    "NDims",
    "BinaryData",
    "BinaryDataByteOrderMSB",
    "CompressedData",
    "TransformMatrix",
    "Offset",
    "CenterOfRotation",
    "AnatomicalOrientation",
    "ElementSpacing",
    "ElementSize",
    "DimSize",
    "ElementNumberOfChannels",
    "ElementType",
)


def _fields(path: Path) -> tuple[dict[str, str], int]:
    """The header as {key: value}, which ends with `DATA_FILE`, and where it ends."""
    fields: dict[str, str] = {}
    end = 0
    with open(path, "rb") as file:
        while DATA_FILE not in fields:
            line = file.readline(LONGEST_LINE)
            end += len(line)
            text = line.removesuffix(b"\n").removesuffix(b"\r").decode("latin-1")
            key, equals, value = text.partition("=")
            key, value = key.removesuffix(" "), value.strip(" ")
            is_line = equals and line.endswith(b"\n") and KEY.fullmatch(key)
            if not is_line or end > LONGEST_HEADER:
                what = f"lines of 'key = value' up to {DATA_FILE}"
                raise _refused(path, f"{what}, found {_shown(text)}" if fields else f"{what}, found another content")
            key = SYNONYMS.get(key, key)
            if key in fields:
                raise _refused(path, f"each key once, found {_shown(key)} twice")
            if key in (DATA_FILE, *KEPT) and not (value.isascii() and value.isprintable()):
                raise _refused(path, f"printable text for {key}, found {_shown(value)}")
            fields[key] = value
    return fields, end


def _flag(path: Path, fields: dict[str, str], key: str, default: bool) -> bool:
    value = BOOLEANS.get(fields[key].lower()) if key in fields else default
    if value is None:
        raise _refused(path, f"{key} True or False, found {_shown(fields[key])}")
    return value


def _affine(path: Path, fields: dict[str, str], dimensions: int) -> np.ndarray:
    """(4, 4) voxel -> LPS of the first three axes."""
    spacing_key = "ElementSpacing" if "ElementSpacing" in fields else "ElementSize"
    spacing = _numbers(path, fields, spacing_key, np.ones(dimensions))
    # Each row is the direction of an axis.
    matrix = _numbers(path, fields, "TransformMatrix", np.eye(dimensions).ravel()).reshape(dimensions, dimensions).T
    offset = _numbers(path, fields, "Offset", np.zeros(dimensions))
    space = min(dimensions, 3)
    affine = np.eye(4)
    affine[:space, :space] = (matrix * spacing)[:space, :space]
    affine[:space, 3] = offset[:space]
    return affine


def _numbers(path: Path, fields: dict[str, str], key: str, default: np.ndarray) -> np.ndarray:
    """As many finite numbers as `default` has."""
    if key not in fields:
        return default
    words = fields[key].split()
    if len(words) != len(default) or not all(map(NUMBER.fullmatch, words)):
        raise _refused(path, f"{len(default)} numbers for {key}, found {_shown(fields[key])}")
    return np.array(words, float)


def _shown(text: object) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _refused(path: Path, what: str) -> FormatError:
    return FormatError(f"{path}: expected {what}; save it again as MetaImage (.mha).")
