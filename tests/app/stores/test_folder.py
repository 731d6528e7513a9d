"""The confined datastore: names, links, and checks of images and labels."""

import json
import logging
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import itk
import nibabel as nib
import nrrd
import numpy as np
import pytest
from PIL import Image

import lib.stores.folder
import lib.stores.folder_index
from lib.checks import (
    BadLabel,
    Conflict,
    NotFound,
    RequestError,
    StorageError,
)
from lib.stores.folder import ConfinedDatastore
from lib.stores.naming import declared
from sam2sgp.data.io import read_image, read_label
from sam2sgp.errors import DataError
from tests.helpers.dicom_files import write_series
from tests.helpers.store_files import LIMIT, SIZE, label, tree, volume

ILL_IDS = [
    "../x",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "..",
    ".",
    ".hidden",
    "",
    "a\0b",
    "a\nb",
    "\udcff",
    "x" * 181,
    " a",
    "a\x1b",
]


# Names


@pytest.mark.parametrize("image_id", ILL_IDS)
def test_ids_that_could_lead_elsewhere_are_refused_and_nothing_changes(store, studies, uploads, tmp_path, image_id):
    outside = tmp_path / "x.nii.gz"
    volume(outside)
    sent = label(uploads / "sent.nii.gz")
    before = tree(studies)
    for call in (
        lambda: store.get_image_uri(image_id),
        lambda: store.get_label_uri(image_id, "final"),
        lambda: store.save_label(image_id, str(sent), "final", {}),
        lambda: store.remove_image(image_id),
        lambda: store.remove_label(image_id, "final"),
        lambda: store.update_image_info(image_id, {"a": 1}),
        lambda: store.add_image(image_id or "..", str(sent), {}),
    ):
        with pytest.raises(RequestError) as caught:
            call()
        assert caught.value.status in (400, 404)
    assert tree(studies) == before and outside.exists()


@pytest.mark.parametrize("tag", ["../..", "/tmp", "a/b", "..", "", "a.b", "x" * 65, "é", "a\0"])
def test_tags_that_could_lead_elsewhere_are_refused(store, studies, uploads, tag):
    before = tree(studies)
    with pytest.raises(RequestError, match="label tag"):
        store.save_label("A", str(label(uploads / "l.nii.gz")), tag, {})
    with pytest.raises(RequestError, match="label tag"):
        store.get_label_uri("A", tag)
    assert tree(studies) == before


# Links and files of the folder


def test_links_out_of_the_folder_are_not_followed(store, studies, tmp_path, uploads, caplog):
    secret = volume(tmp_path / "secret.nii.gz")
    (studies / "C.nii.gz").symlink_to(secret)
    (studies / "D.nii.gz").symlink_to(studies / "A.nii.gz")
    with caplog.at_level(logging.WARNING):
        assert store.list_images() == ["A", "B", "D"]
    assert "C.nii.gz: expected a file in the datastore, found a link that leads out" in caplog.text
    with pytest.raises(NotFound):
        store.get_image_uri("C")
    outside = tmp_path / "outside"
    outside.mkdir()
    (studies / "labels" / "mine").symlink_to(outside)
    with pytest.raises(RequestError, match="link that leads out"):
        store.save_label("A", str(label(uploads / "l.nii.gz")), "mine", {})
    assert not list(outside.iterdir())


def test_a_label_in_place_of_a_link_replaces_the_link_and_not_its_target(store, studies, tmp_path, uploads):
    target = tmp_path / "target.nii.gz"
    target.write_bytes(b"precious")
    link = studies / "labels" / "final" / "A.nii.gz"
    link.symlink_to(target)
    store.save_label("A", str(label(uploads / "l.nii.gz")), "final", {})
    assert target.read_bytes() == b"precious" and not link.is_symlink()
    assert store.get_labeled_images() == ["A"]


def test_an_image_removed_between_listing_and_reading_by_a_link_out_is_refused(store, studies, tmp_path):
    assert "A" in store.list_images()
    (studies / "A.nii.gz").unlink()
    (studies / "A.nii.gz").symlink_to(volume(tmp_path / "secret.nii.gz"))
    with pytest.raises(RequestError):
        store.get_image_uri("A")


