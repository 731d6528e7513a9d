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
    return {**run_info, "Versions": ", ".join(versions), "Folder": str(Path.cwd()), "Command": shlex.join(_command())}


def _command() -> list[str]:
    """The words that were typed: of an installed command its name, else the interpreter and what it runs."""
    program = Path(sys.argv[0])
    return [program.name, *sys.argv[1:]] if program.name == "sam2sgp" else sys.orig_argv
