"""Sessions: images that a client lends the server for a while, kept outside the datastore.

In: uploaded files or a packed file (ZIP, TAR) of them, and session ids. Out: MONAI Label's `SessionInfo`, with paths
inside the session's own folder. Packed files are unpacked here, member by member: none can lead out, and what they
unpack to is bounded. Requests come one at a time; ids are made by the server.
"""

import bz2
import gzip
import lzma
import os
import re
import shutil
import tarfile
import tempfile
import time
import uuid
import zipfile
import zlib
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

from monailabel.config import settings as server_settings
from monailabel.utils.sessions import Sessions

from lib.checks import (
    NotFound,
    RequestError,
    StorageError,
    TooLarge,
    UnsupportedFile,
    check_file_name,
    image_limit,
    unpacked_limit,
)
from lib.stores.door import NoImage, admitted
from sam2sgp.data.io import is_image
from sam2sgp.data.io.limits import LARGEST_RATIO, SMALL_ENOUGH
from sam2sgp.errors import DataError
from sam2sgp.files import BYTES_AT_A_TIME

# DICOM series of a long CT have a few thousand slices.
MOST_MEMBERS = 10_000
# The directory of a ZIP file with as many members as that, with long names.
LARGEST_DIRECTORY = MOST_MEMBERS << 9
# Extended headers of a TAR file: bytes of one and of all of them, records of all, keys that hold for one member, digits
# in a row (Python before 3.11.10 takes a time that grows with the square of these).
TAR_BLOCK, LARGEST_HEADER, ALL_HEADERS, MOST_RECORDS, MOST_KEYS = 512, 1 << 16, 8 << 20, 200_000, 100
TOO_MANY_DIGITS = re.compile(rb"[0-9]{65}")
# The most folders and letters of a member's path, before which that of the session's own folder comes.
DEEPEST, LONGEST_PATH = 32, 1024
COMPRESSIONS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    UnicodeError,
    ValueError,
)


class ConfinedSessions(Sessions):
    """MONAI Label's sessions, without a way out of their folder.

    Args:
        store_path: the folder of all sessions.
        expiry: seconds after which an unused session is removed.
        max_unpacked: bytes that a packed file may unpack to.
        max_image: bytes that the voxels of one file may take as float32; by default as many.
    """

    def __init__(self, store_path: str, expiry: int, max_unpacked: int, max_image: int | None = None):
        super().__init__(store_path, expiry)
        self._max_unpacked = max_unpacked
        self._max_image = max_unpacked if max_image is None else max_image

    def get_session(self, session_id: str, update_ts: bool = True, fetch_cache: bool = True):
        """A session, or None. Raises NotFound for what can't be an id."""
        session = super().get_session(check_session_id(session_id), update_ts, fetch_cache)
        if session and not self._is_own(session_id, session.image):
            return None
        return session

    def remove_session(self, session_id: str) -> None:
        super().remove_session(check_session_id(session_id))

    def remove_expired(self) -> int:
        """Remove the sessions that nobody used for longer than their expiry; returns how many.

        Other folders in the store aren't the server's to remove.
        """
        count = 0
        names = os.listdir(self.store_path) if os.path.isdir(self.store_path) else []
        for name in filter(_is_session_id, names):
            session = self.get_session(name, update_ts=False, fetch_cache=False)
            if session is None or 0 < session.expiry < int(time.time()) - session.last_access_ts:
                self.remove_session(name)
                count += 1
        return count

    def add_session(self, data_file: str, expiry: int = 0, uncompress: bool = False, session_id: str | None = None):
        """Take an uploaded file, folder of files, or (`uncompress`) the content of a packed file into a new session.

        Images are kept as `lib.stores.door` understands them. What is no image by name or content is deleted.

        Raises:
            UnsupportedFile: neither ZIP nor TAR, or one with links, devices or names that lead out; no image in
                it, or one whose content isn't what its name says.
            DataError: an image that promises voxels which it doesn't hold.
            TooLarge: a packed file of too many members, or that unpacks to too much.
            StorageError: the disk is full.
        """
        session_id = check_session_id(session_id) if session_id else str(uuid.uuid4())
        try:
            with tempfile.TemporaryDirectory() as folder:
                source = Path(data_file)
                if uncompress and not source.is_dir():
                    source = Path(folder, "content")
                    source.mkdir()
                    unpack(Path(data_file), source, self._max_unpacked)
                self._keep_images(source)
                # Packed as a folder of its own, or for a single file.
                while uncompress and source.is_dir() and len(inside := list(source.iterdir())) == 1:
                    [source] = inside
                return super().add_session(str(source), expiry, False, session_id)
        except (DataError, OSError) as error:
            shutil.rmtree(os.path.join(self.store_path, session_id), ignore_errors=True)
            if isinstance(error, DataError):
                raise
            raise StorageError(
                f"session: expected to store the upload, found {error.strerror or error}; free some space."
            ) from error

    def _keep_images(self, path: Path) -> None:
        """Delete what isn't an image by name or content, never reading it, and folders without images.

        Raises UnsupportedFile where nothing is left.
        """
        found = 0
        for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
            try:
                if not is_image(file):
                    raise NoImage(f"{file.name}: expected an image.")
                with admitted(file, self._max_image) as content:
                    if content != file:
                        shutil.copyfile(content, file)
                found += 1
            except NoImage:
                file.unlink()
        if not found:
            raise UnsupportedFile(
                "session: expected images, found none; send NIfTI, NRRD, MetaImage, DICOM or pictures."
            )
        for folder in sorted(path.rglob("*"), reverse=True):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def _is_own(self, session_id: str, path: str) -> bool:
        own = os.path.realpath(os.path.join(self.store_path, session_id))
        return os.path.commonpath([os.path.realpath(path), own]) == own