def test_labels_folder_that_leads_out_is_refused_at_the_start(tmp_path):
    studies, outside = tmp_path / "s", tmp_path / "o"
    studies.mkdir(), outside.mkdir()
    (studies / "labels").symlink_to(outside)
    with pytest.raises(StorageError, match="labels is a link out"):
        ConfinedDatastore(str(studies), tmp_path, LIMIT)
    assert not list(outside.iterdir())


def test_of_two_images_with_one_stem_one_is_used_with_a_warning(store, studies, caplog):
    Image.new("L", (8, 8)).save(studies / "A.png")
    with caplog.at_level(logging.WARNING):
        assert store.list_images() == ["A", "B"]
    assert "A.nii.gz, A.png: expected one image for each name, found 2; A.nii.gz is used" in caplog.text
    assert store.get_image_uri("A").endswith("A.nii.gz")


def test_files_that_come_and_go_are_noticed_without_a_watcher(store, studies):
    assert store.status() == {"total": 2, "completed": 0, "label_tags": {}}
    volume(studies / "C.nii.gz")
    label(studies / "labels" / "final" / "C.nii.gz")
    assert store.list_images() == ["A", "B", "C"] and store.get_labeled_images() == ["C"]
    (studies / "C.nii.gz").unlink()
    assert store.list_images() == ["A", "B"] and store.get_labeled_images() == []


def test_what_another_process_saves_is_seen_and_kept(opened, uploads):
    one, two = opened(), opened()
    one.save_label("A", str(label(uploads / "a.nii.gz")), "final", {"note": "one"})
    two.save_label("B", str(label(uploads / "b.nii.gz")), "final", {"note": "two"})
    for store in (one, two, opened()):
        assert store.get_labeled_images() == ["A", "B"]
        assert store.get_label_info("A", "final")["note"] == "one"
        assert store.get_label_info("B", "final")["note"] == "two"


def test_what_is_no_image_among_the_studies_is_named_once(tmp_path, caplog):
    folder = tmp_path / "studies"
    volume(folder.mkdir() or folder / "good.nii.gz")
    write_series(folder / "series", np.zeros((3, 4, 4), np.uint16))
    for name in ("notes.txt", ".hidden", "labels.json"):
        (folder / name).write_text("{}")
    store = ConfinedDatastore(str(folder), tmp_path, LIMIT)
    store.refresh()
    assert store.list_images() == ["good"]
    series, notes = sorted(store.left_out, key=lambda sentence: sentence.startswith("notes"))
    assert series.startswith("series/: a folder of DICOM files") and "DICOMweb" in series
    assert notes == "notes.txt: not an image (.txt)."
    assert [record.message.count("notes.txt") for record in caplog.records if "notes" in record.message] == [1]


def test_ten_thousand_images_have_a_cheap_status(tmp_path, monkeypatch):
    folder = tmp_path / "many"
    (folder / "labels" / "final").mkdir(parents=True)
    for number in range(10_000):
        (folder / f"i{number:05}.png").touch()
    store = ConfinedDatastore(str(folder), tmp_path, LIMIT)
    # Until the folder's time is old enough to be relied on, it is read at each call.
    (
        os.utime(folder, (1e9, 1e9)),
        os.utime(folder / "labels", (1e9, 1e9)),
        os.utime(folder / "labels" / "final", (1e9, 1e9)),
    )
    os.utime(folder / "labels" / "original", (1e9, 1e9))
    scans, scan = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scans.append(path) or scan(path))
    for _ in range(100):
        assert store.status()["total"] == 10_000
    assert 0 < len(scans) <= 5


# Labels


def test_an_approved_label_is_stored_listed_and_noted(store, studies, uploads, tmp_path):
    sent = label(uploads / "sent.nii.gz")
    assert store.save_label("A", str(sent), "final", {"label_info": [{"name": "liver", "idx": 1}]}) == "A"
    assert (studies / "labels/final/A.nii.gz").read_bytes() == sent.read_bytes()
    assert store.get_unlabeled_images() == ["B"]
    assert store.datalist(full_path=False) == [{"image": "A.nii.gz", "label": "labels/final/A.nii.gz"}]
    assert store.get_label_info("A", "final")["label_info"][0]["name"] == "liver"
    store.remove_label("A", "final")
    assert store.get_unlabeled_images() == ["A", "B"]
    noted = [json.loads(line) for line in (tmp_path / "state/audit.jsonl").read_text().splitlines()]
    assert [entry["action"] for entry in noted] == ["approve", "remove label"]
    assert noted[0]["sha256"] == noted[1]["sha256"]


