"""Support-set guided segmentation of medical images: SAM2-SGP (arXiv 2506.19658) for MONAI."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`Segmenter`, imported when it is asked for: it brings torch and MONAI along."""
    if name == "Segmenter":
        return import_module("sam2sgp.segmenter").Segmenter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
