"""Data that several tests share, made once."""

from pathlib import Path

import pytest

from sam2sgp.data.phantom import make_phantoms


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> Path:
    """A small phantom data set of all modalities."""
    directory = tmp_path_factory.mktemp("phantoms") / "set"
    return make_phantoms(directory, patients_per_modality=8, num_slices=6, seed=1, progress=False)
