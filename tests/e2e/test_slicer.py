"""What 3D Slicer's MONAI Label module sends, with the client that it brings, replayed against a server on a folder.

Files are written and read with SimpleITK, as Slicer does with ITK. Labels come without a tag, with names and values.
"""

import json
import shutil
from base64 import b64encode
from pathlib import Path

import numpy as np
import pytest
import requests
import SimpleITK
from monailabel.client import MONAILabelClient
from monailabel.client.client import MONAILabelClientException

from sam2sgp.data import load_datalist
from sam2sgp.data.phantom import CLASS_NAMES, make_phantoms
from tests.e2e.proxies import PASSWORD, USER, nginx
from tests.e2e.server import serving

MODEL = "sam2sgp"
# As Slicer's module adds to each inference.
RESULT = {"result_extension": ".nrrd", "result_dtype": "uint8"}
CONF = {"image_size": "64", "k": "8", "slices_per_class": "2", "user_header": "X-Remote-User"}


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("slicer") / "phantoms"
    make_phantoms(folder, 4, size=(64, 64), num_slices=6, modalities=("mr",), progress=False)
    return {case["name"]: case for case in load_datalist(folder)}


@pytest.fixture(scope="module")
def server(tmp_path_factory, known):
    folder = tmp_path_factory.mktemp("server")
    studies = folder / "studies"
    studies.mkdir()
    for name in ("mr_000", "mr_001", "mr_002"):
        shutil.copy(known[name]["image"], studies)
    with serving(folder, studies, CONF, {"MONAI_LABEL_AUTO_UPDATE_SCORING": "false"}) as running:
        yield running


@pytest.fixture
def slicer(server, tmp_path):
    return MONAILabelClient(server.url, str(tmp_path), client_id="user-xyz")


def saved(node: SimpleITK.Image, folder: Path, suffix: str) -> str:
    """A file as Slicer makes it: under a random name in its own temporary folder."""
    path = folder / f"tmp8x_1q{suffix}"
    SimpleITK.WriteImage(node, str(path), True)
    return str(path)


def label_info(values) -> list[dict]:
    return [{"name": CLASS_NAMES[value], "idx": int(value)} for value in values]


def segments(label: SimpleITK.Image) -> list[int]:
    return [int(value) for value in np.unique(SimpleITK.GetArrayFromImage(label)) if value]


@pytest.mark.parametrize(("name", "suffix"), [("mr_000", ".nii.gz"), ("mr_001", ".nrrd")])
def test_submitted_labels_are_approved_under_their_names(slicer, server, known, tmp_path, name, suffix):
    before = slicer.info()["datastore"]["completed"]
    label = SimpleITK.ReadImage(known[name]["label"])
    answer = slicer.save_label(name, saved(label, tmp_path, suffix), params={"label_info": label_info(segments(label))})
    assert answer["image"] == name and not answer["warnings"]
    info = slicer.info()
    assert info["datastore"]["completed"] == before + 1 and set(info["labels"]) <= set(CLASS_NAMES.values())
    assert (server.studies / "labels" / "final" / f"{name}{suffix}").is_file()
    found = SimpleITK.ReadImage(slicer.download_label(name, "final"))
    assert np.array_equal(SimpleITK.GetArrayFromImage(found), SimpleITK.GetArrayFromImage(label))


def test_the_next_sample_is_one_that_slicer_can_load(slicer, server):
    sample = slicer.next_sample("random", {})
    assert sample["id"] == "mr_002"
    answer = requests.get(f"{server.url}/datastore/image?image={sample['id']}", timeout=60)
    assert answer.content == (server.studies / "mr_002.nii.gz").read_bytes()
    # It looks for a first label to start from in this way.
    assert slicer.datastore()["objects"][sample["id"]]["labels"] == {}


def same_place(label: SimpleITK.Image, image: SimpleITK.Image) -> bool:
    """Whether Slicer shows the label on the image, voxel on voxel."""
    placed = SimpleITK.Resample(label, image, SimpleITK.Transform(), SimpleITK.sitkNearestNeighbor)
    found, expected = SimpleITK.GetArrayFromImage(placed), SimpleITK.GetArrayFromImage(label)
    return sorted(label.GetSize()) == sorted(image.GetSize()) and (found > 0).sum() == (expected > 0).sum()


