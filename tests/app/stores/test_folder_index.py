"""The index of a folder: damaged, of an older version, too large; and what is known is not lost with it."""

import errno
import json

import pytest

from lib.checks import RequestError, StorageError
from tests.helpers.store_files import label, tree, volume


def test_a_damaged_index_is_rebuilt_and_each_damaged_one_is_kept(opened, studies, uploads):
    info = {"label_info": [{"name": "liver", "idx": 1}], "note": "kept"}
    opened().save_label("A", str(label(uploads / "a.nii.gz")), "final", info)
    index = studies / "datastore_v2.json"
    deep = b'{"objects": {"A": ' + b"[" * 100_000
    contents = [index.read_bytes()[:100], b"", b'{"name": 3}', b"\xff\xfe", deep]
    for number, content in enumerate(contents, 1):
        index.write_bytes(content)
        for store in (opened(), opened()):
            assert store.get_labeled_images() == ["A"] and store.get_label_info("A", "final")["note"] == "kept"
        kept = studies / f"datastore_v2.json.damaged{f'-{number}' if number > 1 else ''}"
        assert kept.read_bytes() == content
    index.write_bytes(b"{")
    store = opened()
    (problem,) = store.status()["problems"]
    assert problem.startswith(
        "datastore_v2.json: expected an index, found it damaged; kept as datastore_v2.json.damaged-6"
    )
    store.save_label("B", str(label(uploads / "b.nii.gz")), "original", {})
    assert opened().get_label_info("A", "final")["label_info"] == info["label_info"]


def test_without_a_copy_a_damaged_index_is_rebuilt_from_the_files(opened, studies, uploads, tmp_path):
    opened().save_label("A", str(label(uploads / "a.nii.gz")), "final", {"note": "lost"})
    (studies / "datastore_v2.json").write_bytes(b"{")
    for copy in (tmp_path / "state").glob("index-*.json"):
        copy.write_bytes(b"[]")
    store = opened()
    assert store.get_labels_by_image_id("A") == {"final": "A"} and "note" not in store.get_label_info("A", "final")


BAD_ENTRIES = {
    "label info": {"label": {"ts": "x", "note": "kept"}},
    "classes": {"label": {"label_info": [{"idx": "1"}, {"idx": 1, "name": "liver"}], "note": "kept"}},
    "deep label": {"label": {"deep": json.loads("[" * 197 + "]" * 197), "note": "kept"}},
    "deep image": {"image": {"deep": json.loads('{"a":' * 197 + "1" + "}" * 197)}},
    "patient": {"image": {"PatientID": ["x"]}},
    "number": {"image": {"ts": float("nan")}},
    "kind": {"entry": [1, 2]},
    "label kind": {"labels": {"final": 7}},
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_a_bad_entry_of_an_older_version_costs_only_itself(opened, studies, uploads, caplog, case):
    store = opened()
    for name in "AB":
        store.save_label(name, str(label(uploads / f"{name}.nii.gz")), "final", {"note": f"of {name}"})
    index = studies / "datastore_v2.json"
    content = json.loads(index.read_text())
    bad, entry = BAD_ENTRIES[case], content["objects"]["A"]
    entry["labels"]["final"]["info"].update(bad.get("label", {}))
    entry["image"]["info"].update(bad.get("image", {}))
    entry["labels"] = bad.get("labels", entry["labels"])
    content["objects"]["A"] = bad.get("entry", entry)
    index.write_text(json.dumps(content))
    store = opened()
    assert store.get_labeled_images() == ["A", "B"] and store.get_label_info("B", "final")["note"] == "of B"
    if "label" in bad:
        assert store.get_label_info("A", "final")["note"] == "kept"
    if case in ("label info", "deep label", "classes", "deep image", "patient", "number"):
        (problem,) = store.status()["problems"]
        assert "A: " in problem and problem.endswith("this is left out.") and problem in caplog.text
    assert not list(studies.glob("*.damaged*"))
    json.dumps([store.json(), store.status(), store.get_image_info("A")], allow_nan=False)
    store.save_label("A", str(label(uploads / "again.nii.gz", 2)), "final", {})
    assert "problems" not in opened().status()


@pytest.mark.parametrize("info", [{"ts": "x"}, {"a": json.loads("[" * 197 + "]" * 197)}, {"user": 7}, [1]])
def test_a_record_that_cannot_be_read_again_is_refused_on_every_path(store, opened, uploads, info):
    store.save_label("A", str(label(uploads / "a.nii.gz")), "final", {"note": "kept"})
    new = volume(uploads / "C.nii.gz")
    for call in (
        lambda: store.update_label_info("A", "final", info),
        lambda: store.update_image_info("A", info),
        lambda: store.save_label("A", str(label(uploads / "b.nii.gz")), "original", info),
        lambda: store.add_image("C", str(new), info),
    ):
        with pytest.raises(RequestError) as caught:
            call()
        assert caught.value.status == 422
    for found in (store, opened()):
        assert found.list_images() == ["A", "B"] and found.get_labels_by_image_id("A") == {"final": "A"}
        assert found.get_label_info("A", "final")["note"] == "kept" and "problems" not in found.status()


def test_an_index_that_names_folders_elsewhere_does_not_move_the_datastore(opened, studies, tmp_path):
    entry = {"image": {"ext": ".nii.gz"}, "labels": {"../../x": {"ext": ".nii.gz"}}}
    content = {"name": "n", "description": "d", "images_dir": "/etc", "labels_dir": "../out"}
    index = {**content, "objects": {"../A": entry, "A": entry}}
    (studies / "datastore_v2.json").write_text(json.dumps(index))
    store = opened()
    assert store.list_images() == ["A", "B"] and store.get_labels_by_image_id("A") == {}
    assert not (tmp_path / "out").exists()


def test_offering_an_image_does_not_write_the_index(store, studies):
    store.update_image_info("A", {"known": 1})
    before = tree(studies)
    store.update_image_info("A", {"strategy": {"random": {"ts": 1}}})
    assert tree(studies) == before
    assert store.get_image_info("A")["known"] == 1
    with pytest.raises(RequestError):
        store.update_image_info("nobody", {"strategy": {}})


def test_an_index_that_can_not_be_read_now_is_not_set_aside(opened, studies, monkeypatch):
    """As where the process may open no further file."""
    datastore = opened()
    datastore.update_image_info("A", {"note": "kept"})

    def busy(path, most):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("lib.stores.folder_index.read_plain", busy)
        with pytest.raises(OSError, match="Too many"):
            datastore.refresh()
    datastore.refresh()
    assert datastore.get_image_info("A")["note"] == "kept" and not list(studies.glob("*.damaged*"))


def test_an_index_never_grows_beyond_what_is_read_again(opened, studies, monkeypatch):
    """Else notes would cost all that is known: an index that can't be read is set aside as damaged."""
    monkeypatch.setattr("lib.stores.folder_index.LARGEST_INDEX", 4096)
    datastore = opened()
    noted = 0
    with pytest.raises(StorageError, match="index: expected at most"):
        while noted < 100:
            datastore.update_image_info("A", {f"note{noted}": "x" * 100})
            noted += 1
    assert noted > 10
    for store in (datastore, opened()):
        info = store.get_image_info("A")
        assert f"note{noted - 1}" in info and f"note{noted}" not in info
    assert not list(studies.glob("*.damaged*"))
    datastore.remove_image("A")
    assert opened().list_images() == ["B"]
