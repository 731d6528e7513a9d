"""Earlier states of images' labels.

In: labels that are about to be replaced or deleted. Out: the list of an image's earlier states, and the file of one. Of
each image the last `MOST_KEPT` states stay, as far as they take no more than `MOST_BYTES` together; the last one stays
however large it is. Approved states have as much room for themselves, so that no number of drafts drives them out. Each
is a copy of the label's file with what was known about it next to it. Files are whole or not
there; threads and processes may keep some at once.
"""

import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lib.checks import NotFound, supported_suffix
from lib.stores.audit import content_hash
from lib.stores.records import FINAL
from sam2sgp.files import replacing, write_text

logger = logging.getLogger(__name__)

# In the work folder of a datastore.
FOLDER = "history"
MOST_KEPT = 20
MOST_BYTES = 256 << 20
# When it was kept, in ns, and its tag.
VERSION = re.compile(r"(?P<time>\d{19})-(?P<tag>[A-Za-z0-9][A-Za-z0-9_+-]{0,63})")


class History:
    """Earlier states of labels, in a folder.

    Args:
        folder: theirs; made when first needed.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)

    def keep(self, image_id: str, tag: str, label: str | Path, info: Mapping[str, Any]) -> None:
        """Keep a label as it is now. Where that fails, as on a full disk, a warning says so and work goes on.

        What was kept for a decision that was then refused isn't kept once more: it would drive out older ones.
        """
        folder = self._of(image_id)
        version = f"{time.time_ns():019}-{tag}"
        try:
            if self._is_latest(image_id, tag, label, info):
                return
            with replacing(folder / f"{version}{supported_suffix(label)}") as part:
                shutil.copyfile(label, part)
            write_text(folder / f"{version}.json", json.dumps(dict(info), default=str))
            self._clear(image_id)
        except OSError as error:
            logger.warning("An earlier label of image %s can't be kept: %s", image_id, error)

    def versions(self, image_id: str) -> list[dict[str, Any]]:
        """The newest first: `version`, `time` when it was replaced, in seconds since 1970, `tag` and `user`."""
        found = []
        for notes in sorted(self._of(image_id).glob("*.json"), reverse=True):
            named = VERSION.fullmatch(notes.stem)
            if named:
                user = self._notes(notes).get("user")
                found.append(
                    {"version": notes.stem, "time": int(named["time"]) / 1e9, "tag": named["tag"], "user": user}
                )
        return found

    def get(self, image_id: str, version: str) -> tuple[Path, dict[str, Any]]:
        """The file of an earlier state, and what was known about it. Raises NotFound."""
        if VERSION.fullmatch(version):
            folder = self._of(image_id)
            files = [path for path in folder.glob(f"{version}.*") if path.suffix != ".json"]
            if files:
                return files[0], self._notes(folder / f"{version}.json")
        raise NotFound(f"image {image_id}: expected an earlier label of the list, found none; load the list again.")

    def files(self) -> Iterator[tuple[Path, Path]]:
        """Each earlier state of all images: the file of the label, and that of what was known about it."""
        for folder in sorted(self._folder.glob("*")):
            # It goes with its image.
            with suppress(FileNotFoundError):
                for notes in sorted(folder.glob("*.json")):
                    if VERSION.fullmatch(notes.stem):
                        yield from ((path, notes) for path in folder.glob(f"{notes.stem}.*") if path != notes)

    def forget(self, image_id: str) -> None:
        """Delete all of an image that is gone: another one may come under its id."""
        shutil.rmtree(self._of(image_id), ignore_errors=True)

    def _clear(self, image_id: str) -> None:
        """Delete the oldest states of an image that are too many or take too much."""
        versions = self.versions(image_id)
        for was_approved in (True, False):
            self._clear_of(image_id, [kept for kept in versions if (kept["tag"] == FINAL) is was_approved])

    def _clear_of(self, image_id: str, versions: list[dict[str, Any]]) -> None:
        size = 0
        for number, kept in enumerate(versions):
            files = list(self._of(image_id).glob(f"{kept['version']}.*"))
            size += sum(file.stat().st_size for file in files)
            if number >= MOST_KEPT or (number and size > MOST_BYTES):
                for file in files:
                    file.unlink(missing_ok=True)

    def _is_latest(self, image_id: str, tag: str, label: str | Path, info: Mapping[str, Any]) -> bool:
        """Whether a label is the one with its tag that was kept last."""
        kept = next((found["version"] for found in self.versions(image_id) if found["tag"] == tag), None)
        if kept is None:
            return False
        try:
            file, known = self.get(image_id, kept)
        except NotFound:
            return False
        return known == json.loads(json.dumps(dict(info), default=str)) and content_hash(file) == content_hash(label)

    def _of(self, image_id: str) -> Path:
        # Ids may be longer than a name of a folder, and differ in case only.
        return self._folder / hashlib.sha256(image_id.encode("utf-8", "replace")).hexdigest()[:32]

    def _notes(self, path: Path) -> dict[str, Any]:
        try:
            found = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}