def open_sessions(settings) -> ConfinedSessions | None:
    """The confined sessions, or None where MONAI Label's own settings switch sessions off."""
    if not server_settings.MONAI_LABEL_SESSIONS:
        return None
    return ConfinedSessions(
        server_settings.MONAI_LABEL_SESSION_PATH,
        server_settings.MONAI_LABEL_SESSION_EXPIRY,
        unpacked_limit(settings.max_upload_mb),
        image_limit(settings),
    )


def check_session_id(text: str) -> str:
    """The id itself if it is one that the server could have given; else NotFound."""
    if not _is_session_id(text):
        raise NotFound("session: expected an id that the server gave, found another text; create a session first.")
    return text


def unpack(packed: Path, folder: Path, limit: int) -> None:
    """Write a packed file's content into a folder, but for hidden ones.

    Args:
        packed: a ZIP file or a TAR file, plain or compressed by gzip, bzip2 or xz.
        folder: an empty one.
        limit: bytes that all members together may unpack to.

    Raises:
        UnsupportedFile: of another kind, damaged, empty, or with a link, a device or a name that leads out.
        TooLarge: more than `limit` bytes or `MOST_MEMBERS` members.
    """
    # What images shrink to is bounded in `sam2sgp.data.io.limits` for the same reason.
    left = limit = min(limit, max(SMALL_ENOUGH, LARGEST_RATIO * os.path.getsize(packed)))
    files = 0
    folders: set[Path] = set()
    try:
        with closing(_members(packed)) as content:
            for members, (name, is_folder, size, source) in enumerate(content, 1):
                parts = () if _is_hidden(name) else _parts(name)
                if parts and not is_folder:
                    # Folders are made for the files in them only, and each file may come in thirty of its own.
                    folders.update(Path(*parts).parents)
                if members + len(folders) > MOST_MEMBERS:
                    raise _too_many()
                if not parts or is_folder:
                    # To come to what stands behind it, it is unpacked too.
                    left -= size
                    if left < 0:
                        raise _unpacks_to_more(limit)
                    continue
                target = folder.joinpath(*parts)
                files += 1
                target.parent.mkdir(parents=True, exist_ok=True)
                with source() as member, open(target, "xb") as file:
                    while data := member.read(BYTES_AT_A_TIME):
                        left -= len(data)
                        if left < 0:
                            raise _unpacks_to_more(limit)
                        file.write(data)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise UnsupportedFile("packed file: expected each name once, found one twice; pack it again.") from error
    except DAMAGE as error:
        raise UnsupportedFile(f"packed file: expected a readable one, found a damaged one ({error}).") from error
    except OSError as error:
        # The decompressors' own errors are of this type too, without a number.
        if error.errno is not None:
            raise
        raise UnsupportedFile(f"packed file: expected a readable one, found a damaged one ({error}).") from error
    if not files:
        raise UnsupportedFile("packed file: expected files in it, found none; pack it again.")


