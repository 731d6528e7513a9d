"""What it takes to repeat a run: its command, the weights' hash, the versions of what computed it."""

import platform
import shlex
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from sam2sgp import __version__
from sam2sgp.files import sha256_of

PACKAGES = ("torch", "monai", "numpy")


def run_info_of(given: Mapping[str, object]) -> dict[str, str]:
    """What a run says of itself, in its order, then how to repeat it.

    Args:
        given: {name: value}; the file at "Weights" is hashed.
    """
    run_info = {name: str(value) for name, value in given.items()}
    weights = Path(run_info.get("Weights", ""))
    if weights.is_file():
        run_info["SHA-256 of the weights"] = sha256_of(weights)
    versions = [f"sam2sgp {__version__}", f"Python {platform.python_version()}"]
    versions += [f"{name} {metadata.version(name)}" for name in PACKAGES]
    return {**run_info, "Versions": ", ".join(versions), "Command": shlex.join(sys.orig_argv)}
