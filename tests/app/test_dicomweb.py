"""The datastore on an archive that answers late, not at all, or with nonsense, and ids that lead elsewhere."""

import tempfile
import threading
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from lib import dicomweb
from lib.archive import ArchiveError
from lib.checks import Forbidden, NotFound, RequestError, UnsupportedFile
from lib.dicomweb import DicomWebDatastore
from lib.settings import Settings
from sam2sgp.errors import ConfigError
from tests.app.archives import fake_archive, series_entry, series_files

SILENCE = 0.2
SOON = 10.0


@pytest.fixture
def fake(tmp_path):
    with fake_archive() as made:
        made.files = series_files(tmp_path / "source")
        yield made


@pytest.fixture
def make(fake, tmp_path):
    """Makes a datastore on the archive; failures are not remembered for long."""

    def made(silence=SOON, patience=SOON, **options) -> DicomWebDatastore:
        datastore = DicomWebDatastore(
            fake.address, tmp_path / "archive", 1 << 20, expiry=0.0, silence=silence, patience=patience, **options
        )
        datastore._index._retry = datastore._archive.breaker._retry = 0.0
        return datastore

    return made


@pytest.fixture
def nowhere(tmp_path):
    """A datastore whose archive isn't there."""
    return DicomWebDatastore("http://127.0.0.1:9/dicom-web", tmp_path / "archive", 1 << 20, patience=SOON)


def test_an_archive_that_is_not_there_gives_empty_lists_and_says_why(nowhere):
    assert nowhere.list_images() == nowhere.get_labeled_images() == nowhere.get_unlabeled_images() == []
    assert nowhere.status()["total"] == 0 and nowhere.json()["objects"] == {}
    state = nowhere.state()
    assert not state["reachable"] and state["since"] and "found no answer" in state["problem"]
    with pytest.raises(ArchiveError, match="image 1.2.3: expected it in the archive's lists.*not up to date"):
        nowhere.get_image_uri("1.2.3")


def test_series_are_found_when_the_archive_answers_at_last(fake, make):
    fake.series = [series_entry("1.5")]
    fake.behave = lambda handler: handler.answer(b"", status=503) or True
    datastore = make()
    assert datastore.list_images() == [] and not datastore.state()["reachable"]
    fake.behave = lambda handler: False
    assert datastore.list_images() == ["1.5"]
    assert datastore.state() == {"reachable": True, "since": None, "problem": None, "labels_to_fetch": 0}
    with pytest.raises(NotFound):
        datastore.get_image_uri("1.6")
    assert len(list(Path(datastore.get_image_uri("1.5")).iterdir())) == 2


def test_a_silent_archive_stops_the_request_for_a_series_and_no_other(fake, make, tmp_path):
    fake.series = [series_entry("1.5"), series_entry("1.6")]
    datastore = make(patience=0.05)
    datastore._index.lists(SOON)
    kept = Path(datastore.get_image_uri("1.6"))
    waiting = threading.Event()

    def silent(handler) -> bool:
        waiting.set()
        return handler.silent()

    fake.behave = silent
    failed = []

    def fetch() -> None:
        try:
            datastore.get_image_uri("1.5")
        except ArchiveError as error:
            failed.append(error)

    thread = threading.Thread(target=fetch)
    thread.start()
    assert waiting.wait(SOON)
    started = time.monotonic()
    for _ in range(20):
        assert datastore.list_images() == ["1.5", "1.6"]
        assert datastore.pairs_at_hand() == {} and datastore.get_image_info("1.5")["Modality"] == "CT"
        assert datastore.get_image_uri("1.6") == str(kept)
    datastore.prepare(0.05)
    assert time.monotonic() - started < SOON / 2 and thread.is_alive()
    fake.let_go.set()
    thread.join()
    assert failed and [path.name for path in (tmp_path / "archive" / "images").iterdir()] == ["1.6"]


@pytest.mark.parametrize("content", [b"not DICOM", bytes(200), b"\x00" * 128 + b"DICM"])
def test_a_series_with_a_file_that_is_not_dicom_is_refused_whole(fake, make, tmp_path, content):
    fake.series = [series_entry("1.5", instances=3)]
    fake.files.append(content)
    with pytest.raises(ArchiveError, match="expected an instance of series 1.5"):
        make().get_image_uri("1.5")
    assert list((tmp_path / "archive" / "images").iterdir()) == []


def test_uploads_that_are_refused_leave_nothing_behind(nowhere, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    upload = tmp_path / "tmp" / "upload.nii.gz"
    upload.write_bytes(b"label")
    with pytest.raises(UnsupportedFile):
        nowhere.save_label("1.2.3", str(upload), "final", {})
    assert not upload.exists()
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.uint8), np.eye(4)), upload)
    with pytest.raises(ArchiveError):
        nowhere.save_label("1.2.3", str(upload), "final", {})
    assert not upload.exists()
    upload.write_bytes(b"image")
    with pytest.raises(Forbidden):
        nowhere.add_image("1.2.3", str(upload), {})
    monkeypatch.setattr(dicomweb, "check_tag", lambda tag: 1 / 0)
    upload.write_bytes(b"label")
    with pytest.raises(ZeroDivisionError):
        nowhere.save_label("1.2.3", str(upload), "final", {})
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("image_id", ["../1.2", "/etc/passwd", "1.2/3", "", "1.2*", "1" * 70])
def test_ids_are_uids(nowhere, tmp_path, image_id):
    for ask in (
        nowhere.get_image_uri,
        nowhere.get_image_info,
        nowhere.get_labels_by_image_id,
        lambda uid: nowhere.get_label_uri(uid, "final"),
        lambda uid: nowhere.remove_label(uid, "final"),
        lambda uid: nowhere.update_image_info(uid, {}),
        lambda uid: nowhere.save_label(uid, "label.nii.gz", "final", {}),
    ):
        with pytest.raises(RequestError, match="expected a DICOM UID"):
            ask(image_id)
    assert not (tmp_path / "archive").exists()


def test_settings_of_the_archive_are_checked(tmp_path):
    app = tmp_path / "apps" / "sam2sgp"
    for key, value in (("dicomweb_filter", "CT"), ("dicomweb_expiry", "-1"), ("dicomweb_timeout", "0")):
        with pytest.raises(ConfigError, match=key):
            Settings.from_conf(app, "http://127.0.0.1:9", {key: value})
