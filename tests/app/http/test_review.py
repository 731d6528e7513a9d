"""The routes of the review page: slices and labels in parts, corrections, the list, and who may what."""

import gzip
import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient

import sam2sgp.data.io.images
import sam2sgp.data.io.labels
from lib.checks import MOST_CLASSES
from lib.http.guard import install, serve_only
from lib.http.metrics import DECISIONS
from lib.http.page import SupportPage, Threads
from lib.http.review import MOST_SLICES, ReviewPage
from lib.http.routing import in_threads
from lib.http.volumes import Volumes
from lib.stores.audit import Audit
from lib.stores.dicomweb import DicomWebDatastore
from lib.stores.folder import ConfinedDatastore
from lib.stores.history import MOST_KEPT
from lib.stores.naming import declared
from sam2sgp.data import read_image, read_label
from sam2sgp.errors import DataError
from sam2sgp.transforms import SupportScaling
from tests.helpers.archives import fake_archive, series_entry, series_files
from tests.helpers.pages import SCALE, case, correction, record
from tests.helpers.parts import Given

SHAPE = (5, 6, 40)
NOTHING_GUIDES = SupportScaling()
AFFINE = np.array([[-0.7, 0, 0, 11], [0, 0.9, 0.1, -5], [0, -0.1, 2.5, 40], [0, 0, 0, 1]])


@pytest.fixture
def studies(tmp_path):
    """A CT-like volume `ct` of 40 slices with a prediction, and a picture `us` without a label."""
    folder = tmp_path / "studies"
    (folder / "labels" / "original").mkdir(parents=True)
    voxels = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE) - 1000
    nib.save(nib.Nifti1Image(voxels, AFFINE), folder / "ct.nii.gz")
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:3, 2, 7] = 2
    nib.save(nib.Nifti1Image(labels, AFFINE), folder / "labels" / "original" / "ct.nii.gz")
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8)).save(folder / "us.png")
    return folder


@pytest.fixture
def datastore(studies, tmp_path):
    return ConfinedDatastore(str(studies), tmp_path / "state", 1 << 24, Audit(tmp_path / "state" / "audit.jsonl"))


@pytest.fixture
def client(datastore, tmp_path):
    return client_of(datastore, tmp_path)


def client_of(datastore, tmp_path) -> TestClient:
    """Both pages on a datastore."""
    state = SimpleNamespace(class_names={1: "liver"}, segmentable={}, scaling=NOTHING_GUIDES)
    cases = SimpleNamespace(declared=dict)
    segmenter = SimpleNamespace(keep_up=lambda **_: True, state=lambda: state, cases=cases)
    server = FastAPI()
    install(server, Given(tmp_path / "state", max_upload_mb=4))
    page = ReviewPage(datastore, segmenter, sorted, tmp_path / "state" / "audit.jsonl", SCALE)
    serve_only(server, [page.router(), SupportPage(datastore, segmenter, None, sorted, dict).router()])
    return TestClient(server, base_url="http://server:8000", headers={"X-Forwarded-User": "ann"})


def test_a_case_tells_what_the_page_needs_and_slices_are_the_images_own_values(client, datastore):
    shown = case(client, "ct")
    assert shown["shape"] == [40, 6, 5] and shown["state"] == "predicted" and shown["label_tag"] == "original"
    assert shown["plane"] == "axial" and shown["edges"] == "RLAP"
    assert [entry["value"] for entry in shown["classes"]] == [1, 2]
    counts = shown["classes"][1]["counts"]
    assert counts[7] == 2 and sum(counts) == 2
    query = {"image": "ct", "seen": shown["image_seen"], "first": 3, "count": 2}
    answer = client.get("/sam2sgp/review/slices", params=query)
    stored = np.frombuffer(answer.content, "<u2").reshape(2, 6, 5)
    values = read_image(datastore.get_image_uri("ct")).slices[3:5, 0]
    assert np.array_equal(stored * shown["slope"] + shown["intercept"], values)
    query = {"image": "ct", "label_tag": "original", "seen": shown["seen"], "first": 7, "count": 1}
    label = np.frombuffer(client.get("/sam2sgp/review/labels", params=query).content, np.uint8)
    assert (label == 2).sum() == 2


