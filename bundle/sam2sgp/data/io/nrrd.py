"""Headers of NRRD files: http://teem.sourceforge.net/nrrd/format.html, as strictly as that page is written.

In: a file. Out: a `RawHeader`, as ITK understands the same file: axes that aren't of space or time are channels, the
other ones have their place in the world by `space directions`, or only by `spacings`.
"""

import re
from pathlib import Path

import numpy as np

from sam2sgp.data.io.raw import LONGEST_HEADER, RawHeader
from sam2sgp.errors import FormatError

LONGEST_LINE = 4096
MAGIC = re.compile(r"NRRD000[1-5]")
_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
VECTOR = re.compile(rf"\( *{_NUMBER} *(?:, *{_NUMBER} *)*\)")
VECTORS = re.compile(rf"(?:none|{VECTOR.pattern})(?: +(?:none|{VECTOR.pattern}))*")
NUMBERS = re.compile(rf"(?:nan|{_NUMBER})(?: +(?:nan|{_NUMBER}))*", re.IGNORECASE)
SIZES = re.compile(r"[1-9]\d{0,9}(?: +[1-9]\d{0,9})*")
TYPES = {
    "i1": "signed char|int8|int8_t",
    "u1": "uchar|unsigned char|uint8|uint8_t",
    "i2": "short|short int|signed short|signed short int|int16|int16_t",
    "u2": "ushort|unsigned short|unsigned short int|uint16|uint16_t",
    "i4": "int|signed int|int32|int32_t",
    "u4": "uint|unsigned int|uint32|uint32_t",
    "i8": "longlong|long long|long long int|signed long long|signed long long int|int64|int64_t",
    "u8": "ulonglong|unsigned long long|unsigned long long int|uint64|uint64_t",
    "f4": "float",
    "f8": "double",
}
DTYPES = {name: code for code, names in TYPES.items() for name in names.split("|")}
ENCODINGS = {"raw": "raw", "gzip": "gzip", "gz": "gzip"}
# Signs that lead to LPS.
SPACES = {
    "left-posterior-superior": (1, 1, 1),
    "lps": (1, 1, 1),
    "right-anterior-superior": (-1, -1, 1),
    "ras": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1),
    "las": (1, -1, 1),
    "scanner-xyz": (1, 1, 1),
    "3d-right-handed": (1, 1, 1),
    "3d-left-handed": (1, 1, 1),
}
# Kinds of axes that aren't channels.
DOMAIN = ("domain", "space", "time", "???", "none")
# The other fields of the format. What isn't understood here is only kept.
FIELDS = {
    "type",
    "dimension",
    "sizes",
    "endian",
    "encoding",
    "space",
    "space dimension",
    "space directions",
    "space origin",
    "spacings",
    "kinds",
    "content",
    "thicknesses",
    "axis mins",
    "axis maxs",
    "centers",
    "labels",
    "units",
    "space units",
    "sample units",
    "measurement frame",
    "min",
    "max",
    "old min",
    "old max",
    "number",
}
SYNONYMS = {
    "axismins": "axis mins",
    "axismaxs": "axis maxs",
    "centerings": "centers",
    "sampleunits": "sample units",
    "oldmin": "old min",
    "oldmax": "old max",
    "lineskip": "line skip",
    "byteskip": "byte skip",
    "datafile": "data file",
}
MILLIMETRES = ("", "mm", "millimeter", "millimeters", "millimetre", "millimetres")
SKIPS = ("line skip", "byte skip")
DATA_FILE = "data file"


