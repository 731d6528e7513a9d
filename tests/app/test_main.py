"""The app as MONAI Label builds it."""

from types import SimpleNamespace

import pytest
from monailabel.interfaces.app import MONAILabelApp
from PIL import Image

from lib.checks import Conflict, NotFound, RequestError, StorageError
from lib.stores.audit import current_user
from lib.stores.folder import ConfinedDatastore
from main import Sam2SgpApp
from sam2sgp.errors import DataError
from tests.app.conftest import APP


def test_a_seed_folder_without_pairs_ends_the_start_with_one_sentence(studio, tmp_path, caplog):
    made = studio(["us_000_0"])
    (tmp_path / "seeds" / "images").mkdir(parents=True)
    conf = {"state_dir": str(tmp_path / "state"), "support_dir": str(tmp_path / "seeds")}
    with pytest.raises(DataError, match="support_dir is not used: .*seeds") as caught:
        Sam2SgpApp(str(APP), str(made.studies), conf)
    assert "\n" not in str(caught.value)
    assert str(caught.value) in [record.message for record in caplog.records]


@pytest.fixture
def app(monkeypatch):
    """An app without its parts, whose tasks give back the request that they got."""
    for method in ("train", "scoring", "batch_infer"):
        monkeypatch.setattr(MONAILabelApp, method, lambda self, request, datastore=None: dict(request))
    made = object.__new__(Sam2SgpApp)
    made.settings = SimpleNamespace(allow_overrides=False)
    return made


def test_a_task_sees_only_declared_options_however_its_request_came(app):
    """The last line: in the process of the task, after the routes and the pipe."""
    evil = {"bundle_path": "/tmp/evil", "session": {"path": "/"}, "gpus": "0", "tracking": "/tmp/x", "local_rank": 0}
    assert app.train({"model": "finetune", "max_epochs": 1, "device": "cpu", **evil}) == {
        "model": "finetune",
        "max_epochs": 1,
    }
    assert app.train({"model": "adapt", "seconds": 60, **evil}) == {"model": "adapt", "seconds": 60.0}
    assert app.scoring({"method": "scores", **evil}) == {"method": "scores"}
    request = {"model": "sam2sgp", "images": ["a"], "k": "2", **evil}
    assert app.batch_infer(request) == {"model": "sam2sgp", "images": ["a"], "k": 2}
    with pytest.raises(RequestError, match="max_epochs: expected a whole number"):
        app.train({"model": "finetune", "max_epochs": "$1"})
    app.settings = SimpleNamespace(allow_overrides=True)
    assert app.train({"model": "finetune", "device": "cpu"})["device"] == "cpu"


def test_only_paths_that_the_server_made_are_taken_for_paths(app, tmp_path):
    (tmp_path / "image.png").write_bytes(b"x")
    asked = []

    def task(request):
        asked.append(request)
        raise DataError("far enough")

    def unknown(image):
        raise NotFound(f"image {image}: expected one of the datastore.")

    app._infers = {"sam2sgp": task}
    datastore = SimpleNamespace(get_image_uri=unknown)
    for image in (str(tmp_path / "image.png"), "", None, 7, ["a"], {"path": "/"}, True):
        with pytest.raises(NotFound):
            app.infer({"model": "sam2sgp", "image": image}, datastore)
    with pytest.raises(DataError, match="far enough"):
        app.infer({"model": "sam2sgp", "image": tmp_path / "image.png", "bundle_path": "/"}, datastore)
    assert asked == [{"image": str(tmp_path / "image.png"), "image_id": None, "gone": None}]


def test_a_result_that_cannot_be_saved_is_not_left_on_the_server(app, tmp_path):
    image, result = tmp_path / "image.png", tmp_path / "result.png"
    image.write_bytes(b"x")
    result.write_bytes(b"x")

    def full(*arguments):
        raise StorageError("datastore: expected to save the change, found a full disk.")

    app._infers = {"sam2sgp": lambda request: (str(result), {"support": {}, "label_names": {}})}
    app.usage = SimpleNamespace(add=lambda used: list(used))
    datastore = SimpleNamespace(get_image_uri=lambda image_id: str(image), save_label=full)
    with pytest.raises(StorageError, match="full disk"):
        app.infer({"model": "sam2sgp", "image": "A", "save_label": True}, datastore)
    assert not result.exists()


def test_a_result_is_not_saved_for_another_image_that_came_to_its_id_meanwhile(app, tmp_path):
    studies, result = tmp_path / "studies", tmp_path / "result.png"
    studies.mkdir()
    Image.new("L", (8, 8)).save(studies / "A.png")
    datastore = ConfinedDatastore(str(studies), tmp_path / "state", 1 << 26)

    def task(request):
        Image.new("L", (8, 8)).save(result)
        if request.get("k"):
            Image.new("L", (8, 8), 200).save(tmp_path / "other.png")
            (tmp_path / "other.png").rename(studies / "A.png")
        return str(result), {"support": {}, "label_names": {}}

    app._infers = {"sam2sgp": task}
    app.usage = SimpleNamespace(add=lambda used: list(used))
    for user in ("ann", "ben"):
        asked_by = current_user.set(user)
        for tag in ("original", "draft"):
            app.infer({"model": "sam2sgp", "image": "A", "save_label": True, "label_tag": tag}, datastore)
        current_user.reset(asked_by)
    # A draft that a segmentation took the place of stays in the history, and whose it was.
    assert [(entry["tag"], entry["user"]) for entry in datastore.history.versions("A")] == [("draft", "ann")]
    datastore.remove_label("A", "draft")
    with pytest.raises(Conflict, match="another one under its id"):
        app.infer({"model": "sam2sgp", "image": "A", "save_label": True, "label_tag": "other", "k": 2}, datastore)
    assert datastore.tags() == {"A": ["original"]} and not result.exists()
