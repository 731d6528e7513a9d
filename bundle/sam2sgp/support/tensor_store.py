"""Tensors and metadata on disk, found again by keys that say all they depend on.

    directory/index/index.sqlite             metadata: rows (kind, key, value, checksum) of `facts`
    directory/<name>.safetensors             tensors, with their own name and checksum in the metadata

Every row and every file is a pure function of its key. So nothing is ever out of date, the whole folder may be deleted
at any time, and several processes may read and write it at once: whoever writes last writes the same. A file appears
whole or not at all, and a row that speaks of a file is added after it; a process that is killed leaves at most a file
without a row, which is valid by itself. What is missing, truncated or damaged counts as absent. Where the folder can't
be written (a full disk, missing rights), what was to be written is held in memory instead, with one warning.

An instance is for one thread at a time, but for `peek`. The folder should be on a local disk, as SQLite's write-ahead
log needs.
"""

import hashlib
import json
import logging
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from tempfile import mkdtemp
from typing import TypeVar
from urllib.parse import quote

import safetensors.torch
import torch
from torch import Tensor

from sam2sgp.files import replacing
from sam2sgp.support.lru import ByteLRU

SUFFIX = ".safetensors"
BUSY_SECONDS = 30.0
# Where SQLite itself does not wait: while the first process switches the write-ahead log on.
BUSY_ATTEMPTS, BUSY_PAUSE = 20, 0.1
# SQLite's own limit of variables in a statement is 999 in old versions.
KEYS_PER_QUERY = 500
# Seconds after which nobody is still writing a file.
LEFT_BEHIND = 3600.0
SCHEMA = "CREATE TABLE IF NOT EXISTS facts (kind TEXT, key TEXT, value BLOB, checksum BLOB, PRIMARY KEY (kind, key))"

