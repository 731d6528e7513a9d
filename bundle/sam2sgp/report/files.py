"""Text files that are either whole or not there."""

import os
from pathlib import Path


def write_text_atomically(path: str | Path, text: str) -> None:
    """Write UTF-8 text with its line ends as given; the folder is made if missing.

    What UTF-8 can't hold, such as undecodable bytes of a file name, is written as a backslash escape.

    The text goes to a file of this process next to `path`, which then replaces it: a reader sees the old or the new
    content, whenever the process ends.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
