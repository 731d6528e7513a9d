"""What processes that tests start needn't import."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

# MONAI and pandas import them where they are, and none is a requirement of what runs here.
OPTIONAL = ("mlflow", "pyarrow", "matplotlib", "IPython")


@cache
def lean_path() -> str:
    """A folder for a process's PYTHONPATH, with which there is none of `OPTIONAL`.

    They take two seconds of each process, and most installations don't have them.
    """
    folder = Path(tempfile.mkdtemp(prefix="lean-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in OPTIONAL:
        (folder / f"{name}.py").write_text("raise ImportError('left out in tests')\n")
    return str(folder)
