"""Data that several tests share, made once."""

from pathlib import Path

import pytest

from sam2sgp.data.phantom import make_phantoms


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where processes share the files, those that take long come first, so that none is left over at the end."""
    if config.getoption("numprocesses", None) is None and not hasattr(config, "workerinput"):
        return
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: 0 if item.path in slow else 1 if "e2e" in item.path.parts else 2)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> Path:
    """A small phantom data set of all modalities."""
    directory = tmp_path_factory.mktemp("phantoms") / "set"
    return make_phantoms(directory, patients_per_modality=8, num_slices=6, seed=1, progress=False)
