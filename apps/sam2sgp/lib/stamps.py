"""What tells that a file has changed, without reading it.

In: paths. Out: tuples that are equal for as long as nothing changed, as far as the file system's clock tells.
"""

import os
from pathlib import Path

Stamp = tuple[int, int, int]


def stamp(path: str | Path) -> Stamp | None:
    """Time in ns, size and number of one file, or of a folder, whose time changes with its list of files.

    None where there is none.
    """
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def image_stamp(path: str | Path) -> tuple | None:
    """(name, `stamp`) of each file of an image: of the file itself, or of all in a DICOM series folder.

    None where there is none.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(path) if entry.is_file())
        files = {name: stamp(os.path.join(path, name)) for name in names}
    except NotADirectoryError:
        files = {os.path.basename(path): stamp(path)}
    except OSError:
        return None
    return None if None in files.values() else tuple(files.items())