def read_header(path: Path, detached: bool = False) -> RawHeader:
    """A file's header.

    Args:
        path: of an NRRD file.
        detached: whether the voxels may lie in another file of the same folder.

    Raises:
        FormatError: not NRRD, or not as its format says.
    """
    lines, end = _lines(path)
    fields, pairs = _fields(path, lines)
    for name in SKIPS:
        if fields.pop(name, "0") != "0":
            raise _refused(path, f"voxels right behind the header, found {name!r}")
    data_file = fields.pop(DATA_FILE, None)
    data_path, offset = path, end
    if data_file is not None:
        data_path, offset = beside(path, data_file, detached), 0
    encoding = ENCODINGS.get(fields.get("encoding", "").lower())
    if encoding is None:
        raise _refused(path, f"encoding raw or gzip, found {_shown(fields.get('encoding'))}")
    dtype = DTYPES.get(fields.get("type", "").lower())
    if dtype is None:
        raise _refused(path, f"the type of a number, found {_shown(fields.get('type'))}")
    endian = {"little": "<", "big": ">"}.get(fields.get("endian", "").lower(), "|" if dtype[1] == "1" else None)
    if endian is None:
        raise _refused(path, f"endian little or big, found {_shown(fields.get('endian'))}")
    shape = _sizes(path, fields)
    kinds = fields.get("kinds", "").lower().split() or ["domain"] * len(shape)
    if len(kinds) != len(shape):
        raise _refused(path, f"{len(shape)} kinds of axes, found {len(kinds)}")
    ranges = [axis for axis, kind in enumerate(kinds) if kind not in DOMAIN]
    if len(ranges) > 1 or len(ranges) == len(shape):
        raise _refused(path, f"at most one axis of channels, found {len(ranges)} of {len(shape)}")
    grid = [axis for axis in range(len(shape)) if axis not in ranges]
    text = ["NRRD0005", *(f"{key}: {value}" for key, value in fields.items())]
    text += [f"{key}:={value}" for key, value in pairs.items()]
    return RawHeader(
        path=path,
        data_path=data_path,
        offset=offset,
        encoding=encoding,
        dtype=np.dtype(endian + dtype),
        shape=tuple(shape[axis] for axis in grid),
        channels=shape[ranges[0]] if ranges else None,
        channel_axis=ranges[0] if ranges else 0,
        affine=_affine(path, fields, grid, len(shape)),
        has_spacing=_has_spacing(path, fields, grid),
        is_complex="complex" in kinds,
        fields=pairs,
        canonical="".join(f"{line}\n" for line in text).encode("utf-8", "surrogateescape"),
        last=b"\n",
    )


def beside(path: Path, name: str, allowed: bool) -> Path:
    """The file in the same folder that a detached header names. Raises FormatError for any other place."""
    advice = "save it again with the voxels in the same file"
    if not allowed:
        raise FormatError(f"{path}: expected voxels in the file itself, found a reference to another; {advice}.")
    is_list = re.match(r"LIST\b", name)
    is_plain = name not in ("", ".", "..") and name == name.strip() and not any(letter in name for letter in "/\\%\0")
    other = path.with_name(name) if is_plain and not is_list else path
    if other == path or other.is_symlink() or not other.is_file():
        found = f"found {_shown(name)}" if is_plain and not is_list and other.exists() else f"found no {_shown(name)}"
        raise FormatError(f"{path}: expected its voxels in one file of the same folder, {found}; {advice}.")
    return other


def _lines(path: Path) -> tuple[list[str], int]:
    """The header's lines, and where the voxels begin."""
    with open(path, "rb") as file:
        head = file.read(LONGEST_HEADER)
    found = re.search(rb"\n\r?\n", head)
    end = found.end() if found else len(head)
    content = head[: found.start()] if found else head.rstrip(b"\r\n")
    lines = [line.removesuffix("\r") for line in content.decode("utf-8", "surrogateescape").split("\n")]
    if not MAGIC.fullmatch(lines[0]):
        raise _refused(path, "the first line of an NRRD file, found another content")
    if not found and len(head) == LONGEST_HEADER:
        raise _refused(path, f"a header of at most {LONGEST_HEADER >> 10} kB, found a longer one")
    return lines[1:], end