def test_an_empty_label_is_legal_and_its_image_counts_as_labelled(store, uploads):
    store.save_label("A", str(label(uploads / "empty.nii.gz", 0)), "final", {})
    assert store.get_labeled_images() == ["A"]


def truncated(path: Path) -> Path:
    content = label(path).read_bytes()
    path.write_bytes(content[: len(content) - 40])
    return path


def probabilities(path: Path) -> Path:
    return volume(path, np.full(SIZE, 0.5, np.float32))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: label(path, size=(12, 10, 5)), "expected a label of its image's size"),
        (probabilities, "expected whole class values"),
        (lambda path: label(path, 7), "expected only the declared classes"),
    ],
)
def test_a_label_that_does_not_fit_is_refused_and_the_approved_one_stays(store, studies, uploads, make, message):
    (studies / "labels.json").write_text('{"liver": 1}')
    store.save_label("A", str(label(uploads / "good.nii.gz")), "final", {})
    before = tree(studies)
    with pytest.raises(BadLabel, match=message) as caught:
        store.save_label("A", str(make(uploads / "bad.nii.gz")), "final", {})
    assert str(uploads) not in str(caught.value) and caught.value.status == 422
    assert tree(studies) == before


def test_labels_of_other_programs_on_the_images_voxels_are_approved(store, studies, uploads):
    """As ITK writes it for an image of two forms, and as 3D Slicer cuts it to its segment."""
    image = nib.Nifti1Image(np.zeros(SIZE, np.int16), None)
    image.header.set_qform(np.diag([-1.5, -1.5, 3.0, 1.0]), code=1)
    image.header.set_sform(nib.affines.from_matvec(np.diag([-1.5, -1.5, 3.0]), [10, 20, 30]), code=2)
    nib.save(image, studies / "A.nii.gz")
    store.refresh()
    array = np.zeros(SIZE, np.uint8)
    array[2:5, 3:5, 1:3] = 1
    placed = itk.imread(str(studies / "A.nii.gz"))
    whole = itk.image_from_array(np.ascontiguousarray(array.T))
    whole.CopyInformation(placed)
    itk.imwrite(whole, str(uploads / "itk.nii.gz"))
    header = {
        "space": "left-posterior-superior",
        "space directions": np.diag([1.5, 1.5, 3.0]),
        "space origin": np.array(placed.TransformIndexToPhysicalPoint([2, 3, 1])),
        "Segment0_LabelValue": "1",
    }
    nrrd.write(str(uploads / "slicer.seg.nrrd"), array[2:5, 3:5, 1:3], header)
    geometry = read_image(studies / "A.nii.gz").geometry
    for name in ("itk.nii.gz", "slicer.seg.nrrd"):
        store.save_label("A", str(uploads / name), "final", {})
        assert np.array_equal(geometry.to_native(read_label(store.get_label_uri("A", "final"), geometry)), array), name


def test_a_class_declared_with_the_label_is_accepted(store, studies, uploads):
    (studies / "labels.json").write_text('{"liver": 1}')
    info = {"label_info": [{"name": "tumour", "idx": 7}]}
    store.save_label("A", str(label(uploads / "l.nii.gz", 7)), "final", info)
    assert store.get_labeled_images() == ["A"]


def test_a_truncated_label_is_refused_with_any_tag(store, uploads):
    for tag in ("final", "original"):
        with pytest.raises(DataError):
            store.save_label("A", str(truncated(uploads / "cut.nii.gz")), tag, {})
    assert store.status()["label_tags"] == {}