def test_what_a_browser_has_is_not_sent_again_and_requests_are_bounded(client, datastore):
    shown = case(client, "ct")
    query = {"image": "ct", "seen": shown["image_seen"], "first": 0, "count": 4}
    first = client.get("/sam2sgp/review/slices", params=query)
    assert "no-cache" in first.headers["cache-control"] and first.headers["content-encoding"] == "gzip"
    again = client.get("/sam2sgp/review/slices", params=query, headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304 and again.content == b""
    for wrong in ({"count": MOST_SLICES + 1}, {"count": 0}, {"first": 40}, {"first": -1}, {"image": "../ct"}):
        assert 400 <= client.get("/sam2sgp/review/slices", params={**query, **wrong}).status_code < 500
    stale = client.get("/sam2sgp/review/slices", params={**query, "seen": "1-1"})
    assert stale.status_code == 409
    path = datastore.get_image_uri("ct")
    os.utime(path, ns=(1, 1))
    assert client.get("/sam2sgp/review/slices", params=query).status_code == 409


def test_the_window_at_first_follows_the_support_set_as_a_segmentation_does(client, studies, tmp_path):
    """Of an image of which nothing is stated and nothing can be told, such as a CT of the brain without air."""
    values = np.random.default_rng(0).normal(0, 40, (8, 10, 12)).astype(np.int16)
    path = studies / "brain.nii.gz"
    nib.save(nib.Nifti1Image(values, np.eye(4)), path)
    shown = case(client, "brain")
    assert shown["kind"] == "percentiles" and np.allclose(shown["window"], np.percentile(values, SCALE.percentiles))
    volumes = Volumes(SCALE)
    image, read = volumes.image(path), read_image(path)
    for support in (NOTHING_GUIDES, *(SupportScaling(frozenset({kind})) for kind in ("ct", "percentiles"))):
        loaded = {"image": torch.from_numpy(read.slices), "is_rgb": False, "geometry": read.geometry}
        scaling = SCALE({**loaded, "support_scaling": support})["scaling"]
        window, kind = volumes.window(image, support)
        assert kind == scaling.kind and (window == SCALE.ct_window) == (kind == "ct")


def test_a_case_reads_image_and_label_once_and_sorts_no_voxels(client, monkeypatch):
    read = []

    def noting(read_grid):
        return lambda path, *others, **named: read.append(Path(path).parent.name) or read_grid(path, *others, **named)

    for module in (sam2sgp.data.io.images, sam2sgp.data.io.labels):
        monkeypatch.setattr(module, "read_grid", noting(module.read_grid))
    monkeypatch.setattr("sam2sgp.transforms.scaling.percentile", None)
    monkeypatch.setattr(np, "partition", None)
    shown = case(client, "ct")
    query = {"image": "ct", "seen": shown["image_seen"], "first": 0, "count": 16}
    assert client.get("/sam2sgp/review/slices", params=query).status_code == 200
    query |= {"label_tag": "original", "seen": shown["seen"]}
    assert client.get("/sam2sgp/review/labels", params=query).status_code == 200
    assert case(client, "ct")["window"] == shown["window"] and read == ["studies", "original"]
    # A grey picture is scaled by percentiles, which the number of voxels of each value tells.
    assert np.allclose(case(client, "us")["window"], np.percentile(np.arange(48), SCALE.percentiles))


def test_a_correction_is_stored_with_the_images_geometry_and_the_draft_goes_when_it_is_approved(client, datastore):
    shown = case(client, "ct")
    answer = client.post("/sam2sgp/review/correct", json=correction(shown, [{"slice": 7, "runs": [0, 3, 1]}]))
    assert answer.status_code == 200 and answer.json()["voxels"] == 3
    drawn = case(client, "ct")
    assert drawn["label_tag"] == "draft" and drawn["state"] == "draft" and drawn["user"] == "ann"
    answer = client.post(
        "/sam2sgp/review/correct", json=correction(drawn, [{"slice": 39, "runs": [29, 1, 2]}], "final")
    )
    assert answer.status_code == 200
    assert set(datastore.get_labels_by_image_id("ct")) == {"original", "final"}
    final = datastore.get_label_uri("ct", "final")
    labels = read_label(final)
    assert labels[7].reshape(-1)[:3].tolist() == [1, 1, 1] and labels[39, -1, -1] == 2 and (labels > 0).sum() == 6
    image, label = nib.load(datastore.get_image_uri("ct")), nib.load(final)
    assert np.array_equal(image.affine, label.affine) and image.shape == label.shape
    events = client.get("/sam2sgp/review/history", params={"image": "ct"}).json()["events"]
    assert [(event["action"], event["user"]) for event in events][::-1][:2] == [("correct", "ann"), ("approve", "ann")]


def test_a_correction_of_something_else_than_there_is_changes_nothing(client, datastore):
    shown = case(client, "ct")
    changes = [{"slice": 7, "runs": [0, 3, 1]}]
    for other, status in (
        ({"shape": [40, 5, 6]}, 409),
        ({"image_seen": "1-1"}, 409),
        ({"seen": "1-1"}, 409),
        ({"replaces": "1-1"}, 409),
        ({"label_tag": "nowhere"}, 409),
        ({"changes": [{"slice": 40, "runs": [0, 1, 1]}]}, 422),
        ({"changes": [{"slice": 0, "runs": [29, 2, 1]}]}, 422),
        ({"changes": [{"slice": 0, "runs": [5, 2, 1, 6, 1, 1]}]}, 422),
        ({"changes": [{"slice": 0, "runs": [0, 1, 9]}]}, 422),
        ({"changes": [{"slice": 0, "runs": [0, 1]}]}, 422),
        ({"changes": changes * 2}, 422),
        ({"changes": [{"slice": 0, "runs": [0, -1, 1]}]}, 422),
        ({"changes": [{"slice": 0, "runs": [0, True, 1]}]}, 422),
        ({"save_as": "original"}, 422),
        ({"image": "../ct"}, 400),
        ({"path": "/etc/passwd"}, 422),
        ({"classes": [{"idx": 1, "name": "a\u0000b"}]}, 400),
    ):
        answer = client.post("/sam2sgp/review/correct", json={**correction(shown, changes), **other})
        assert 400 <= answer.status_code < 500 and (status != 409 or answer.status_code == 409), (other, answer.text)
    assert set(datastore.get_labels_by_image_id("ct")) == {"original"}
    # Somebody else saved a draft meanwhile: it stays.
    assert client.post("/sam2sgp/review/correct", json=correction(shown, changes)).status_code == 200
    draft = open(datastore.get_label_uri("ct", "draft"), "rb").read()
    late = client.post("/sam2sgp/review/correct", json=correction(shown, [{"slice": 1, "runs": [0, 1, 1]}]))
    assert late.status_code == 409 and open(datastore.get_label_uri("ct", "draft"), "rb").read() == draft


def test_other_sites_can_not_correct(client, datastore):
    body = correction(case(client, "ct"), [{"slice": 7, "runs": [0, 3, 1]}])
    foreign = client.post("/sam2sgp/review/correct", json=body, headers={"Origin": "https://evil.example"})
    assert foreign.status_code == 403
    form = client.post("/sam2sgp/review/correct", data={"image": "ct"})
    assert 400 <= form.status_code < 500
    large = client.post("/sam2sgp/review/correct", content=json.dumps({"image": "a" * (2 << 20)}))
    assert large.status_code == 413
    assert set(datastore.get_labels_by_image_id("ct")) == {"original"}


def test_a_picture_without_a_label_is_painted_from_nothing_with_a_new_class(client, datastore):
    shown = case(client, "us")
    assert shown["label_tag"] == "" and shown["edges"] is None and shown["bytes"] == 1
    classes = [{"idx": 1, "name": "liver"}, {"idx": 2, "name": "cyst"}]
    body = correction(shown, [{"slice": 0, "runs": [8, 4, 2]}], "final", classes=classes)
    assert client.post("/sam2sgp/review/correct", json=body).status_code == 200
    labels = read_label(datastore.get_label_uri("us", "final"))
    assert labels[0, 1].tolist() == [2, 2, 2, 2, 0, 0, 0, 0]
    assert [entry["name"] for entry in case(client, "us")["classes"]] == ["liver", "cyst"]


def test_an_earlier_state_is_brought_back_as_a_draft_and_the_oldest_ones_go(client, datastore):
    for number in range(MOST_KEPT + 2):
        shown = case(client, "us")
        body = correction(shown, [{"slice": 0, "runs": [number, 1, 1]}])
        assert client.post("/sam2sgp/review/correct", json=body).status_code == 200
    versions = client.get("/sam2sgp/review/history", params={"image": "us"}).json()["versions"]
    assert len(versions) == MOST_KEPT and versions[0]["tag"] == "draft" and versions[0]["user"] == "ann"
    shown = case(client, "us")
    body = {"image": "us", "image_seen": shown["image_seen"], "replaces": shown["labels"]["draft"]}
    for version in ("../../audit", "1", versions[0]["version"] + "x"):
        assert client.post("/sam2sgp/review/bring_back", json={**body, "version": version}).status_code == 404
    oldest = versions[-1]["version"]
    assert client.post("/sam2sgp/review/bring_back", json={**body, "version": oldest}).status_code == 200
    assert (read_label(datastore.get_label_uri("us", "draft")) > 0).sum() == 2
    newer = {**body, "version": versions[0]["version"]}
    assert client.post("/sam2sgp/review/bring_back", json=newer).status_code == 409
    datastore.remove_image("us")
    assert datastore.history.versions("us") == []


def test_decisions_that_are_refused_drive_no_earlier_state_out(client, datastore, studies):
    shown = case(client, "us")
    body = correction(shown, [{"slice": 0, "runs": [8, 4, 1]}], "final")
    for number in range(2):
        body = {**body, "changes": [{"slice": 0, "runs": [8, 4 + number, 1]}]}
        assert client.post("/sam2sgp/review/correct", json=body).status_code == 200
        shown = case(client, "us")
        body = correction(shown, [], "final")
    assert len(datastore.history.versions("us")) == 1
    (studies / "labels" / "original" / "us.png").write_bytes(b"no label")
    for _ in range(3):
        answer = client.post("/sam2sgp/approve", json={"image": "us", "label_tag": "original"})
        assert 400 <= answer.status_code < 500
    assert len(datastore.history.versions("us")) == 2
    # What is approved in the end takes the place of just that one.
    Image.fromarray(np.ones((6, 8), np.uint8)).save(studies / "labels" / "original" / "us.png")
    assert client.post("/sam2sgp/approve", json={"image": "us", "label_tag": "original"}).status_code == 200
    kept = [datastore.history.get("us", entry["version"])[0] for entry in datastore.history.versions("us")]
    assert [int((read_label(path) > 0).sum()) for path in kept] == [5, 4]


def test_labels_of_an_image_that_another_one_took_the_place_of_are_named_and_neither_approved_nor_brought_back(
    client, datastore, studies, tmp_path
):
    picture, file = studies / "us.png", tmp_path / "label.png"
    Image.fromarray(np.ones((6, 8), np.uint8)).save(file)
    for tag in ("original", "draft", "draft"):
        datastore.save_label("us", str(file), tag, {"user": tag})
    datastore.save_label("us", str(file), "removed", {})

    def of_another() -> tuple[bool, list[bool]]:
        versions = client.get("/sam2sgp/review/history", params={"image": "us"}).json()["versions"]
        shown = case(client, "us", label_tag="original")
        return shown["of_another_image"], [entry["of_another_image"] for entry in versions]

    def decide() -> list[int]:
        shown = case(client, "us")
        version = datastore.history.versions("us")[-1]["version"]
        back = {"image": "us", "image_seen": shown["image_seen"], "replaces": shown["labels"].get("draft", "")}
        answers = [client.post("/sam2sgp/review/bring_back", json={**back, "version": version})]
        for tag in ("original", "removed"):
            answers.append(client.post("/sam2sgp/approve", json={"image": "us", "label_tag": tag}))
            with suppress(DataError):
                datastore.remove("us")
        assert all("another image under this name" in answer.text for answer in answers if answer.status_code == 409)
        return [answer.status_code for answer in answers]

    content = picture.read_bytes()
    os.utime(picture, ns=(1, 1))
    assert of_another() == (False, [False]), "a copy of the same image"
    Image.fromarray(np.arange(48, dtype=np.uint8)[::-1].reshape(6, 8)).save(picture)
    assert of_another() == (True, [True])
    assert decide() == [409, 409, 409] and "final" not in datastore.get_labels_by_image_id("us")
    # On the page it may be corrected, as is told there, and is then one of this image.
    shown = case(client, "us", label_tag="original")
    body = correction(shown, [{"slice": 0, "runs": [0, 1, 0]}])
    assert client.post("/sam2sgp/review/correct", json=body).status_code == 200
    assert not case(client, "us", label_tag="draft")["of_another_image"]
    # Somebody puts a label of their own in the place of the prediction: nothing is known of its image.
    Image.fromarray(np.eye(6, 8, dtype=np.uint8)).save(studies / "labels" / "original" / "us.png")
    assert not case(client, "us", label_tag="original")["of_another_image"]
    Image.fromarray(np.ones((6, 8), np.uint8)).save(file)
    datastore.save_label("us", str(file), "original", {})
    picture.write_bytes(content)
    assert of_another()[1][-1] is False and decide()[0] == 200


def test_a_series_of_an_archive_is_corrected_and_approved_like_any_image(tmp_path):
    with fake_archive() as archive:
        archive.series, archive.keeps = [series_entry("1.5")], True
        archive.files = series_files(tmp_path / "source")

        def opened(name: str) -> DicomWebDatastore:
            log = Audit(tmp_path / "state" / "audit.jsonl")
            return DicomWebDatastore(archive.address, tmp_path / name, 1 << 20, log, expiry=0.0, patience=10.0)

        datastore = opened("archive")
        client = client_of(datastore, tmp_path)
        shown = case(client, "1.5")
        assert shown["shape"] == [2, 8, 8] and shown["plane"] == "axial" and shown["state"] == "unlabelled"
        query = {"image": "1.5", "seen": shown["image_seen"], "first": 0, "count": 2}
        voxels = np.frombuffer(client.get("/sam2sgp/review/slices", params=query).content, np.uint8)
        assert voxels.size == 128 and (voxels * shown["slope"] + shown["intercept"] == -1024).all()
        queue = client.get("/sam2sgp/review/queue").json()
        assert [entry["image"] for entry in queue["entries"]] == ["1.5"]

        def correct(changes: list, save_as: str) -> dict:
            shown = case(client, "1.5")
            classes = [{"idx": 1, "name": "liver"}, {"idx": 2, "name": "cyst"}]
            body = correction(shown, changes, save_as, classes=classes)
            answer = client.post("/sam2sgp/review/correct", json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()

        assert correct([{"slice": 1, "runs": [8, 3, 2]}], "draft")["voxels"] == 3
        drawn = case(client, "1.5")
        assert drawn["state"] == "draft" and drawn["user"] == "ann" and not archive.stored
        label = {"image": "1.5", "label_tag": "draft", "seen": drawn["seen"], "first": 1, "count": 1}
        row = np.frombuffer(client.get("/sam2sgp/review/labels", params=label).content, np.uint8)
        assert np.flatnonzero(row).tolist() == [8, 9, 10] and set(row[8:11]) == {2}
        # As it is, by the other page's route, and once more with a change.
        body = {"image": "1.5", "label_tag": "draft", "seen": drawn["seen"]}
        assert client.post("/sam2sgp/approve", json=body).status_code == 200 and len(archive.stored) == 1
        assert set(case(client, "1.5")["labels"]) == {"final"}
        correct([{"slice": 0, "runs": [0, 1, 1]}], "final")
        assert len(archive.stored) == 2
        events = client.get("/sam2sgp/review/history", params={"image": "1.5"}).json()
        assert [event["action"] for event in events["events"]] == ["approve", "remove label", "approve", "correct"]
        assert [(entry["tag"], entry["user"]) for entry in events["versions"]] == [("final", "ann")]
        # The archive has it, so a server with another work folder does, too.
        other = opened("elsewhere")
        labels = read_label(other.get_label_uri("1.5", "final"))
        assert (labels[1, 1, :3] == 2).all() and labels[0, 0, 0] == 1 and (labels > 0).sum() == 4
        assert declared(other.get_label_info("1.5", "final")) == {1: "liver", 2: "cyst"}
        # What was approved first is brought back.
        shown = case(client, "1.5")
        version = events["versions"][0]["version"]
        body = {"image": "1.5", "image_seen": shown["image_seen"], "replaces": "", "version": version}
        assert client.post("/sam2sgp/review/bring_back", json=body).status_code == 200
        assert (read_label(datastore.get_label_uri("1.5", "draft")) > 0).sum() == 3
        body = {"image": "1.5", "label_tag": "final", "seen": shown["seen"]}
        assert client.post("/sam2sgp/remove", json=body).status_code == 200
        assert set(case(client, "1.5")["labels"]) == {"draft", "removed"}
        # Another tag makes no label of another series one of this.
        path = datastore._kept.path("1.5", "draft")
        made_of = {"stamp": "", "content": "names:of others", "label": ""}
        datastore._kept.note(path, {**datastore._kept.record(path), "made_of": made_of})
        datastore.remove("1.5", "draft")
        assert case(client, "1.5", label_tag="removed")["of_another_image"]


def test_what_was_corrected_stays_so_when_it_is_brought_back(client, datastore):
    for _ in range(2):
        shown = case(client, "ct")
        change = [{"slice": 7, "runs": [0, 3, 1]}] if shown["label_tag"] == "original" else []
        assert client.post("/sam2sgp/review/correct", json=correction(shown, change, "final")).status_code == 200
    # The second time nothing was painted, which makes no untouched prediction of it.
    assert datastore.get_label_info("ct", "final")["corrected"]["voxels"] == 3
    [version] = client.get("/sam2sgp/review/history", params={"image": "ct"}).json()["versions"]
    body = {"image": "ct", "image_seen": shown["image_seen"], "replaces": "", "version": version["version"]}
    assert client.post("/sam2sgp/review/bring_back", json=body).status_code == 200
    assert datastore.get_label_info("ct", "draft")["corrected"]["voxels"] == 3


def test_a_label_of_more_classes_than_a_page_can_show_is_refused(client, studies):
    many = np.arange(MOST_CLASSES + 2, dtype=np.uint16)
    Image.fromarray(np.zeros((1, many.size), np.uint8)).save(studies / "many.png")
    Image.fromarray(many[None]).save(studies / "labels" / "original" / "many.png")
    answer = client.get("/sam2sgp/review/case", params={"image": "many"})
    assert answer.status_code == 413 and f"at most {MOST_CLASSES} classes" in answer.json()["detail"]


def test_all_that_people_decide_here_is_counted(datastore, tmp_path):
    page = ReviewPage(datastore, None, sorted, tmp_path / "audit.jsonl", SCALE)
    assert {("POST", route.path) for route in page.router().routes if "POST" in route.methods} <= DECISIONS.keys()


def test_an_approved_label_that_changed_since_it_was_shown_is_not_removed(client, datastore):
    first = correction(case(client, "us"), [{"slice": 0, "runs": [8, 4, 1]}], "final")
    assert client.post("/sam2sgp/review/correct", json=first).status_code == 200
    shown = case(client, "us")
    newer = correction(shown, [{"slice": 0, "runs": [0, 2, 1]}], "final")
    assert client.post("/sam2sgp/review/correct", json=newer).status_code == 200
    body = {"image": "us", "label_tag": "final", "seen": shown["seen"]}
    assert client.post("/sam2sgp/remove", json=body).status_code == 409
    assert set(datastore.get_labels_by_image_id("us")) == {"final"}
    assert client.post("/sam2sgp/remove", json={**body, "seen": case(client, "us")["seen"]}).status_code == 200
    assert set(datastore.get_labels_by_image_id("us")) == {"removed"}


def test_the_support_page_removes_and_restores_only_what_it_showed(datastore, client, tmp_path):
    """A button sends the state of the label that was there when the page was made."""
    item = SimpleNamespace(id="us", content="1", info=SimpleNamespace(holds=[1]), source="us.png")
    state = SimpleNamespace(
        class_names={1: "liver"},
        segmentable={},
        adaptation=None,
        images={"us.png": "us"},
        items=[item],
        errors=(),
        warnings=(),
        cases={"us"},
    )
    segmenter = SimpleNamespace(keep_up=lambda: True, state=lambda: state)
    page = SupportPage(datastore, segmenter, SimpleNamespace(counts=dict), sorted, dict)

    for action, tag in (("remove", "final"), ("restore", "removed")):
        seen = []
        for value in (1, 2):
            file = tmp_path / "label.png"
            Image.fromarray(np.full((6, 8), value, np.uint8)).save(file)
            datastore.save_label("us", str(file), tag, {})
            seen += re.findall(rf'data-action="{action}"[^>]*data-seen="([^"]*)"', page.show().body.decode())
        asked = [{"image": "us", "label_tag": tag, "seen": state} for state in seen]
        assert [client.post(f"/sam2sgp/{action}", json=body).status_code for body in asked] == [409, 200]


def test_decisions_of_both_pages_share_one_limit(datastore, tmp_path, monkeypatch):
    meeting = threading.Barrier(2)
    met = []

    def decide(*_arguments):
        with suppress(threading.BrokenBarrierError):
            met.append(meeting.wait(0.3))

    server = FastAPI()
    install(server, Given(tmp_path / "state"))
    review, page = (
        ReviewPage(datastore, None, sorted, tmp_path, SCALE),
        SupportPage(datastore, None, None, sorted, dict),
    )
    monkeypatch.setattr(datastore, "reject", decide)
    monkeypatch.setattr(review, "bring_back", lambda restoration: decide() or {})
    threads = Threads(deciding=in_threads(1))
    serve_only(server, [review.router(threads), page.router(threads)])
    asked = {
        "/sam2sgp/reject": {"image": "ct", "label_tag": "original"},
        "/sam2sgp/review/bring_back": {"image": "ct", "version": "1", "image_seen": "1", "replaces": ""},
    }
    with TestClient(server, base_url="http://server:8000") as client, ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda path: client.post(path, json=asked[path]).status_code, asked))
    assert answers == [200, 200] and met == []


