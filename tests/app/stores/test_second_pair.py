"""A second pair of eyes: whoever approves a label isn't who changed it last, whatever happens at once."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import copy_context
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from lib.checks import Conflict, Forbidden
from lib.settings import Settings
from lib.stores.audit import Audit, current_user
from lib.stores.decisions import DRAFT, FINAL, state_of
from lib.stores.dicomweb import DicomWebDatastore
from lib.stores.folder import ConfinedDatastore
from lib.stores.opening import open_datastore
from sam2sgp.data import read_image, write_label
from sam2sgp.errors import DataError
from tests.app.conftest import APP
from tests.helpers.archives import fake_archive, series_entry, series_files

SIZE = (8, 6, 3)


def named(user: str | None, act, *arguments):
    """Do something as a user."""

    def run():
        current_user.set(user)
        return act(*arguments)

    return copy_context().run(run)


@pytest.fixture
def store(tmp_path):
    (tmp_path / "studies").mkdir()
    nib.save(nib.Nifti1Image(np.zeros(SIZE, np.float32), np.eye(4)), tmp_path / "studies" / "A.nii.gz")
    for value in (1, 2):
        nib.save(nib.Nifti1Image(np.full(SIZE, value, np.uint8), np.eye(4)), tmp_path / f"{value}.nii.gz")
    made = ConfinedDatastore(
        str(tmp_path / "studies"), tmp_path / "state", 1 << 26, Audit(tmp_path / "state" / "audit.jsonl")
    )
    made.approve_own = False
    return made


@pytest.fixture
def draw(store, tmp_path):
    """Saves a draft as a user does on the review page."""

    def by(user: str, value: int = 1) -> str:
        info = {"label_info": [{"name": "liver", "idx": 1}, {"name": "cyst", "idx": 2}], "user": user}
        seen = {DRAFT: store.state_of_label("A", DRAFT)}
        image = state_of(store.get_image_uri("A"))
        return named(user, store.correct, "A", str(tmp_path / f"{value}.nii.gz"), DRAFT, info, image, seen)

    return by


def test_a_label_is_approved_by_somebody_else_and_a_prediction_by_anybody(store, draw, tmp_path):
    draw("ann")
    for user in ("ann", None):
        with pytest.raises(Forbidden, match="expected somebody else than its author"):
            named(user, store.approve, "A", DRAFT)
    named("ben", store.approve, "A", DRAFT)
    assert store.tags() == {"A": [FINAL]}
    named("ann", store.remove, "A")
    with pytest.raises(Forbidden, match="'ann', who made or changed it last"):
        named("ann", store.approve, "A", "removed")
    # Whoever had it segmented hasn't made it.
    store.save_label("A", str(tmp_path / "1.nii.gz"), "original", {"model": "sam2sgp", "user": "ann"})
    named("ann", store.approve, "A", "original")


def test_a_label_that_becomes_ones_own_while_one_approves_it_is_not_approved(store, draw, monkeypatch):
    """The change comes after everything that could be looked at without the lock."""
    draw("ben")
    deciding = type(store).deciding

    @contextmanager
    def after_another_change(self, image_id):
        monkeypatch.setattr(type(store), "deciding", deciding)
        thread = threading.Thread(target=draw, args=("ann", 2))
        thread.start()
        thread.join()
        with deciding(self, image_id):
            yield

    monkeypatch.setattr(type(store), "deciding", after_another_change)
    with pytest.raises(Forbidden):
        named("ann", store.approve, "A", DRAFT)
    assert store.tags() == {"A": [DRAFT]} and store.get_label_info("A", DRAFT)["user"] == "ann"


def test_of_many_at_once_nobody_approves_what_is_his(store, draw):
    def work(number: int) -> None:
        user = ("ann", "ben", "eve")[number % 3]
        with suppress(Conflict, Forbidden, DataError):
            draw(user, 1 + number % 2)
        with suppress(Conflict, Forbidden, DataError):
            named(user, store.approve, "A", DRAFT)
            approved.append(user)

    approved: list[str] = []
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(48)))
    lines = [json.loads(line) for line in store._audit.path.read_text().splitlines()]
    author, checked = None, 0
    for line in lines:
        if line["action"] == "correct":
            author = line["user"]
        else:
            assert line["action"] == "approve" and line["user"] != author
            checked += 1
    assert checked == len(approved) > 0


def test_the_label_of_an_archives_series_is_not_approved_by_its_author(tmp_path):
    with fake_archive() as archive:
        archive.series, archive.files = [series_entry("1.5")], series_files(tmp_path / "source")
        store = DicomWebDatastore(archive.address, tmp_path / "archive", 1 << 20, expiry=0.0)
        store.approve_own = False
        folder = store.get_image_uri("1.5")
        write_label(tmp_path / "label.nii.gz", np.ones((2, 8, 8), np.uint8), read_image(folder).geometry)
        info = {"label_info": [{"idx": 1, "name": "liver"}], "user": "ann"}
        sent = ("1.5", str(tmp_path / "label.nii.gz"), FINAL, info, state_of(folder), {FINAL: ""})
        assert named("ann", store.correct, *sent) == DRAFT
        with pytest.raises(Forbidden, match="'ann', who made or changed it last"):
            named("ann", store.approve, "1.5", DRAFT)
        assert store.tags() == {"1.5": [DRAFT]} and archive.stored == []


@pytest.mark.parametrize("studies", ["folder", "http://127.0.0.1:9/dicom-web"])
def test_the_setting_reaches_the_datastore_of_either_kind(tmp_path, studies):
    if studies == "folder":
        studies = str(tmp_path / "images")
        Path(studies).mkdir()
    conf = {"state_dir": str(tmp_path / "state"), "user_header": "X-Remote-User"}
    for value in ("true", "false"):
        settings = Settings.from_conf(APP, studies, {**conf, "approve_own": value})
        assert open_datastore(settings).approve_own is (value == "true")
    assert open_datastore(Settings.from_conf(APP, studies, conf)).approve_own is True