def test_a_label_of_another_kind_replaces_the_earlier_one(tmp_path, uploads):
    studies = tmp_path / "s"
    studies.mkdir()
    Image.fromarray(np.arange(80, dtype=np.uint8).reshape(8, 10)).save(studies / "P.png")
    store = ConfinedDatastore(str(studies), tmp_path, LIMIT)
    for name in ("l.png", "l.tif", "l.png"):
        Image.fromarray(np.eye(8, 10, dtype=np.uint8)).save(uploads / name)
        store.save_label("P", str(uploads / name), "final", {})
        (file,) = (studies / "labels" / "final").iterdir()
        assert file.name == f"P{Path(name).suffix}" and store.get_label_uri("P", "final") == str(file)


def test_parallel_saves_leave_one_whole_label_and_a_sound_index(opened, studies, uploads):
    store = opened()
    sent = [label(uploads / f"{value}.nii.gz", value) for value in range(1, 9)]
    threads = [threading.Thread(target=store.save_label, args=("A", str(path), "final", {})) for path in sent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (studies / "labels/final/A.nii.gz").read_bytes() in [path.read_bytes() for path in sent]
    assert opened().status() == {"total": 2, "completed": 1, "label_tags": {"final": 1}}
    json.loads((studies / "datastore_v2.json").read_text())


# Images


def test_an_uploaded_image_is_added_once_and_never_replaces_another(store, studies, uploads):
    sent = volume(uploads / "new.nii.gz", np.ones(SIZE, np.float32))
    assert store.add_image("", str(sent), {}) == "new"
    assert store.add_image("new", str(sent), {}) == "new"
    with pytest.raises(Conflict, match="found A.nii.gz under this id"):
        store.add_image("A", str(sent), {})
    Image.new("L", (8, 8)).save(uploads / "p.png")
    with pytest.raises(Conflict):
        store.add_image("A", str(uploads / "p.png"), {})
    assert store.list_images() == ["A", "B", "new"]
    store.remove_image("new")
    assert store.list_images() == ["A", "B"] and not (studies / "new.nii.gz").exists()


def test_removing_an_image_removes_its_labels(store, studies, uploads):
    store.save_label("A", str(label(uploads / "l.nii.gz")), "final", {})
    store.remove_image("A")
    assert not (studies / "labels/final/A.nii.gz").exists() and store.list_images() == ["B"]


def test_the_archive_holds_the_approved_pairs_and_replaces_the_last_one(store, uploads, tmp_path):
    with pytest.raises(NotFound):
        store.get_dataset_archive(None)
    store.save_label("A", str(label(uploads / "l.nii.gz")), "final", {})
    paths = {store.get_dataset_archive(limit) for limit in (None, 1)}
    assert paths == {str(tmp_path / "state" / "dataset.zip")}
    import zipfile

    assert zipfile.ZipFile(paths.pop()).namelist() == ["image/A.nii.gz", "label/A.nii.gz", "metadata.json"]


def test_new_names_of_labels_that_come_at_once_get_values_of_their_own(opened, uploads, monkeypatch):
    """Both are checked before either is stored; the one that comes second is checked once more."""
    meeting, check = threading.Barrier(2, timeout=10), ConfinedDatastore._checked_label
    waits = threading.Semaphore(2)

    def checked(*arguments):
        found = check(*arguments)
        if waits.acquire(blocking=False):
            meeting.wait()
        return found

    monkeypatch.setattr(ConfinedDatastore, "_checked_label", checked)
    stores = {"A": opened(), "B": opened()}
    file = label(uploads / "l.nii.gz", 1)
    names = {"A": "liver", "B": "spleen"}
    threads = [
        threading.Thread(
            target=stores[image].save_label,
            args=(image, str(file), "final", {"label_info": [{"idx": 1, "name": name}]}),
        )
        for image, name in names.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store, values = opened(), set()
    for image, name in names.items():
        found = declared(store.get_label_info(image, "final"))
        assert list(found.values()) == [name]
        assert found.keys() == set(np.unique(read_label(store.get_label_uri(image, "final")))) - {0}
        values |= found.keys()
    assert len(values) == 2


def test_a_link_to_itself_is_left_out_and_the_rest_is_there(studies, opened):
    (studies / "loop.nii.gz").symlink_to("loop.nii.gz")
    for folder in ("labels/loop", "labels/final/loop.nii.gz"):
        (studies / folder).parent.mkdir(parents=True, exist_ok=True)
        (studies / folder).symlink_to(Path(folder).name)
    store = opened()
    assert store.list_images() == ["A", "B"]
    with pytest.raises(NotFound):
        store.get_image_uri("loop")


def test_of_many_who_wait_for_a_reading_of_the_folder_one_reads_for_all(store, monkeypatch):
    waiting, all_wait, reads = threading.Semaphore(0), threading.Event(), []
    read, times = store._read, store._times
    people = 8

    def looked():
        waiting.release()
        return times()

    def slow():
        reads.append(None)
        assert all_wait.wait(60)
        monkeypatch.setattr(store, "_times", times)
        read()

    # As right after a change, when the folders' times tell nothing.
    monkeypatch.setattr(lib.stores.folder, "CLOCK", 1e9)
    monkeypatch.setattr(store, "_times", looked)
    monkeypatch.setattr(store, "_read", slow)
    store._seen = None
    with ThreadPoolExecutor(people) as pool:
        lists = [pool.submit(store.list_images) for _ in range(people)]
        # Each of them looks before it waits.
        assert all(waiting.acquire(timeout=60) for _ in range(people))
        all_wait.set()
        assert all(found.result(60) == ["A", "B"] for found in lists)
    assert len(reads) == 1


def test_an_index_is_parsed_again_only_where_it_was_written_again(store, opened, monkeypatch):
    parse, parsed = lib.stores.folder_index._parsed_index, []
    monkeypatch.setattr(lib.stores.folder_index, "_parsed_index", lambda path: parsed.append(path) or parse(path))
    store.update_image_info("A", {"note": 1})
    counts = []
    for number in (1, 2):
        for _ in range(3):
            store._seen = None
            assert store.get_image_info("A")["note"] == number
        counts.append(len([path for path in parsed if path == store._index._path]))
        other = opened()
        parsed.clear()
        other.update_image_info("A", {"note": number + 1})
        parsed.clear()
    assert counts[1] == 1 and counts[0] <= 2


def test_the_audit_log_tells_of_each_change_that_is_made_and_of_no_other(
    store, studies, uploads, tmp_path, monkeypatch
):
    """People who copy files hold no lock: what is there when a change is made decides, not what was there before."""
    changing = store._changing

    def meanwhile(do):
        """Have something done between the last look at the folder and the next change."""

        def once(**options):
            monkeypatch.setattr(store, "_changing", changing)
            do()
            return changing(**options)

        monkeypatch.setattr(store, "_changing", once)

    sent = str(volume(uploads / "sent.nii.gz", np.ones(SIZE, np.float32)))
    store.add_image("C", sent, {})
    meanwhile((studies / "C.nii.gz").unlink)
    store.add_image("C", sent, {})
    meanwhile(lambda: shutil.copy(studies / "A.nii.gz", studies / "D.nii.gz"))
    with pytest.raises(Conflict):
        store.add_image("D", sent, {})
    meanwhile((studies / "B.nii.gz").unlink)
    with pytest.raises(NotFound):
        store.save_label("B", str(label(uploads / "l.nii.gz")), "final", {})
    (studies / "labels" / "copied").mkdir(parents=True, exist_ok=True)
    meanwhile(lambda: label(studies / "labels" / "copied" / "C.nii.gz"))
    store.remove_image("C")
    noted = [json.loads(line) for line in (tmp_path / "state" / "audit.jsonl").read_text().splitlines()]
    assert [(entry["action"], entry["image"]) for entry in noted] == [
        ("add image", "C"),
        ("add image", "C"),
        ("remove label", "C"),
        ("remove image", "C"),
    ]


def test_a_file_system_that_keeps_whole_seconds_hides_no_image(store, studies):
    """What comes within the same tick of its clock leaves the folder's time as it was."""
    tick = (time.time_ns() // 10**9 - 1) * 10**9
    folders = [studies, *(path for path in studies.rglob("*") if path.name != "C.nii.gz")]

    def tell_whole_seconds() -> None:
        for path in folders:
            os.utime(path, ns=(tick, tick))

    tell_whole_seconds()
    assert store.list_images() == ["A", "B"]
    volume(studies / "C.nii.gz")
    tell_whole_seconds()
    assert store.list_images() == ["A", "B", "C"]
