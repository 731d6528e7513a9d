"""Data that several tests share, made once, and logging as each test expects it."""

import logging
from pathlib import Path

import pytest

from sam2sgp.data.phantom import make_phantoms


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> Path:
    """A small phantom data set of all modalities."""
    directory = tmp_path_factory.mktemp("phantoms") / "set"
    return make_phantoms(directory, patients_per_modality=8, num_slices=6, seed=1, progress=False)


@pytest.fixture(autouse=True)
def _logging_is_as_at_first() -> None:
    """A run of the bundle, and libraries that it starts, configure logging for the whole process."""
    logging.disable(logging.NOTSET)
    logging.root.setLevel(logging.WARNING)
    for logger in list(logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger):
            logger.disabled = False
