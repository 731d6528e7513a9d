"""Prepared cases on disk: what preprocessing makes of a case, read back slice by slice.

Training draws single slices at random. Reading a whole volume for each would be slow, holding all volumes in memory
would not scale; so each case is prepared once and memory-mapped. The folder is only a cache: it may be deleted at any
time, and files are written whole or not at all, so several processes may share it.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sam2sgp.errors import DataError
from sam2sgp.files import replacing
from sam2sgp.transforms.cache_keys import transform_fingerprint
from sam2sgp.transforms.dictionary import log_warnings
from sam2sgp.transforms.scaling import Scaling, scaling_hint


@dataclass(frozen=True)
class CachedCase:
    """A case as preprocessing makes it.

    image: (Z, C, S, S) float16 in [0, 1]. label: (Z, S, S) class map. valid: top, left, height, width in pixels.
    scaling: how the intensities were scaled.
    """

    image: np.ndarray
    label: np.ndarray
    valid: tuple[int, int, int, int]
    scaling: Scaling


class CaseCache:
    """Prepares cases through a transform and keeps the result in a folder.

    Args:
        directory: where the files go; made if missing.
        transform: case dict -> case dict with `image`, `label`, `letterbox` and `scaling`, see `sam2sgp.transforms`.

    Raises:
        DataError: a case can't be read, or the folder can't be written.
    """

    def __init__(self, directory: str | Path, transform: Callable) -> None:
        self.directory = Path(directory)
        self.transform = transform

    def __getitem__(self, case: dict) -> CachedCase:
        stem = self.directory / self._key(case)
        paths = [stem.with_suffix(suffix) for suffix in (".image.npy", ".label.npy", ".json")]
        if not paths[-1].is_file():
            self._prepare(case, paths)
        image, label = (np.load(path, mmap_mode="r") for path in paths[:2])
        known = json.loads(paths[2].read_text())
        return CachedCase(image, label, tuple(known["valid"]), Scaling.of_dict(known["scaling"]))

    def _prepare(self, case: dict, paths: list[Path]) -> None:
        prepared = self.transform(case)
        log_warnings(prepared)
        letterbox = prepared["letterbox"]
        label = prepared["label"].numpy()
        label = label.astype(np.uint8 if label.max(initial=0) < 256 else np.int32)
        try:
            with replacing(paths[0]) as part:
                np.save(part, prepared["image"].numpy().astype(np.float16))
            with replacing(paths[1]) as part:
                np.save(part, label)
            # The last file to appear marks the case as complete.
            with replacing(paths[2]) as part:
                known = {"valid": [*letterbox.offset, *letterbox.inner], "scaling": asdict(prepared["scaling"])}
                part.write_text(json.dumps(known))
        except OSError as error:
            raise DataError(
                f"{self.directory}: expected to write prepared images there, found {error}; free some space or choose "
                "another folder with `cache_dir`."
            ) from error

    def _key(self, case: dict) -> str:
        parts = [transform_fingerprint(self.transform), case.get("modality"), scaling_hint(case)]
        for key in ("image", "label"):
            path = Path(case[key])
            files = sorted(path.iterdir()) if path.is_dir() else [path]
            parts += [[str(file), file.stat().st_mtime_ns, file.stat().st_size] for file in files if file.exists()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
