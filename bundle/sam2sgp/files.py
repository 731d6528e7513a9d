"""Files that are either whole or not there."""

import hashlib
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

# The folders of `replacing`: "." and the file's name, then "." and what `tempfile` adds.
PART_FOLDER = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}")
# File systems allow a name 255 bytes; with what is added to it, a longer one than this stands for itself by its hash.
LONGEST_NAME = 255 - 10
# Nanoseconds: what is changed again within the resolution of its time stamp, on the coarsest file systems, looks
# unchanged.
TRUSTED_AGE = 2 * 10**9
# Bytes that are read at a time of a file that may be large.
BYTES_AT_A_TIME = 1 << 20


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: str | Path, durable: bool = True) -> Iterator[Path]:
    """A path to write to; what is there when the block ends without an error replaces `path` in one step.

    Parent folders are made. The file is written in a hidden folder next to `path`, under the same name, so that
    libraries which go by the suffix work, and is on the disk before it is moved. A reader sees the old file or the new
    one, whenever the process ends; several processes may write the same path.

    Args:
        path: of the file.
        durable: whether it has to survive a power failure, for which writing it waits for the disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{_part_name(path.name)}.", dir=path.parent) as folder:
        part = Path(folder, path.name)
        yield part
        if durable:
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(part, path)


def write_text(path: str | Path, text: str, durable: bool = True) -> None:
    """Write UTF-8 text, with its line ends as given, in one atomic step; what UTF-8 can't hold is written escaped."""
    with replacing(path, durable) as part:
        part.write_bytes(text.encode("utf-8", "backslashreplace"))


def sync_folder(folder: str | Path) -> None:
    """Have it on the disk which files are in a folder; one that has gone is none's loss."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _part_name(name: str) -> str:
    encoded = os.fsencode(name)
    return name if len(encoded) <= LONGEST_NAME else hashlib.sha256(encoded).hexdigest()


def remove_parts(directory: str | Path, names: Collection[str]) -> None:
    """Delete what killed processes left half written of the files of these names; nobody may be writing them now."""
    names = {_part_name(name) for name in names}
    with os.scandir(directory) as entries:
        for entry in entries:
            match = PART_FOLDER.fullmatch(entry.name)
            if match and match["name"] in names and entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
