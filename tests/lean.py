"""What processes that tests start needn't import."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path


@cache
def lean_path() -> str:
    """A folder for a process's PYTHONPATH, with which there is no `mlflow`: where there is, MONAI imports it first.

    That takes a second of each process, and most installations don't have it.
    """
    folder = Path(tempfile.mkdtemp(prefix="lean-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "mlflow.py").write_text("raise ImportError('left out in tests')\n")
    return str(folder)
