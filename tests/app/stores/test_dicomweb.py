"""The datastore on an archive that answers late, not at all, or with nonsense, and ids that lead elsewhere."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from lib.checks import Conflict, Forbidden, NotFound, RequestError, StorageError, UnsupportedFile
from lib.settings import Settings
from lib.stores.archive import ArchiveError
from lib.stores.audit import Audit
from lib.stores.decisions import state_of
from lib.stores.dicomweb import DicomWebDatastore
from lib.stores.naming import declared
from sam2sgp.data import read_image, read_label, write_label
from sam2sgp.errors import ConfigError, DataError
from tests.helpers.archives import fake_archive, series_entry, series_files
from tests.helpers.uploads import crashing_dicom

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


def test_a_series_whose_decoder_crashes_is_an_error_for_that_series_only(fake, make):
    fake.series = [series_entry("1.5", instances=1), series_entry("1.6")]
    datastore, sound = make(), fake.files
    fake.files = [crashing_dicom()]
    with pytest.raises(DataError, match="crashes"):
        datastore.image_file("1.5")
    fake.files = sound
    assert read_image(datastore.get_image_uri("1.6")).geometry.native_shape == (8, 8, 2)
    assert datastore.image_file("1.6").exists()


@pytest.mark.parametrize("content", [b"not DICOM", bytes(200), b"\x00" * 128 + b"DICM"])
def test_a_series_with_a_file_that_is_not_dicom_is_refused_whole(fake, make, tmp_path, content):
    fake.series = [series_entry("1.5", instances=3)]
    fake.files.append(content)
    with pytest.raises(ArchiveError, match="expected an instance of series 1.5"):
        make().get_image_uri("1.5")
    assert list((tmp_path / "archive" / "images").iterdir()) == []


@pytest.mark.parametrize("sent", [[0], [0, 0]])
def test_a_series_of_fewer_instances_than_the_archive_lists_is_refused_and_asked_for_again(fake, make, tmp_path, sent):
    """It would be segmented, and its label approved, without the slices that lack at its ends."""
    fake.series, sound = [series_entry("1.5")], fake.files
    fake.files = [sound[number] for number in sent]
    datastore = make()
    with pytest.raises(ArchiveError, match="series 1.5: expected the 2 instances .* found that it sends 1;"):
        datastore.get_image_uri("1.5")
    assert list((tmp_path / "archive" / "images").iterdir()) == [] and not datastore.is_at_hand("1.5")
    fake.files = sound
    assert len(list(Path(datastore.get_image_uri("1.5")).iterdir())) == 2


def test_a_series_whose_number_of_instances_is_not_listed_is_taken_as_it_comes(fake, make):
    fake.series, fake.files = [series_entry("1.5", instances=0)], fake.files[:1]
    assert len(list(Path(make().get_image_uri("1.5")).iterdir())) == 1


def test_uploads_are_refused_where_there_is_no_place_for_them(nowhere, tmp_path):
    upload = tmp_path / "upload.nii.gz"
    # The name is judged first, then whether there is such an image, and then the file.
    with pytest.raises(UnsupportedFile):
        nowhere.save_label("1.2.3", str(tmp_path / "upload.txt"), "final", {})
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.uint8), np.eye(4)), upload)
    with pytest.raises(ArchiveError):
        nowhere.save_label("1.2.3", str(upload), "final", {})
    with pytest.raises(Forbidden):
        nowhere.add_image("1.2.3", str(upload), {})


def test_new_names_of_labels_that_come_at_once_get_values_of_their_own(fake, make, tmp_path, monkeypatch):
    """Both are on their way to the archive before either is stored there."""
    names = {"1.5": "liver", "1.6": "spleen"}
    fake.series = [series_entry(uid) for uid in names]
    datastore = make()
    geometry = read_image(datastore.get_image_uri("1.5")).geometry
    file = tmp_path / "label.nii.gz"
    write_label(file, np.ones((2, 8, 8), np.uint8), geometry)
    meeting = threading.Barrier(2, timeout=SOON)

    def approve(self, series, folder, label) -> str:
        meeting.wait()
        return f"{series.uid}.1"

    monkeypatch.setattr(DicomWebDatastore, "_approve", approve)

    def save(uid: str) -> dict[int, str]:
        datastore.save_label(uid, str(file), "final", {"label_info": [{"idx": 1, "name": names[uid]}]})
        return declared(datastore.get_label_info(uid, "final"))

    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(names, pool.map(save, names), strict=True))
    assert {uid: list(entry.values()) for uid, entry in found.items()} == {uid: [name] for uid, name in names.items()}
    assert {value for entry in found.values() for value in entry} == {1, 2}


def test_what_was_corrected_is_kept_on_the_series_grid_and_only_as_long_as_nothing_changed(fake, make, tmp_path):
    fake.series, fake.keeps = [series_entry("1.5")], True
    datastore = make(audit=Audit(tmp_path / "audit.jsonl"))
    folder = datastore.get_image_uri("1.5")
    geometry = read_image(folder).geometry
    labels = np.zeros((2, 8, 8), np.uint8)
    labels[1, 2, 3] = 1
    file = tmp_path / "label.nii.gz"
    write_label(file, labels, geometry)
    info = {"label_info": [{"idx": 1, "name": "liver"}]}
    datastore.correct("1.5", str(file), "draft", info, state_of(folder), {"draft": ""})
    draft = datastore.get_label_uri("1.5", "draft")
    assert np.array_equal(read_label(draft, geometry), labels) and datastore.history.versions("1.5") == []
    with pytest.raises(Conflict, match="expected its label 'draft' as it was shown"):
        datastore.correct("1.5", str(file), "draft", info, state_of(folder), {"draft": ""})
    datastore.correct("1.5", str(file), "draft", info, state_of(folder), {"draft": state_of(draft)})
    assert [entry["tag"] for entry in datastore.history.versions("1.5")] == ["draft"]
    # What viewers submit is kept as well, but for predictions.
    for tag in ("final", "draft", "original"):
        for name in ("ann", "ben"):
            model = {"model": "sam2sgp"} if tag == "original" else {}
            datastore.save_label("1.5", str(file), tag, {**info, **model, "user": name})
    kept = [(entry["tag"], entry["user"]) for entry in datastore.history.versions("1.5")]
    assert kept[0] == ("draft", "ann") and ("final", "ann") in kept and "original" not in dict(kept)


def test_a_draft_without_its_line_in_the_audit_log_is_not_saved_and_one_that_fails_has_none(
    fake, make, tmp_path, monkeypatch
):
    fake.series = [series_entry("1.5")]
    log = tmp_path / "audit.jsonl"
    datastore = make(audit=Audit(log))
    folder = datastore.get_image_uri("1.5")
    file = tmp_path / "label.nii.gz"
    info = {"label_info": [{"idx": 1, "name": "liver"}]}

    def save(value: int) -> None:
        write_label(file, np.full((2, 8, 8), value, np.uint8), read_image(folder).geometry)
        seen = {"draft": datastore.state_of_label("1.5", "draft")}
        datastore.correct("1.5", str(file), "draft", info, state_of(folder), seen)

    save(1)
    before, draft = log.read_bytes(), Path(datastore.get_label_uri("1.5", "draft"))
    content = draft.read_bytes()
    for where in (datastore._kept, datastore._audit):
        with monkeypatch.context() as patch:
            patch.setattr(where, "write", lambda *_, **__: (_ for _ in ()).throw(StorageError("full")))
            with pytest.raises(StorageError):
                save(0)
        assert log.read_bytes() == before and draft.read_bytes() == content


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


def test_instances_of_another_series_are_no_image_of_this_one(fake, make):
    fake.series = [series_entry("1.5")]
    fake.foreign = True
    with pytest.raises(ArchiveError, match="an instance of series 1.5, found one with SeriesInstanceUID"):
        make().get_image_uri("1.5")
    fake.foreign = False
    assert len(list(Path(make().get_image_uri("1.5")).iterdir())) == 2
