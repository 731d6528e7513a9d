"""What a cached thing depends on, as hashes: files by their content, preprocessing, and the network.

In: cases as dicts with paths, transforms and networks. Out: hexadecimal SHA-256. A path is never part of one.
"""

import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterable

import torch

from sam2sgp.data.io import data_files
from sam2sgp.errors import DataError
from sam2sgp.files import TRUSTED_AGE
from sam2sgp.networks import SAM2SGP, lora_layers
from sam2sgp.support.tensor_store import TensorStore, checksum
from sam2sgp.transforms.cache_keys import transform_fingerprint
from sam2sgp.transforms.scaling import scaling_hint

ATTEMPTS = 3
KIND = "file"


def digest_of(*parts: object) -> str:
    """SHA-256 over parts of JSON types."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class FileHashes:
    """SHA-256 of files, computed once for each (path, size, mtime, inode).

    Args:
        store: where hashes are kept for other processes; None keeps them only in this object.
    """

    def __init__(self, store: TensorStore | None = None) -> None:
        self.store = store
        self._known: dict[str, tuple[list[int], str]] = {}
        self._new: dict[str, bytes] = {}

    def prefetch(self, cases: Iterable[dict]) -> None:
        """Look up many cases at once; a case that can't be looked up is left for `of_case` to complain of."""
        if self.store is None:
            return
        keys: dict[str, str] = {}
        for case in cases:
            try:
                named = [os.path.abspath(case[key]) for key in ("image", "label")]
                paths = [path for name in named if name not in self._known for path, _ in files_of(name)]
            except (OSError, KeyError, TypeError):
                continue
            keys |= {_key(path): path for path in paths if path not in self._known}
        for key, value in self.store.metadata(KIND, keys).items():
            signature, sha256 = json.loads(value)
            self._known[keys[key]] = signature, sha256

    def of_case(self, case: dict) -> str | None:
        """Hash of an image's and a label's content, geometry included, and of what decides how they are scaled.

        Returns:
            None where the case has no files, but tensors.

        Raises:
            DataError: a file is missing or can't be read.
        """
        paths = [path for key in ("image", "label") if isinstance(path := case.get(key), str | os.PathLike)]
        if len(paths) < 2:
            return None
        return digest_of(self.of_paths(paths), case.get("modality"), scaling_hint(case))

    def of_paths(self, paths: Iterable[str | os.PathLike]) -> list[str]:
        """Hash of the content of each image or label.

        Raises:
            DataError: a file is missing or can't be read.
        """
        try:
            return [self._of_path(path) for path in paths]
        except OSError as error:
            raise DataError(
                f"{error.filename}: expected a finished image or label, found that it can't be read ({error}); correct "
                "the file or remove the case."
            ) from error

    def flush(self) -> None:
        """Put new hashes into the store."""
        if self.store is not None:
            self.store.add_metadata(KIND, self._new)
        self._new = {}

    def _of_path(self, path: str | os.PathLike) -> str:
        """The hash of a file, or of several (a series, a header with its data) whatever their names."""
        hashes = [self._of_file(file, status) for file, status in files_of(path)]
        return hashes[0] if len(hashes) == 1 else digest_of(sorted(hashes))

    def _of_file(self, path: str, status: os.stat_result) -> str:
        for _ in range(ATTEMPTS):
            signature = [status.st_size, status.st_mtime_ns, status.st_ino]
            known = self._known.get(path)
            if known is not None and known[0] == signature:
                return known[1]
            with open(path, "rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                status = os.fstat(file.fileno())
            if signature == [status.st_size, status.st_mtime_ns, status.st_ino]:
                if time.time_ns() - status.st_mtime_ns > TRUSTED_AGE:
                    self._known[path] = signature, sha256
                    self._new[_key(path)] = json.dumps([signature, sha256]).encode()
                return sha256
        raise DataError(f"{path}: expected a finished file, found that it changes while it is read; try again later.")


def _key(path: str) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()


def files_of(path: str | os.PathLike) -> list[tuple[str, os.stat_result]]:
    """The files that an image consists of, with their state. Raises `OSError` if one is missing."""
    path = os.path.abspath(path)
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        with os.scandir(path) as entries:
            return sorted((entry.path, entry.stat()) for entry in entries if entry.is_file())
    files = [path, *map(str, data_files(path))]
    return [(file, os.stat(file)) for file in files]


def signature_of(paths: Iterable[str | os.PathLike]) -> str | None:
    """Hash of names, sizes, times and inodes of the files of images and labels, by which to know them unchanged.

    None where a file is so new that its time could stay the same in spite of a change. Raises `OSError` if one is
    missing.
    """
    files = [entry for path in paths for entry in files_of(path)]
    if any(time.time_ns() - status.st_mtime_ns <= TRUSTED_AGE for _, status in files):
        return None
    return digest_of([[path, status.st_size, status.st_mtime_ns, status.st_ino] for path, status in files])


def settings_fingerprint(transform: Callable, *more: object) -> str:
    """Hash of a (composed) preprocessing and of further settings.

    Plain functions count by their name, not by what they do.
    """
    steps = getattr(transform, "transforms", [transform])
    names = [f"{getattr(step, '__module__', '')}.{getattr(step, '__qualname__', '')}" for step in steps]
    return digest_of(transform_fingerprint(transform), names, more)


def network_fingerprint(network: SAM2SGP, device: torch.device) -> str:
    """Hash of all that what a network encodes depends on: weights, LoRA, switches, device type, precision."""
    layers = {
        name: [layer.active_adapters, layer.merged_adapters, layer.disable_adapters, getattr(layer, "scaling", {})]
        for name, layer in lora_layers(network).items()
    }
    names = ("backbone", "image_size", "normalization", "memory_pool")
    switches = [getattr(network, name, None) for name in names]
    return digest_of(checksum(network.state_dict()), switches, layers, precision(device))


def precision(device: torch.device) -> list:
    """Device type and, inside an autocast block for it, the type computed in."""
    enabled = torch.is_autocast_enabled(device.type)
    return [device.type, str(torch.get_autocast_dtype(device.type)) if enabled else None]
