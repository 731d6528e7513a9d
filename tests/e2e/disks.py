"""Small disks that can be filled and made read-only, for tests; where none can be mounted, the test is skipped.

On CI it fails instead. Rights would not do: root may write where nobody else may.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BLOCK = 4096
FILLER = ".filler"


class Disk:
    """A mounted disk. folder: where it is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def full(self) -> Iterator[None]:
        """No byte is free for the length of the block."""
        filler = self.folder / FILLER
        with open(filler, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"\0" * BLOCK)
            except OSError:
                pass
        try:
            yield
        finally:
            filler.unlink()

    def resize(self, megabytes: int) -> None:
        _run("mount", "-o", f"remount,size={megabytes}m", str(self.folder))

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Nothing can be written for the length of the block."""
        _run("mount", "-o", "remount,ro", str(self.folder))
        try:
            yield
        finally:
            _run("mount", "-o", "remount,rw", str(self.folder))


@contextmanager
def disk(folder: Path, megabytes: int) -> Iterator[Disk]:
    """A disk in memory, mounted at a folder for the length of the block."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _run("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder))
    except (OSError, subprocess.CalledProcessError) as error:
        message = f"a small disk is needed, which only root can mount: {error}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    try:
        yield Disk(folder)
    finally:
        # Lazily: a process that is being ended may still hold a file.
        _run("umount", "-l", str(folder))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
