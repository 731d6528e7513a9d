"""The loop over HTTP, with MONAI Label's own client: infer, correct, approve, and the next image is better."""

import json
import shutil
import threading
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import requests
from monailabel.client import MONAILabelClient
from monailabel.client.client import MONAILabelClientException
from PIL import Image

from sam2sgp.data import load_datalist
from sam2sgp.data.io import read_image, read_label
from sam2sgp.data.phantom import make_phantoms
from tests.e2e.server import serving
from tests.helpers.decisions import rounds, stored

MODEL = "sam2sgp"
CLASSES = {"disc": 1, "ellipse": 2, "ring": 3}
APPROVED = ["us_000_0", "us_001_0"]
IMAGES = [*APPROVED, "us_000_1", "us_001_1", "us_002_0", "us_003_0", "mr_000", "mr_001"]


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("loop") / "phantoms"
    make_phantoms(folder, 4, size=(64, 64), num_slices=6, modalities=("us", "mr"), progress=False)
    return {case["name"]: case for case in load_datalist(folder)}


@pytest.fixture(scope="module")
def server(tmp_path_factory, known):
    folder = tmp_path_factory.mktemp("server")
    studies = folder / "studies"
    (studies / "labels" / "final").mkdir(parents=True)
    for name in IMAGES:
        shutil.copy(known[name]["image"], studies)
    for name in APPROVED:
        shutil.copy(known[name]["label"], studies / "labels" / "final")
    (studies / "labels.json").write_text(json.dumps({str(value): name for name, value in CLASSES.items()}))
    # Scoring would share the processor with the requests.
    without = {"MONAI_LABEL_AUTO_UPDATE_SCORING": "false"}
    with serving(folder, studies, {"image_size": "64"}, without) as running:
        yield running


@pytest.fixture
def final(server, known):
    """The folder of approved labels, holding only those of `APPROVED`."""
    folder = server.studies / "labels" / "final"
    wanted = {Path(known[name]["label"]).name: known[name]["label"] for name in APPROVED}
    for path in folder.iterdir():
        if path.name not in wanted:
            path.unlink()
    for source in wanted.values():
        shutil.copy(source, folder)
    return folder


@pytest.fixture
def client(server, final, tmp_path):
    return MONAILabelClient(server.url, str(tmp_path))


def used(params) -> set[str]:
    return {item["image"] for items in params["support"].values() for item in items}


def test_what_can_be_segmented_and_how_is_told(client):
    info = client.info()
    assert info["models"][MODEL]["labels"] == CLASSES and info["labels"] == list(CLASSES)
    assert info["models"][MODEL]["config"]["classes"] == ["all", *CLASSES]
    assert info["support"]["items"] == 2 and info["support"]["weights"] == "embedded"
    assert info["datastore"]["total"] == len(IMAGES) and info["datastore"]["completed"] == 2


def test_a_corrected_label_guides_the_next_image_until_it_is_deleted(client, server, known):
    sample = client.next_sample("random", {})
    assert sample["id"] in set(IMAGES) - set(APPROVED)
    label, params = client.infer(MODEL, "us_002_0", {"result_extension": ".png"})
    assert used(params) == set(APPROVED) and params["label_names"] == CLASSES
    geometry = read_image(known["us_002_0"]["image"]).geometry
    assert set(np.unique(read_label(label, geometry))) <= {0, 1, 2, 3}

    saved = client.save_label("us_002_0", known["us_002_0"]["label"], "final", {"label_info": []})
    assert saved["label"] == "us_002_0" and saved["support_items"] == 3 and saved["warnings"] == []
    assert used(client.infer(MODEL, "us_003_0", {})[1]) == {*APPROVED, "us_002_0"}
    assert client.info()["datastore"]["completed"] == 3

    answer = requests.delete(f"{server.url}/datastore/label?id=us_002_0&tag=final")
    assert answer.ok, answer.text
    assert used(client.infer(MODEL, "us_003_0", {})[1]) == set(APPROVED)


def test_a_label_copied_into_the_folder_guides_the_next_image(client, final, known):
    shutil.copy(known["us_002_0"]["label"], final)
    assert "us_002_0" in used(client.infer(MODEL, "us_003_0", {})[1])
    before = {item["image"]: item["item"] for item in client.infer(MODEL, "us_003_0", {})[1]["support"]["disc"]}
    # Edited in place, which no watcher sees: another label's content in the very file.
    shutil.copyfile(known["us_001_1"]["label"], final / "us_002_0.png")
    after = {item["image"]: item["item"] for item in client.infer(MODEL, "us_003_0", {})[1]["support"]["disc"]}
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {"us_002_0"}