def _fields(path: Path, lines: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The header's fields and its key/value pairs, each as {key: value}."""
    fields: dict[str, str] = {}
    pairs: dict[str, str] = {}
    for line in lines:
        if line.startswith("#"):
            continue
        name, colon, value = line.partition(": ")
        key = SYNONYMS.get(name.lower(), name.lower())
        target = fields
        if not colon or (key not in FIELDS and key not in SKIPS and key != DATA_FILE):
            key, assigned, value = line.partition(":=")
            target = pairs
            if not assigned or not key:
                raise _refused(path, f"lines of 'field: value' or 'key:=value', found {_shown(line)}")
        if any(ord(letter) < 32 and letter != "\t" or letter == "\x7f" for letter in line):
            raise _refused(path, f"text, found control characters in {_shown(line)}")
        if key in target:
            raise _refused(path, f"each field once, found {_shown(key)} twice")
        target[key] = value.strip(" ") if target is fields else value
    return fields, pairs


def _sizes(path: Path, fields: dict[str, str]) -> list[int]:
    sizes = fields.get("sizes", "")
    if not SIZES.fullmatch(sizes) or fields.get("dimension") != str(len(sizes.split())):
        raise _refused(path, f"as many sizes above zero as dimensions, found {_shown(sizes)}")
    if len(sizes.split()) > 5:
        raise _refused(path, f"at most 5 dimensions, found {len(sizes.split())}")
    return [int(size) for size in sizes.split()]


def _affine(path: Path, fields: dict[str, str], grid: list[int], dimensions: int) -> np.ndarray:
    """(4, 4) voxel -> LPS of the first three axes of the grid."""
    affine = np.eye(4)
    space = fields.get("space", "left-posterior-superior").lower().removesuffix("-time")
    if space not in SPACES:
        raise _refused(path, f"a space such as left-posterior-superior, found {_shown(space)}")
    axes = grid[:3]
    has_ranges = re.search(r"\d", fields.get("axis mins", "") + fields.get("axis maxs", ""))
    if has_ranges and "space directions" not in fields:
        # Programs differ on whether a range ends at the middle or at the edge of a voxel.
        raise _refused(path, "the place of voxels by space directions and origin, found axis mins or maxs")
    if "space directions" in fields:
        vectors = _vectors(path, "space directions", fields["space directions"], dimensions)
        columns = [vectors[axis] for axis in axes]
        while columns and columns[-1] is None:
            columns.pop()
        given = [column for column in columns if column is not None]
        if len(given) < len(columns):
            raise _refused(path, "directions of the first axes, found none")
        for axis, column in enumerate(given):
            affine[:3, axis] = 0.0
            affine[: len(column), axis] = column
        if len(given) == 2 and len(given[0]) == 3:
            normal = np.cross(given[0], given[1])
            affine[:3, 2] = normal / (np.linalg.norm(normal) or 1.0)
    elif "spacings" in fields:
        spacings = fields["spacings"]
        if len(spacings) > LONGEST_LINE or not NUMBERS.fullmatch(spacings) or len(spacings.split()) != dimensions:
            raise _refused(path, f"{dimensions} spacings, found {_shown(spacings)}")
        for axis, stored in enumerate(axes):
            spacing = float(spacings.split()[stored])
            affine[axis, axis] = spacing if np.isfinite(spacing) else 1.0
    if "space origin" in fields:
        [origin] = _vectors(path, "space origin", fields["space origin"], 1)
        affine[: len(origin or ()), 3] = origin or ()
    affine[:3] *= np.array(SPACES[space], float)[:, None]
    return affine


def _has_spacing(path: Path, fields: dict[str, str], grid: list[int]) -> bool:
    """Whether the header says how large a voxel is, in mm; NaN stands for a spacing that isn't known.

    Raises FormatError for another unit: ITK and 3D Slicer pass over it, and so would place results elsewhere.
    """
    units = re.findall(r'"([^"]*)"', fields.get("space units" if "space directions" in fields else "units", ""))
    others = [unit for unit in units if unit.strip().lower() not in MILLIMETRES]
    if others:
        raise _refused(path, f"millimetres as the unit of space, found {_shown(others[0])}")
    if "space directions" in fields:
        return True
    spacings = fields.get("spacings", "").split()
    return bool(spacings) and all(np.isfinite(float(spacings[axis])) for axis in grid[:3])


def _vectors(path: Path, name: str, text: str, count: int) -> list[list[float] | None]:
    if len(text) > LONGEST_LINE or not VECTORS.fullmatch(text):
        raise _refused(path, f"{name} as (x,y,z), found {_shown(text)}")
    found = [
        None if vector == "none" else [float(number) for number in vector.strip("()").split(",")]
        for vector in re.findall(rf"none|{VECTOR.pattern}", text)
    ]
    lengths = {len(vector) for vector in found if vector}
    if len(found) != count or len(lengths) > 1 or max(lengths, default=0) > 3:
        raise _refused(path, f"{count} of {name} of one length up to three, found {_shown(text)}")
    return found


def _shown(text: object) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _refused(path: Path, what: str) -> FormatError:
    return FormatError(f"{path}: expected {what}; save it again as NRRD with the voxels in the same file.")