Tensors = dict[str, Tensor]
Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class TensorStore:
    """See the module's docstring.

    Args:
        directory: made when something is written.
        megabytes: MiB of tensors kept in memory, the most recently used ones.

    Raises:
        ConfigError: `megabytes` is not a number of at least 0.
    """

    def __init__(self, directory: str | Path, megabytes: float = 64) -> None:
        self.directory = Path(os.path.abspath(directory))
        self.recent = ByteLRU(megabytes, _size)
        self._unsaved: dict[str, Tensors] = {}
        self._unsaved_metadata: dict[tuple[str, str], bytes] = {}
        self._warned = False

    def read(self, name: str) -> Tensors | None:
        """The tensors of a name, on the CPU; None where there are none, or damaged ones."""
        tensors = self.recent.get(name) or self._unsaved.get(name)
        if tensors is None:
            tensors = load(self._path(name), name)
            if tensors is not None:
                self.recent[name] = tensors
        return tensors

    def peek(self, name: str) -> Tensors | None:
        """As `read`, for any thread beside the one that works with the store: nothing is kept in memory for it."""
        return self._unsaved.get(name) or load(self._path(name), name)

    def write(self, name: str, tensors: Tensors) -> None:
        """Put tensors on disk, or hold them in memory where that fails."""
        self.recent[name] = tensors
        metadata = {"name": name, "sha256": checksum(tensors)}
        try:
            with replacing(self._path(name)) as part:
                part.write_bytes(safetensors.torch.save(tensors, metadata))
        except OSError as error:
            self._unsaved[name] = tensors
            self._warn(error)

    def names(self, folder: str) -> set[str]:
        """Names in a folder whose tensors are there, as far as the list of files tells."""
        try:
            with os.scandir(self.directory / folder) as entries:
                files = {entry.name.removesuffix(SUFFIX) for entry in entries if entry.name.endswith(SUFFIX)}
        except OSError:
            files = set()
        return {f"{folder}/{file}" for file in files} | {
            name for name in self._unsaved if name.startswith(f"{folder}/")
        }

    def metadata(self, kind: str, keys: Iterable[str]) -> dict[str, bytes]:
        """The values of those keys that have one."""
        keys = list(keys)
        found = {key: value for key in keys if (value := self._unsaved_metadata.get((kind, key))) is not None}

        def query(index: sqlite3.Connection) -> None:
            for start in range(0, len(keys), KEYS_PER_QUERY):
                part = keys[start : start + KEYS_PER_QUERY]
                marks = ",".join("?" * len(part))
                rows = index.execute(
                    f"SELECT key, value, checksum FROM facts WHERE kind = ? AND key IN ({marks})", (kind, *part)
                )
                found.update((key, value) for key, value, sha256 in rows if sha256 == _row_checksum(kind, key, value))

        if keys and self._index_path.exists():
            try:
                self._with_index(query)
            except (sqlite3.Error, OSError):
                # A folder that can't be written can still be read, without what a writer has not yet merged.
                try:
                    self._with_connection(query, f"file:{quote(str(self._index_path))}?mode=ro&immutable=1")
                except (sqlite3.Error, OSError) as error:
                    self._warn(error)
        return found

    def add_metadata(self, kind: str, metadata: Mapping[str, bytes]) -> None:
        """Put values on disk, or hold them in memory where that fails."""
        rows = [(kind, key, value, _row_checksum(kind, key, value)) for key, value in metadata.items()]
        if not rows:
            return

        def insert(index: sqlite3.Connection) -> None:
            with index:
                index.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?, ?, ?)", rows)

        try:
            self._with_index(insert)
        except (sqlite3.Error, OSError) as error:
            self._unsaved_metadata |= {(kind, key): value for key, value in metadata.items()}
            self._warn(error)

    def remove(self, folders: Iterable[str], kind: str) -> None:
        """Delete folders of tensors, and the metadata of a kind whose keys begin with their names."""
        folders = list(folders)
        for folder in folders:
            shutil.rmtree(self.directory / folder, ignore_errors=True)
            self._unsaved = {name: value for name, value in self._unsaved.items() if not name.startswith(f"{folder}/")}

        def delete(index: sqlite3.Connection) -> None:
            with index:
                # "0" follows "/" in ASCII.
                bounds = [(kind, f"{folder}/", f"{folder}0") for folder in folders]
                index.executemany("DELETE FROM facts WHERE kind = ? AND key >= ? AND key < ?", bounds)

        try:
            self._with_index(delete)
        except (sqlite3.Error, OSError) as error:
            self._warn(error)

    def sweep(self) -> None:
        """Delete what killed processes left half written."""
        for path in self.directory.glob("*/*/.*"):
            try:
                if time.time() - path.stat().st_mtime > LEFT_BEHIND:
                    shutil.rmtree(path, ignore_errors=True)
            except OSError:
                continue

    @property
    def _index_path(self) -> Path:
        return self.directory / "index" / "index.sqlite"

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}{SUFFIX}"

    def _with_index(self, use: Callable[[sqlite3.Connection], Result]) -> Result:
        """Use the index. A damaged one is thrown away, and the use is repeated on an empty one.

        Each use has a connection of its own: one held for longer would go on with a deleted file, and not survive a
        fork.
        """
        try:
            for _ in range(BUSY_ATTEMPTS):
                try:
                    return self._with_connection(use)
                except sqlite3.OperationalError as error:
                    if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                        raise
                    time.sleep(BUSY_PAUSE)
            return self._with_connection(use)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            logger.warning("%s: the index of the support cache is damaged (%s) and rebuilt.", self.directory, error)
            # Database and write-ahead log leave in one step, so that no process ever sees one without the other.
            broken = mkdtemp(prefix=".broken.", dir=self.directory)
            os.rename(self._index_path.parent, broken)
            shutil.rmtree(broken, ignore_errors=True)
            return self._with_connection(use)

    def _with_connection(self, use: Callable[[sqlite3.Connection], Result], read_only: str | None = None) -> Result:
        if read_only is not None:
            with closing(sqlite3.connect(read_only, uri=True, timeout=BUSY_SECONDS)) as index:
                return use(index)
        self._index_path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self._index_path, timeout=BUSY_SECONDS, isolation_level="IMMEDIATE")) as index:
            index.execute("PRAGMA journal_mode = WAL")
            index.execute("PRAGMA synchronous = NORMAL")
            index.execute(SCHEMA)
            return use(index)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            logger.warning(
                "%s: the support cache can't be used there (%s), so it is held in memory; free space, or set another "
                "`support_cache_dir`.",
                self.directory,
                error,
            )
        self._warned = True


def _size(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def load(path: Path, name: str) -> Tensors | None:
    """Tensors of a file, checked; None where it is missing, damaged, or another name's."""
    try:
        data = path.read_bytes()
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except Exception:  # what a damaged file makes the readers raise has no common type
        return None
    return tensors if header.get("__metadata__") == {"name": name, "sha256": checksum(tensors)} else None


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _row_checksum(kind: str, key: str, value: bytes) -> bytes:
    return hashlib.sha256(f"{kind}/{key}/".encode() + value).digest()[:16]
