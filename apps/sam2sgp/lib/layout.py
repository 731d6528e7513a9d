"""The number of the layout in which a folder's files are kept, so that versions of the app don't misread each other.

    no file, or an older number    upgraded step by step, with copies of what can't be made again
    this version's                 used
    a newer one                    refused with one sentence, and nothing is touched

In: the state folder or the studies folder, before anything in it is read. Out: the folder with this version's layout.
A step may be interrupted and is then done again, so it has to bear that.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from sam2sgp.errors import ConfigError
from sam2sgp.files import replacing, write_text

logger = logging.getLogger(__name__)

LAYOUT = 1
# Hidden, because the studies folder is one that people look into.
FILE = ".sam2sgp-layout.json"
# What can't be made again and is no image, label or weights file; the latter are never changed in place.
PRECIOUS = ("audit.jsonl", "progress.jsonl", "datastore_v2.json", "weights/active.json", "archive/classes.json")
# What older versions left open to other users, from when the state folder was not closed to them.
OPEN_FILES = ("audit.jsonl", "usage.sqlite", "scores.sqlite", "logs/*.log*", "weights/*.json")


def _close(folder: Path) -> None:
    for pattern in OPEN_FILES:
        for path in folder.glob(pattern):
            path.chmod(0o600)


# By the number from which a step leads to the next one; without a step only the number changes.
Upgrades = Mapping[int, Callable[[Path], None]]
OF_STATE: Upgrades = {0: _close}
OF_STUDIES: Upgrades = {}


def layout_of(folder: Path) -> int:
    """The number of a folder's layout; 0 where none is written down.

    Raises:
        ConfigError: the number can't be read.
    """
    path = folder / FILE
    try:
        number = json.loads(path.read_bytes())["layout"]
        if isinstance(number, int) and not isinstance(number, bool) and number >= 0:
            return number
    except FileNotFoundError:
        return 0
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ConfigError(
        f"{path}: expected the number of a layout, found another content; restore the file, or delete it if no newer "
        "version of the app has used the folder."
    )


def check_layout(folder: Path, latest: int = LAYOUT) -> int:
    """`layout_of`. Raises ConfigError where a newer version has used the folder."""
    found = layout_of(folder)
    if found > latest:
        raise ConfigError(
            f"{folder}: expected files of layout {latest} or older, found layout {found} of a newer version; start "
            "that version, or restore a backup that was made before the upgrade to other folders."
        )
    return found


def bring_up_to_date(folder: Path, upgrades: Upgrades, latest: int = LAYOUT) -> None:
    """Give a folder this version's layout.

    Args:
        folder: the state folder or the studies folder.
        upgrades: steps, `OF_STATE` or `OF_STUDIES`.
        latest: the layout of this version.

    Raises:
        ConfigError: a newer version has used it, or an upgrade can't be made; the folder then is as it was.
    """
    found = check_layout(folder, latest)
    for number in range(found, latest):
        try:
            if number in upgrades:
                _keep_copies(folder, number)
                upgrades[number](folder)
            write_text(folder / FILE, json.dumps({"layout": number + 1}))
        except OSError as error:
            if number == 0:
                # A folder that can't be written to is served as far as that goes.
                logger.warning("%s: expected to note its layout, found %s", folder, error.strerror)
                return
            raise ConfigError(
                f"{folder}: expected to upgrade its files to layout {number + 1}, found {error.strerror}; free some "
                "space or correct the permissions, then start again."
            ) from error


def _keep_copies(folder: Path, number: int) -> None:
    """Copies as they were before the first attempt."""
    kept = folder / f".before-layout-{number + 1}"
    for name in PRECIOUS:
        if (folder / name).is_file() and not (kept / name).exists():
            with replacing(kept / name) as part:
                shutil.copy2(folder / name, part)