def _members(packed: Path) -> Generator[tuple[str, bool, int, Callable[[], IO[bytes]]]]:
    """Name, whether it is a folder, stated size, and what opens its content, of each member in turn."""
    if zipfile.is_zipfile(packed):
        with open(packed, "rb") as file, zipfile.ZipFile(_Sparing(file, LARGEST_DIRECTORY)) as content:
            if len(content.infolist()) > MOST_MEMBERS:
                raise _too_many()
            for member in content.infolist():
                kind = (member.external_attr >> 16) & 0o170000
                if kind not in (0, 0o100000, 0o040000):
                    raise _not_a_file(member.filename)
                # Not `is_dir`, which ends in an IndexError where the name is empty.
                yield member.filename, member.filename.endswith("/"), member.file_size, partial(content.open, member)
        return
    with open(packed, "rb") as file:
        magic = file.read(6)
    opener = next((opener for start, opener in COMPRESSIONS.items() if magic.startswith(start)), open)
    with opener(packed, "rb") as unpacked:
        source = _TarHeaders(unpacked)
        try:
            tar = tarfile.open(fileobj=cast(IO[bytes], source), mode="r:")
        except tarfile.TarError as error:
            raise UnsupportedFile(
                "packed file: expected a ZIP or TAR file, found other content; pack it again."
            ) from error
        with tar:
            while entry := tar.next():
                # It would keep all of them.
                tar.members.clear()  # type: ignore[attr-defined]
                if len(entry.pax_headers) > MOST_KEYS:
                    raise _long_header()
                if not (entry.isfile() or entry.isdir()) or entry.issparse():
                    raise _not_a_file(entry.name)
                source.in_content = True
                yield entry.name, entry.isdir(), entry.size, partial(_content_of, tar, entry)
                source.in_content = False


def _content_of(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> IO[bytes]:
    file = tar.extractfile(entry)
    assert file is not None, "a folder has no content"
    return file


class _Sparing:
    """A file that refuses to be read in large pieces: an extended header of a TAR file and the directory of a ZIP file
    are read in one, and become objects of many times their size.

    Args:
        file: is read.
        most: bytes that may be read at once.
    """

    def __init__(self, file: IO[bytes], most: int):
        self._file, self._most = file, most
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        # A header may claim what isn't there.
        data = self._file.read(self._most + 1 if size < 0 else min(size, self._most + 1))
        if max(size, len(data)) > self._most:
            raise _long_header()
        return data


class _TarHeaders(_Sparing):
    """A TAR file of which extended headers are short, together too.

    Attributes:
        in_content: whether what is read is the content of a member, at most `BYTES_AT_A_TIME`.
    """

    def __init__(self, file: IO[bytes]):
        super().__init__(file, BYTES_AT_A_TIME)
        self._left, self._records = ALL_HEADERS, 0
        self.in_content = False

    def read(self, size: int = -1) -> bytes:
        if self.in_content:
            return super().read(size)
        if size != TAR_BLOCK:
            self._left -= size
            if not 0 <= size <= LARGEST_HEADER or self._left < 0:
                raise _long_header()
        data = super().read(size)
        self._records += data.count(b"=")
        if self._records > MOST_RECORDS or TOO_MANY_DIGITS.search(data):
            raise _long_header()
        return data


def _too_many() -> TooLarge:
    return TooLarge(
        f"packed file: expected at most {MOST_MEMBERS} members and folders, found more; send one series at a time."
    )


def _unpacks_to_more(limit: int) -> TooLarge:
    return TooLarge(f"packed file: expected at most {limit >> 20} MB unpacked, found more; send less.")


def _long_header() -> TooLarge:
    return TooLarge("packed file: expected short headers, found long ones; pack it again.")


def _is_hidden(name: str) -> bool:
    """Whether a member is what some programs add about the others, such as `__MACOSX/._scan.nii`."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _parts(name: str) -> list[str]:
    """The folders and file name of a member, each a name that can't lead elsewhere."""
    parts = [part for part in name.rstrip("/").split("/") if part != "."]
    try:
        if name.startswith("/") or len(parts) > DEEPEST or len(name.encode("utf-8", "replace")) > LONGEST_PATH:
            raise RequestError("absolute, or too deep or long")
        return [check_file_name(part) for part in parts]
    except RequestError as error:
        raise UnsupportedFile(
            f"packed file: expected names within its own folder, at most {DEEPEST} folders deep, found "
            f"{ascii(name)[:80]}; pack it again."
        ) from error


def _not_a_file(name: str) -> UnsupportedFile:
    return UnsupportedFile(f"packed file: expected only files and folders, found a link or device {ascii(name)[:80]}.")


def _is_session_id(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text
    except (ValueError, AttributeError, TypeError):
        return False
