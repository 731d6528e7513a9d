"""What lies in the studies folder and is no plain file of it: links, pipes, sockets, devices, headers of other files.

Whoever may write to that folder must neither learn of a file elsewhere by way of the server nor keep it waiting.
"""

import json
import os
import socket
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from lib.checks import Conflict, RequestError
from lib.stores import folder as folder_module
from lib.stores.confined_folder import FolderGone
from lib.stores.folder import ConfinedDatastore
from sam2sgp.data import read_image
from sam2sgp.errors import DataError
from tests.helpers.uploads import VOLUME, nifti, nrrd
from tests.helpers.waiting import in_time

SECRET = "only for the eyes of others"
INDEX, JOURNAL = "datastore_v2.json", ".datastore_v2.unfinished.json"


@pytest.fixture
def studies(tmp_path) -> Path:
    """A folder with an approved image `A` and an image `B`; beside it, files that are nobody's business."""
    folder = tmp_path / "studies"
    (folder / "labels" / "final").mkdir(parents=True)
    for name in ("A", "B"):
        (folder / f"{name}.nii").write_bytes(nifti())
    (folder / "labels" / "final" / "A.nii").write_bytes(nifti((VOLUME > 0).astype(np.uint8)))
    (tmp_path / "secret.json").write_text(
        json.dumps({"name": SECRET, "1": SECRET, "labels": {SECRET: 1}, "objects": {}})
    )
    (tmp_path / "secret.nii").write_bytes(nifti(VOLUME * 3))
    (tmp_path / "secret.raw").write_bytes(VOLUME.tobytes("F"))
    pair = nib.Nifti1Pair(VOLUME, np.diag([3.0, 3.0, 3.0, 1.0]))
    nib.save(pair, tmp_path / "secret.img")
    return folder


def opened(studies: Path) -> ConfinedDatastore:
    return in_time(lambda: ConfinedDatastore(str(studies), studies.parent / "state", 1 << 24))


def bound(path: Path) -> None:
    """A socket; its address is longer than a path of the tests may be, so it is made from within the folder."""
    with socket.socket(socket.AF_UNIX) as made:
        before = os.getcwd()
        os.chdir(path.parent)
        try:
            made.bind(path.name)
        finally:
            os.chdir(before)