def test_a_result_saved_as_final_is_approved_and_one_saved_as_original_is_not(client, final):
    client.infer(MODEL, "us_002_0", {"save_label": True})
    assert used(client.infer(MODEL, "us_003_0", {})[1]) == set(APPROVED)
    client.infer(MODEL, "us_002_0", {"save_label": True, "label_tag": "final"})
    assert (final / "us_002_0.png").is_file()
    assert used(client.infer(MODEL, "us_003_0", {})[1]) == {*APPROVED, "us_002_0"}


def test_a_volume_comes_back_on_its_own_grid(client, known):
    client.save_label("mr_000", known["mr_000"]["label"], "final", {})
    image = nib.load(known["mr_001"]["image"])
    for extension in (".nii.gz", ".nrrd"):
        label, params = client.infer(MODEL, "mr_001", {"result_extension": extension, "classes": "disc"})
        values = read_label(label, read_image(known["mr_001"]["image"]).geometry)
        assert set(np.unique(values)) <= {0, 1} and params["label_names"] == {"disc": 1}
        if extension == ".nii.gz":
            assert nib.load(label).shape == image.shape and np.allclose(nib.load(label).affine, image.affine)
    requests.delete(f"{client._server_url}/datastore/label?id=mr_000&tag=final")


def test_an_image_of_a_session_is_segmented(client, known):
    session = client.create_session(known["us_003_1"]["image"])["session_id"]
    label, params = client.infer(MODEL, "", {}, session_id=session)
    assert used(params) == set(APPROVED) and Path(label).is_file()
    assert client.get_session(session)["name"] == session
    client.remove_session(session)
    with pytest.raises(MONAILabelClientException):
        client.get_session(session)


def test_an_image_sent_along_is_segmented_and_saved_nowhere(client, server, known):
    with open(known["us_003_1"]["image"], "rb") as file:
        answer = requests.post(
            f"{server.url}/infer/{MODEL}?output=json",
            files={"file": ("mine.png", file)},
            data={"params": json.dumps({"save_label": True, "label_tag": "final"})},
        )
    assert answer.ok and used(answer.json()) == set(APPROVED)
    assert client.info()["datastore"]["completed"] == 2


@pytest.mark.parametrize(
    "query, params, status, sentence",
    [
        ("image=nobody", {}, 404, "image nobody: expected an image of the datastore"),
        ("image=us_003_0", {"classes": ["liver"]}, 404, "classes: expected some of disc, ellipse, ring, found liver"),
        ("image=us_003_0", {"k": -1}, 422, "k: expected at least 1, found -1"),
        ("image=us_003_0", {"save_label": "maybe"}, 422, "save_label: expected true or false, found 'maybe'"),
        ("image=mr_001", {"result_extension": ".png"}, 400, "expected a volume format for 6 slices"),
    ],
)
def test_what_cannot_be_done_is_answered_with_one_sentence(client, server, query, params, status, sentence):
    answer = requests.post(f"{server.url}/infer/{MODEL}?{query}", data={"params": json.dumps(params)})
    assert answer.status_code == status
    detail = answer.json()["detail"]
    assert sentence in detail and "\n" not in detail and str(server.studies) not in detail


def test_an_unknown_model_is_not_found(client, server):
    answer = requests.post(f"{server.url}/infer/other?image=us_003_0")
    assert answer.status_code == 404 and "expected one of sam2sgp, found 'other'" in answer.json()["detail"]


def test_a_label_of_the_wrong_size_is_refused_and_the_old_one_stays(client, server, final, known):
    before = (final / "us_000_0.png").read_bytes()
    with open(known["mr_000"]["label"], "rb") as file:
        answer = requests.put(f"{server.url}/datastore/label?image=us_000_0&tag=final", files={"label": file})
    assert answer.status_code == 422 and "expected a label of its image's size" in answer.json()["detail"]
    assert (final / "us_000_0.png").read_bytes() == before
    assert used(client.infer(MODEL, "us_003_0", {})[1]) == set(APPROVED)