def test_a_result_lies_on_the_image_in_slicer(slicer, known):
    file, params = slicer.infer(MODEL, "mr_002", dict(RESULT))
    result, image = SimpleITK.ReadImage(file), SimpleITK.ReadImage(known["mr_002"]["image"])
    assert file.endswith(".nrrd") and same_place(result, image)
    assert np.allclose(result.GetSpacing(), image.GetSpacing()) and segments(result)
    # Segments are named in the order of their values.
    names = [name for name, _ in sorted(params["label_names"].items(), key=lambda entry: entry[1])]
    assert names == [CLASS_NAMES[value] for value in sorted(CLASS_NAMES)]
    truth = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(known["mr_002"]["label"])) > 0
    found = SimpleITK.GetArrayFromImage(result) > 0
    assert 2 * (found & truth).sum() > 0.5 * (found.sum() + truth.sum())


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd"])
def test_a_session_of_a_volume_that_the_server_does_not_have(slicer, server, known, tmp_path, suffix):
    image = SimpleITK.ReadImage(known["mr_003"]["image"])
    files = sorted(server.studies.iterdir())
    session = slicer.create_session(saved(image, tmp_path, suffix))["session_id"]
    file, params = slicer.infer(MODEL, "mr_003", dict(RESULT), session_id=session)
    assert same_place(SimpleITK.ReadImage(file), image)
    assert {item["image"] for items in params["support"].values() for item in items} == {"mr_000", "mr_001"}
    slicer.remove_session(session)
    assert [path for path in sorted(server.studies.iterdir()) if path not in files] == []


def test_a_volume_is_uploaded_and_its_label_submitted(slicer, server, known, tmp_path):
    image, label = (SimpleITK.ReadImage(known["mr_003"][key]) for key in ("image", "label"))
    slicer.upload_image(saved(image, tmp_path, ".nrrd"), "mr_003")
    answer = slicer.save_label("mr_003", saved(label, tmp_path, ".nrrd"), params={"label_info": []})
    assert not answer["warnings"]
    info = slicer.info()
    assert info["support"]["cases"] == 3 and info["datastore"]["total"] == 4
    lines = [json.loads(line) for line in (server.state / "audit.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines if line["action"] == "approve"] == ["mr_000", "mr_001", "mr_003"]


def test_segments_that_slicer_numbers_anew_keep_their_class(slicer, server, known, tmp_path):
    label = SimpleITK.ReadImage(known["mr_002"]["label"])
    values = SimpleITK.GetArrayFromImage(label)
    # Without the first class the others come as 1 and 2.
    renumbered = SimpleITK.GetImageFromArray(np.where(values > 1, values - 1, 0).astype(np.uint8))
    renumbered.CopyInformation(label)
    info = [{"name": CLASS_NAMES[value], "idx": value - 1} for value in segments(label) if value > 1]
    slicer.save_label("mr_002", saved(renumbered, tmp_path, ".nrrd"), params={"label_info": info})
    found = SimpleITK.ReadImage(slicer.download_label("mr_002", "final"))
    assert np.array_equal(SimpleITK.GetArrayFromImage(found), np.where(values > 1, values, 0))
    models = slicer.info()["models"]
    assert models[MODEL]["labels"] == {name: value for value, name in CLASS_NAMES.items()}


def test_through_the_proxy_the_client_works_with_a_password(server, known, tmp_path, monkeypatch):
    image, label = (SimpleITK.ReadImage(known["mr_003"][key]) for key in ("image", "label"))
    (tmp_path / "nginx").mkdir()
    with nginx(tmp_path / "nginx", int(server.url.rpartition(":")[2])) as proxy:
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(proxy.certificate))
        token = b64encode(f"{USER}:{PASSWORD}".encode()).decode()

        def client() -> MONAILabelClient:
            # Once it has a password, it sends the headers of an upload with the requests after it.
            made = MONAILabelClient(proxy.url, str(tmp_path), client_id="user-xyz")
            made.update_auth({"token_type": "Basic", "access_token": token})
            return made

        with pytest.raises(MONAILabelClientException):
            MONAILabelClient(proxy.url).info()
        assert client().info()["name"] == "SAM2-SGP"
        file, params = client().infer(MODEL, "mr_003", dict(RESULT))
        assert same_place(SimpleITK.ReadImage(file), image) and params["label_names"]
        session = client().create_session(saved(image, tmp_path, ".nrrd"))["session_id"]
        file, _ = client().infer(MODEL, "mr_003", dict(RESULT), session_id=session)
        assert same_place(SimpleITK.ReadImage(file), image)
        client().remove_session(session)
        info = {"label_info": label_info(segments(label))}
        assert not client().save_label("mr_003", saved(label, tmp_path, ".nrrd"), params=info)["warnings"]
    lines = [json.loads(line) for line in (server.state / "audit.jsonl").read_text().splitlines()]
    assert [line["user"] for line in lines if line["action"] == "approve"][-1] == USER
