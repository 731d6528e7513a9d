"""Where things are on the server, which is no client's business.

In: text of an answer. Out: the same text, in which files are named without the server's folders: a file below one by
its path from there, a folder by its own name. Nothing here keeps a state.
"""

import html
import json
import os
import re
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
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