def test_the_page_loads_its_own_files_only(client):
    answer = client.get("/sam2sgp/review/")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert client.get("/sam2sgp/review/assets/review.js").headers["content-type"].startswith("text/javascript")
    for name in ("../page.css", "%2e%2e/page.css", "page.html.j2", "none.js"):
        assert 400 <= client.get(f"/sam2sgp/review/assets/{name}").status_code < 500


def test_ten_thousand_images_are_listed_quickly(client, datastore, monkeypatch):
    records = {f"image_{n}": {"original": record({"liver": n / 10000})} for n in range(10000)}
    monkeypatch.setattr(datastore, "records", lambda: records)
    answer = client.get("/sam2sgp/review/queue", params={"first": 200, "count": 50, "find": "image_9999"}).json()
    assert [entry["image"] for entry in answer["entries"]] == [f"image_{n}" for n in range(200, 250)]
    assert answer["total"] == 10000 and answer["place"] == 9999


def test_gzip_content_is_what_was_cut(client):
    shown = case(client, "us")
    query = {"image": "us", "seen": shown["image_seen"], "first": 0, "count": 1}
    with client.stream("GET", "/sam2sgp/review/slices", params=query) as answer:
        content = b"".join(answer.iter_raw())
    assert gzip.decompress(content) == bytes(range(48))
