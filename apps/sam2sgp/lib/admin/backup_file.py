"""The file of a backup: a TAR file that says itself whether it is whole.

    studies/…        files of the studies folder
    state/…          files of the state folder
    manifest.json    the last member: format, time, and size and SHA-256 of every other one

In: files. Out: the TAR file; and of a TAR file, its files, or an error. One that was cut, at whatever place, has no
manifest, and one that was changed doesn't agree with it.
"""

import hashlib
import json
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO, Any

import sam2sgp
from sam2sgp.errors import DataError
from sam2sgp.files import BYTES_AT_A_TIME, remove_parts, replacing

FORMAT = 1
MANIFEST = "manifest.json"
STUDIES, STATE = "studies", "state"
LARGEST_MANIFEST = 1 << 30
MODE = 0o600


@dataclass(frozen=True)
class Manifest:
    """What is in a backup.

    Attributes:
        made: when, UTC, ISO 8601. version: of the program. kind: of the studies, "folder" or "archive".
        files: {name: (bytes, SHA-256)}.
    """

    made: str
    version: str
    kind: str
    files: dict[str, tuple[int, str]]


class BackupWriter:
    """Puts files into a backup; made by `writing`."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self.files: dict[str, tuple[int, str]] = {}

    def add(self, name: str, path: Path, most: int | None = None) -> None:
        """A file as it is when it is opened, or its first `most` bytes.

        Raises:
            FileNotFoundError: there is none.
            DataError: it was cut while it was read.
        """
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            self._write(name, file, found.st_size if most is None else most, found.st_mtime)

    def add_bytes(self, name: str, content: bytes) -> None:
        """A file with this content."""
        self._write(name, BytesIO(content), len(content), time.time())

    def _write(self, name: str, file: IO[bytes], size: int, changed: float) -> None:
        member = tarfile.TarInfo(name)
        member.size, member.mtime, member.mode = size, int(changed), MODE
        hashed = _Hashed(file)
        try:
            self._tar.addfile(member, hashed)
        except OSError as error:
            # An error of the disk has a number.
            if error.errno is not None:
                raise
            raise DataError(f"{name}: expected {size} bytes, found fewer: it was cut meanwhile; try again.") from error
        self.files[name] = size, hashed.digest()


class _Hashed:
    """A file that is hashed while it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(size)
        self._hash.update(content)
        return content

    def digest(self) -> str:
        return self._hash.hexdigest()


@contextmanager
def writing(path: Path, kind: str) -> Iterator[BackupWriter]:
    """A backup that is there, whole and on the disk, when the block ends without an error, and else is not there.

    Args:
        path: of the file, which replaces one that is there; readable by its owner only.
        kind: of the studies.
    """
    if path.parent.is_dir():
        remove_parts(path.parent, [path.name])
    with replacing(path) as part:
        with (
            open(part, "wb", opener=lambda name, flags: os.open(name, flags, MODE)) as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            writer = BackupWriter(tar)
            yield writer
            about = {
                "format": FORMAT,
                "made": datetime.now(UTC).isoformat(timespec="seconds"),
                "version": sam2sgp.__version__,
                "kind": kind,
                "files": {name: {"size": size, "sha256": digest} for name, (size, digest) in writer.files.items()},
            }
            writer.add_bytes(MANIFEST, json.dumps(about, indent=1).encode("ascii"))


def checked(path: Path) -> Manifest:
    """What is in a backup, of which every byte was read. Raises DataError if it isn't whole."""
    return _walk(path, lambda name, file: _digest(file))


def unpack(path: Path, target_of: Callable[[str], Path]) -> Manifest:
    """Write a backup's files, each on the disk, to the places that `target_of` gives for their names.

    Raises DataError if it isn't whole: what was written is then of no use. Raises OSError where it can't be written.
    """

    def write(name: str, file: IO[bytes]) -> str:
        target = target_of(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with open(target, "xb") as made:
            while content := file.read(BYTES_AT_A_TIME):
                digest.update(content)
                made.write(content)
            made.flush()
            os.fsync(made.fileno())
        return digest.hexdigest()

    return _walk(path, write)


def _walk(path: Path, take: Callable[[str, IO[bytes]], str]) -> Manifest:
    """Read each member by `take`, which gives its digest, and compare them with the manifest."""
    found: dict[str, tuple[int, str]] = {}
    about: Any = None
    try:
        file = open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: expected a backup, found {error.strerror}; correct its path.") from error
    try:
        with file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if about is not None:
                    raise _not_whole(path, f"{ascii(member.name)[:80]} behind its end")
                _check_member(path, member, found)
                content = tar.extractfile(member)
                assert content is not None, "of a regular file"
                if member.name == MANIFEST:
                    if member.size > LARGEST_MANIFEST:
                        raise _not_whole(path, "a manifest that is too large")
                    about = json.loads(content.read())
                else:
                    found[member.name] = member.size, take(member.name, content)
    except (tarfile.TarError, EOFError, ValueError, RecursionError) as error:
        raise _not_whole(path, str(error) or type(error).__name__) from error
    if about is None:
        raise _not_whole(path, "no end: it was cut")
    return _manifest(path, about, found)


def _check_member(path: Path, member: tarfile.TarInfo, found: dict[str, tuple[int, str]]) -> None:
    name = PurePosixPath(member.name)
    is_own = member.name == MANIFEST or (len(name.parts) > 1 and name.parts[0] in (STUDIES, STATE))
    is_plain = (
        member.isreg()
        and not member.issparse()
        and ".." not in name.parts
        and "\0" not in member.name
        and str(name) == member.name
    )
    if not is_own or not is_plain or member.name in found:
        raise _not_whole(path, f"{ascii(member.name)[:80]}, which no backup has")


def _manifest(path: Path, about: Any, found: dict[str, tuple[int, str]]) -> Manifest:
    try:
        number = about["format"]
        if not isinstance(number, int) or number > FORMAT:
            raise DataError(
                f"{path}: expected a backup of format {FORMAT} or older, found {number!r:.20}; restore it by the "
                "version that made it, or a newer one."
            )
        files = {name: (entry["size"], entry["sha256"]) for name, entry in about["files"].items()}
        manifest = Manifest(str(about["made"]), str(about["version"]), str(about["kind"]), files)
    except (KeyError, TypeError, AttributeError) as error:
        raise _not_whole(path, "a manifest that can't be read") from error
    if files != found:
        names = sorted(name for name in files.keys() | found.keys() if files.get(name) != found.get(name))
        raise _not_whole(path, f"{ascii(names[0])[:200]} missing or changed")
    return manifest


def _digest(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while content := file.read(BYTES_AT_A_TIME):
        digest.update(content)
    return digest.hexdigest()


def _not_whole(path: Path, found: str) -> DataError:
    return DataError(f"{path}: expected a whole backup, found {found}; copy it again, or take another one.")
