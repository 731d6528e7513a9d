"""A folder with the images `A` and `B`, the datastore of it, and a folder for uploads."""

from pathlib import Path

import pytest

from lib.stores.audit import Audit
from lib.stores.folder import ConfinedDatastore
from tests.helpers.store_files import LIMIT, volume


@pytest.fixture
def studies(tmp_path) -> Path:
    folder = tmp_path / "studies"
    folder.mkdir()
    for name in "AB":
        volume(folder / f"{name}.nii.gz")
    return folder


@pytest.fixture
def opened(tmp_path, studies):
    return lambda: ConfinedDatastore(str(studies), tmp_path / "state", LIMIT, Audit(tmp_path / "state" / "audit.jsonl"))


@pytest.fixture
def store(opened):
    return opened()


@pytest.fixture
def uploads(tmp_path) -> Path:
    (tmp_path / "uploads").mkdir()
    return tmp_path / "uploads"