def test_an_approved_label_without_an_object_is_a_label_but_guides_nothing(client, server, final, tmp_path):
    Image.new("L", (80, 64)).save(tmp_path / "empty.png")
    saved = client.save_label("us_002_0", str(tmp_path / "empty.png"), "final", {})
    # It is told as an item, because five of them teach which images stay empty.
    assert saved["support_items"] == 3 and saved["warnings"] == []
    assert used(client.infer(MODEL, "us_003_0", {})[1]) == set(APPROVED)
    assert client.info()["datastore"]["completed"] == 3
    for name in APPROVED:
        (final / f"{name}.png").unlink()
    answer = requests.post(f"{server.url}/infer/{MODEL}?image=us_003_0")
    assert answer.status_code == 409 and "No approved label shows an object" in answer.json()["detail"]


def test_without_approved_labels_the_answer_says_what_to_do_first(client, server, final):
    for path in final.iterdir():
        path.unlink()
    answer = requests.post(f"{server.url}/infer/{MODEL}?image=us_003_0")
    assert answer.status_code == 409 and "label an image by hand" in answer.json()["detail"]
    assert client.info()["models"][MODEL]["labels"] == {}


def test_of_decisions_at_once_what_was_answered_is_stored(server, final, known):
    labels = (Path(known["us_002_0"]["label"]), Path(known["us_000_0"]["label"]))
    counts = rounds(server.url, server.studies, "us_002_0", labels, count=8)
    assert {status for _, status in counts} == {200, 422} and sum(counts.values()) == 8 * 4
    for tag in stored(server.studies, "us_002_0"):
        assert requests.delete(f"{server.url}/datastore/label", params={"id": "us_002_0", "tag": tag}).ok


@pytest.mark.parametrize("info", ['{"ts": "x"}', '{"a": ' + "[" * 197 + "]" * 197 + "}"])
def test_a_record_that_cannot_be_read_again_is_refused_and_all_goes_on(client, server, known, info):
    classes = {"label_info": [{"name": "disc", "idx": 1}]}
    client.save_label("us_002_0", known["us_002_0"]["label"], "final", classes)
    query = {"label": "us_002_0", "tag": "final"}
    sent = [
        requests.put(f"{server.url}/datastore/label/info", params=query, data={"info": info}),
        requests.put(f"{server.url}/datastore/image/info", params={"image": "us_002_0"}, data={"info": info}),
    ]
    assert [answer.status_code // 100 for answer in sent] == [4, 4]
    for path in ("/info/", "/datastore/?output=all", "/sam2sgp/"):
        assert requests.get(f"{server.url}{path}").status_code == 200
    assert (
        requests.get(f"{server.url}/datastore/label/info", params=query).json()["label_info"] == classes["label_info"]
    )
    assert used(client.infer(MODEL, "us_003_0", {})[1]) == {*APPROVED, "us_002_0"}
    assert not list(server.studies.glob("*.damaged*"))


def test_two_clients_at_once_get_what_one_alone_gets(client, server, tmp_path):
    names = ["us_002_0", "us_003_0"]
    expected = {name: Path(client.infer(MODEL, name, {})[0]).read_bytes() for name in names}
    found: dict[str, list[bytes]] = {name: [] for name in names}

    def work(name: str) -> None:
        # It writes results under the names that they had on the server, so it must not write into the server's folder.
        folder = tmp_path / name
        folder.mkdir()
        other = MONAILabelClient(server.url, str(folder))
        for k in (1, 8, 8):
            found[name].append(Path(other.infer(MODEL, name, {"k": k})[0]).read_bytes())

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        assert found[name][1:] == [expected[name]] * 2


def test_batch_inference_labels_what_is_not_labelled_without_a_gpu(client, server, final):
    # What MONAI Label's own page and clients send.
    body = {"device": "cuda", "multi_gpu": True, "gpus": "all", "max_workers": 1, "k": 2}
    answer = requests.post(f"{server.url}/batch/infer/{MODEL}?images=unlabeled", json=body)
    assert answer.ok, answer.text
    while (task := requests.get(f"{server.url}/batch/infer").json())["status"] in ("SUBMITTED", "RUNNING"):
        assert client.info()["support"]["items"] == 2
        time.sleep(0.5)
    assert task["status"] == "DONE", task["details"]
    made = {path.name.partition(".")[0] for path in (server.studies / "labels" / "original").iterdir()}
    assert made == set(IMAGES) - set(APPROVED)
    assert client.info()["datastore"]["completed"] == 2


def test_the_servers_log_can_be_read(client, server):
    answer = requests.get(f"{server.url}/logs/?lines=50&html=false&text=true")
    assert answer.ok and answer.text
