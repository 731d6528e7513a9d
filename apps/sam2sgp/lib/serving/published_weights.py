"""Published weights: which file serves, which came before, and how a better one takes its place.

Layout of the folder: `<version>/` with `model.pt`, `version.json` and what else its publisher keeps with it; and
`active.json`, which names the version in use. Without `active.json` it is the bundle's own file, the version
"embedded". Versions are never changed; delete the folder of one that is not needed any more.

Concurrency: any number of processes may read while one publishes or rolls back; writers exclude each other by a lock
file. A version's folder appears whole, after its files are on the disk, and `active.json` is replaced in one step, so
that a kill at any moment leaves either the old weights in use or the new ones.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock

from lib.stamps import Stamp, stamp
from sam2sgp.errors import WeightsError
from sam2sgp.files import write_text

EMBEDDED = "embedded"
MODEL_FILE = "model.pt"
VERSION_FILE = "version.json"
ACTIVE_FILE = "active.json"
_PART = ".part."


@dataclass(frozen=True)
class Version:
    """One weights file: its name, where it is, when it was published (UTC, ISO 8601), and what was measured then.

    `replaced` is the name of the version that was in use before. For "embedded", `published` and `replaced` are None.
    """

    name: str
    path: Path
    published: str | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    replaced: str | None = None


class Weights:
    """The versions of the weights in a folder.

    Args:
        folder: where versions are kept; made at the first publication.
        start: the bundle's model file, in use until something is published.
    """

    def __init__(self, folder: str | Path, start: str | Path) -> None:
        self.folder = Path(folder)
        self.start = Path(start)
        self._stamp: Stamp | None = None
        self._active: Version | None = None

    def active(self) -> Version:
        """The version in use. Costs one stat as long as nothing changes.

        Raises:
            WeightsError: `active.json` is damaged, or the version it names is not there any more.
        """
        path = self.folder / ACTIVE_FILE
        found = stamp(path)
        if self._active is None or found != self._stamp:
            self._active = self._version(self._read(path).get("version")) if found else self._embedded()
            self._stamp = found
        return self._active

    def versions(self) -> list[Version]:
        """The embedded version, then all published ones that are still there, oldest first."""
        names = (path.parent.name for path in self.folder.glob(f"[0-9]*/{VERSION_FILE}"))
        return [self._embedded(), *(self._version(name) for name in sorted(names, key=_number))]

    def publish(
        self, weights: str | Path, metrics: Mapping[str, Any], more: Mapping[str, Path] | None = None
    ) -> Version:
        """Copy a weights file, and files to keep with it, as a new version, and put that in use.

        Args:
            weights: a file that the bundle's `inference.json` loads.
            metrics: what was measured, for people; JSON values.
            more: other files, by their names in the version's folder.

        Raises:
            WeightsError: the folder can't be written, or a file can't be read; the old version stays in use.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock():
                for leftover in self.folder.glob(f"{_PART}*"):
                    shutil.rmtree(leftover, ignore_errors=True)
                name = str(1 + max((_number(path.name) for path in self.folder.glob("[0-9]*")), default=0))
                version = {
                    "published": datetime.now(UTC).isoformat(timespec="seconds"),
                    "metrics": dict(metrics),
                    "replaced": self.active().name,
                }
                with TemporaryDirectory(prefix=_PART, dir=self.folder) as part:
                    shutil.copyfile(weights, Path(part, MODEL_FILE))
                    for file, source in (more or {}).items():
                        shutil.copyfile(source, Path(part, file))
                    Path(part, VERSION_FILE).write_text(json.dumps(version, indent=2), encoding="utf-8")
                    for path in Path(part).iterdir():
                        with open(path, "rb+") as opened:
                            os.fsync(opened.fileno())
                    Path(part).chmod(self.folder.stat().st_mode & 0o777)
                    os.rename(part, self.folder / name)
                self._use(name)
        except OSError as error:
            raise WeightsError(
                f"{self.folder}: the new weights can't be published ({error}); the old ones stay in use. Free space or "
                "make the folder writable, then train again."
            ) from error
        return self.active()

    def roll_back(self) -> Version:
        """Put the version in use that the active one replaced.

        Raises:
            WeightsError: the embedded weights are in use, the version before is gone, or the folder can't be written.
        """
        if not self.folder.is_dir():
            raise self._nothing_before()
        try:
            with self._lock():
                replaced = self.active().replaced
                if replaced is None:
                    raise self._nothing_before()
                self._version(replaced)
                self._use(replaced)
        except OSError as error:
            raise WeightsError(
                f"{self.folder}: can't be written ({error}), so the weights stay as they are."
            ) from error
        return self.active()

    def _nothing_before(self) -> WeightsError:
        return WeightsError("The embedded weights are in use: there are none before them to roll back to.")

    def _lock(self) -> FileLock:
        return FileLock(self.folder / ".lock")

    def _use(self, name: str) -> None:
        write_text(self.folder / ACTIVE_FILE, json.dumps({"version": name}))

    def _embedded(self) -> Version:
        return Version(EMBEDDED, self.start)

    def _version(self, name: str | None) -> Version:
        if name == EMBEDDED:
            return self._embedded()
        if not isinstance(name, str) or not name.isdecimal() or not (self.folder / name / MODEL_FILE).is_file():
            raise WeightsError(
                f"{self.folder}: the weights version {name!r} is not there; put its folder back, or delete "
                f"{ACTIVE_FILE} to use the embedded weights."
            )
        version = self._read(self.folder / name / VERSION_FILE)
        return Version(
            name,
            self.folder / name / MODEL_FILE,
            version.get("published"),
            version.get("metrics", {}),
            version["replaced"],
        )

    def _read(self, path: Path) -> dict:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, dict):
                return content
            reason = "no JSON object"
        except (OSError, ValueError) as error:
            reason = str(error)
        raise WeightsError(
            f"{path}: can't be read ({reason}); restore it, or delete {ACTIVE_FILE} to use the embedded weights."
        )


def _number(name: str) -> int:
    return int(name) if name.isdecimal() else 0
