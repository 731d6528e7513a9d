"""Where things are on the server, which is no client's business, and what is really there.

`Folders`: in goes the text of an answer, and out comes the same text, in which files are named without the server's
folders: a file below one by its path from there, a folder by its own name.

`open_plain` and `read_plain`: files of folders that others may write to are opened once, and looked at when they are
open. What was a file a moment ago may be a link that leads out, or a pipe that nobody ever writes to.

Nothing here keeps a state.
"""

import errno
import html
import json
import os
import re
import stat
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
from io import BufferedReader
from pathlib import Path

# What a folder's own name may go on with; followed by one of these it is another folder.
MORE_OF_NAME = rb"[\w.-]"
WRITTEN: tuple[Callable[[str], str], ...] = (
    str,
    html.escape,
    lambda path: ascii(path)[1:-1],
    lambda path: json.dumps(path)[1:-1],
    lambda path: json.dumps(path, ensure_ascii=False)[1:-1],
)


class Folders:
    """The folders that answers must not tell.

    Args:
        paths: of files and folders; those of Python and of temporary files join them.
    """

    def __init__(self, paths: Iterable[str | Path]) -> None:
        given = [*map(str, paths), str(Path.home()), tempfile.gettempdir(), *sysconfig.get_paths().values()]
        known = {form for path in given if path for form in (os.path.abspath(path), os.path.realpath(path))} - {os.sep}
        written = {write(path).encode("utf-8", "backslashreplace"): path for path in known for write in WRITTEN}
        longest_first = b"|".join(re.escape(text) for text in sorted(written, key=len, reverse=True))
        self._pattern = re.compile(rb"(%b)(?:(/+)|(?!%b))" % (longest_first, MORE_OF_NAME))

    def left_out(self, text: bytes) -> bytes:
        """A text as it may be told, in whichever way it writes paths: plain, as JSON or as HTML."""
        return self._pattern.sub(lambda found: b"" if found[2] else found[1].rpartition(b"/")[2], text)


def open_plain(path: str | Path, within: str | Path) -> BufferedReader:
    """A plain file below a folder, to read.

    Args:
        path: of the file.
        within: the folder, by its real path.

    Raises OSError: it is a link, a pipe, a socket or a device, or a link on the way leads out of the folder.
    """
    # A pipe without a writer would keep its reader waiting.
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        # The kernel knows where the file that was opened is; by its path another one may be found by now.
        known = f"/proc/self/fd/{handle}"
        opened = os.readlink(known) if os.path.islink(known) else os.path.realpath(path)
        is_inside = os.path.commonpath([opened, within]) == str(within)
        if not is_inside or not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "no plain file of its folder")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_plain(path: Path, most: int) -> bytes:
    """The content of a plain file. Raises OSError as `open_plain` does, ValueError for more than `most` bytes."""
    with open_plain(path, os.path.realpath(path.parent)) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"more than {most} bytes")
    return content