ODD: dict[str, Callable[[Path], Any]] = {
    "pipe": os.mkfifo,
    "socket": bound,
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "link out": lambda path: path.symlink_to(path.parents[1] / "secret.json"),
    "link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("name", [INDEX, JOURNAL])
@pytest.mark.parametrize("kind", ODD)
def test_an_index_that_is_no_file_costs_nothing_else(studies, name, kind):
    datastore = opened(studies)
    in_time(lambda: datastore.update_image_info("A", {"note": "kept"}))
    (studies / name).unlink(missing_ok=True)
    ODD[kind](studies / name)
    for store in (datastore, opened(studies)):
        told = in_time(store.json)
        assert set(told["objects"]) == {"A", "B"} and SECRET not in json.dumps(told, default=str)
        assert told["objects"]["A"]["image"]["info"]["note"] == "kept"
    in_time(lambda: datastore.save_label("B", str(studies / "labels/final/A.nii"), "final", {}))
    assert set(in_time(datastore.get_labeled_images)) == {"A", "B"}
    assert json.loads((studies.parent / "secret.json").read_text())["name"] == SECRET


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", ["odd.nii", "odd", "odd.dcm"])
def test_what_is_no_file_is_no_image_and_is_said(studies, kind, name):
    datastore = opened(studies)
    ODD[kind](studies / name)
    assert in_time(datastore.list_images) == ["A", "B"]
    with pytest.raises(RequestError):
        in_time(lambda: datastore.get_image_uri("odd"))
    if kind != "link out" or not name.endswith((".nii", ".dcm")):
        assert [sentence for sentence in datastore.left_out if sentence.startswith(f"{name}: a link, a pipe")]


@pytest.mark.parametrize("kind", ODD)
def test_a_label_that_is_no_file_does_not_exist(studies, kind):
    datastore = opened(studies)
    target = studies / "labels" / "final" / "B.nii"
    if kind == "link out":
        target.symlink_to(studies.parent / "secret.nii")
    else:
        ODD[kind](target)
    assert in_time(datastore.get_labeled_images) == ["A"]
    assert in_time(lambda: datastore.get_label_uri("B", "final")) == ""
    in_time(lambda: datastore.save_label("B", str(studies / "labels/final/A.nii"), "final", {}))
    assert target.is_file() and not target.is_symlink()


@pytest.mark.parametrize("name", ["labels.json", "dataset.json"])
def test_class_names_are_not_read_by_a_link_that_leads_out(studies, name):
    datastore = opened(studies)
    (studies / name).symlink_to(studies.parent / "secret.json")
    with pytest.raises(DataError, match="leads out") as refused:
        in_time(lambda: datastore.save_label("B", str(studies / "labels/final/A.nii"), "final", {}))
    assert SECRET not in str(refused.value)
    with pytest.raises(DataError, match="leads out"):
        datastore.declared_names()


def test_class_names_of_endless_depth_are_a_sentence(studies):
    datastore = opened(studies)
    (studies / "labels.json").write_text('{"labels": ' + "[" * 100_000)
    with pytest.raises(DataError, match="labels.json: expected a JSON file"):
        datastore.declared_names()


def pair(folder: Path, magic: bytes = b"ni1\0") -> None:
    nib.save(nib.Nifti1Pair(VOLUME, np.eye(4)), folder / "pair.img")
    content = bytearray((folder / "pair.hdr").read_bytes())
    content[344:348] = magic
    (folder / "pair.hdr").write_bytes(content)


def with_header(folder: Path, make: Callable[[Path], Any]) -> str:
    pair(folder)
    (folder / "pair.hdr").unlink()
    make(folder / "pair.hdr")
    return "pair"


def analyze_beside(folder: Path, make: Callable[[Path], Any]) -> str:
    """An Analyze file of SPM, which nibabel looks for a `.mat` file to."""
    pair(folder, bytes(4))
    make(folder / "pair.mat")
    return "pair"


def detached(text: str) -> Callable[[Path, Callable[[Path], Any]], str]:
    def write(folder: Path, make: Callable[[Path], Any]) -> str:
        kind = "nhdr" if text.startswith("NRRD") else "mhd"
        (folder / f"parts.{kind}").write_text(text)
        make(folder / "parts.raw")
        return "parts"

    return write


MHD = "NDims = 3\nDimSize = 16 12 3\nElementType = MET_SHORT\nElementDataFile = {}\n"
NHDR = nrrd(data=b"").decode().rstrip("\n") + "\n{}\n\n"
PAIRS = {
    "header of a pair": with_header,
    "matrix of SPM": analyze_beside,
    "MetaImage": detached(MHD.format("parts.raw")),
    "MetaImage, list": detached(MHD.format("LIST\nparts.raw")),
    "MetaImage, pattern": detached(MHD.format("parts%d.raw 1 1 1")),
    "NRRD": detached(NHDR.format("data file: parts.raw")),
    "NRRD, list": detached(NHDR.format("data file: LIST\nparts.raw")),
    "NRRD, byte skip": detached(NHDR.format("byte skip: -1\ndata file: parts.raw")),
    "NRRD, line skip": detached(NHDR.format("line skip: 1\ndata file: parts.raw")),
}
SECRETS = {"header of a pair": "secret.hdr"}


@pytest.mark.parametrize("kind", ["pipe", "link out"])
@pytest.mark.parametrize("name", PAIRS)
def test_a_header_is_not_read_with_what_is_no_file_of_its_folder(studies, name, kind):
    def link(path: Path) -> None:
        path.symlink_to(studies.parent / SECRETS.get(name, "secret.raw"))

    image_id = PAIRS[name](studies, link if kind == "link out" else os.mkfifo)
    datastore = opened(studies)
    path = in_time(lambda: datastore.get_image_uri(image_id))
    with pytest.raises(DataError, match="expected"):
        in_time(lambda: read_image(path))


def test_a_pair_of_plain_files_is_read(studies):
    pair(studies)
    assert np.array_equal(np.sort(read_image(studies / "pair.img").slices.ravel()), np.sort(VOLUME.ravel()))


@pytest.mark.parametrize("name", [b"\xff\xfe.txt", b"ev\nil\x1b[2J.txt", "\u202etxt.\u200b".encode(), b"\xff.nii"])
def test_names_of_odd_letters_can_be_told(studies, name):
    with open(os.fsencode(studies) + b"/" + name, "wb") as file:
        file.write(b"x")
    datastore = opened(studies)
    assert datastore.list_images() == ["A", "B"]
    for sentence in datastore.left_out:
        assert sentence.encode() and sentence.isprintable()


def test_a_hard_link_is_the_file_and_nothing_is_written_through_it(studies):
    target = studies / "labels" / "original" / "B.nii"
    target.parent.mkdir()
    os.link(studies.parent / "secret.nii", target)
    os.link(studies.parent / "secret.json", studies / ".lock")
    before = (studies.parent / "secret.nii").read_bytes()
    datastore = opened(studies)
    datastore.save_label("B", str(studies / "labels/final/A.nii"), "original", {})
    datastore.remove_label("B", "original")
    assert (studies.parent / "secret.nii").read_bytes() == before
    assert SECRET in (studies.parent / "secret.json").read_text()


def test_an_unfinished_change_names_files_of_the_folder_only(studies):
    datastore = opened(studies)
    secret = studies.parent / "secret.nii"
    for name in (str(secret), "../secret.nii"):
        noted = {"file": name, "sha256": "0", "entries": {"A": None}}
        (studies / JOURNAL).write_text(json.dumps(noted))
        datastore.refresh()
        assert datastore.list_images() == ["A", "B"]
    (studies / JOURNAL).write_text('{"file": ' + "[" * 100_000)
    datastore.refresh()
    assert datastore.list_images() == ["A", "B"]


def test_a_label_of_an_image_named_like_a_segmentation_is_not_another_images(studies, tmp_path):
    """`A.seg` and `.nrrd` give the name of a label of `A`."""
    (studies / "A.seg.nii").write_bytes(nifti())
    (tmp_path / "l.nrrd").write_bytes(nrrd())
    datastore = opened(studies)
    datastore.save_label("A.seg", str(tmp_path / "l.nrrd"), "original", {})
    assert datastore.get_labels_by_image_id("A") == {"final": "A"}
    assert datastore.get_labels_by_image_id("A.seg") == {"original": "A.seg"}
    assert Path(datastore.get_label_uri("A.seg", "original")).name == "A.seg.seg.nrrd"
    datastore.remove_label("A.seg", "original")
    assert datastore.get_labels_by_image_id("A.seg") == {}
    datastore.add_image("C.seg", str(tmp_path / "l.nrrd"), {})
    assert set(datastore.list_images()) == {"A", "A.seg", "B", "C.seg"}


@pytest.mark.parametrize(
    ("looks", "twin"),
    [("\u00e9", "e\u0301"), ("c", "\uff43"), ("fi", "\ufb01"), ("case 1", "Case 1"), ("\u00dfc", "SSC")],
)
def test_an_id_that_looks_like_another_is_refused(studies, tmp_path, monkeypatch, looks, twin):
    """Written with other letters: people would approve the label of the wrong image, or a disk would replace it."""
    datastore = opened(studies)
    datastore.add_image(looks, str(studies / "A.nii"), {})
    with pytest.raises(Conflict, match="looks? like another"):
        datastore.add_image(twin, str(studies / "A.nii"), {})
    assert set(datastore.list_images()) == {"A", "B", looks}
    # The other one comes while this one is copied.
    datastore.remove_image(looks)
    copied = folder_module.copied

    def meanwhile(source, target):
        monkeypatch.setattr(folder_module, "copied", copied)
        datastore.add_image(looks, source, {})
        return copied(source, target)

    monkeypatch.setattr(folder_module, "copied", meanwhile)
    monkeypatch.setattr(datastore, "deciding", lambda image_id: nullcontext())
    with pytest.raises(Conflict, match="looks? like another"):
        datastore.add_image(twin, str(studies / "A.nii"), {})
    assert set(datastore.list_images()) == {"A", "B", looks}


def test_a_studies_folder_that_is_gone_is_said_and_not_made_again_and_serves_when_it_is_back(studies, tmp_path):
    datastore = ConfinedDatastore(str(studies), tmp_path / "state", 1 << 24)
    away = studies.rename(tmp_path / "away")
    label = tmp_path / "label.nii"
    label.write_bytes(nifti((VOLUME > 0).astype(np.uint8)))
    for work in (
        datastore.list_images,
        datastore.status,
        lambda: datastore.get_image_uri("A"),
        lambda: datastore.add_image("C", str(away / "B.nii"), {}),
        lambda: datastore.save_label("B", str(label), "final", {}),
        lambda: datastore.remove_label("A", "final"),
        lambda: datastore.remove_image("A"),
        lambda: datastore.set_name("other"),
    ):
        with pytest.raises(FolderGone, match="studies folder: expected .* can't be read") as told:
            work()
        assert told.value.status == 503 and not studies.exists()
    away.rename(studies)
    assert set(datastore.list_images()) == {"A", "B"} and datastore.get_labeled_images() == ["A"]


def test_labels_may_be_deleted_as_a_folder(studies, tmp_path):
    datastore = ConfinedDatastore(str(studies), tmp_path / "state", 1 << 24)
    (studies / "labels").rename(tmp_path / "labels")
    assert datastore.get_labeled_images() == [] and set(datastore.list_images()) == {"A", "B"}
    (tmp_path / "labels").rename(studies / "labels")
    assert datastore.get_labeled_images() == ["A"]


@pytest.mark.parametrize("name", ["labels.json", "dataset.json"])
@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path)], ids=["pipe", "folder", "link to nowhere"]
)
def test_names_of_classes_that_are_no_file_are_told_as_left_out(studies, tmp_path, caplog, name, make):
    make(studies / name)
    datastore = ConfinedDatastore(str(studies), tmp_path / "state", 1 << 24)
    assert in_time(datastore.list_images)
    [told] = datastore.left_out
    assert told.startswith(f"{name}: expected a file with the names of classes") and told in caplog.text
