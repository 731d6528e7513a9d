"""The routes of training, scoring and batch inference: what is started, and what is refused."""

from lib.tasks.background import Busy
from tests.helpers.parts import TASK_PATHS, assert_refused


def test_long_work_is_never_done_while_the_client_waits(client, app):
    for path in TASK_PATHS:
        assert_refused(client.post(path, params={"run_sync": "true"}, json={}))
        assert_refused(client.post(path, json={"run_sync": True}))
    assert app.tasks.started == []


def test_tasks_are_started_as_the_shipped_clients_ask_for_them(client, app):
    assert client.post("/train/finetune", json={"max_epochs": "2", "client_id": None}).status_code == 200
    assert client.post("/train/adapt", json={"seconds": "90"}).status_code == 200
    panel = client.post("/train/", json={"finetune": {"action": "train", "learning_rate": 0.01}})
    assert panel.json()["finetune"]["result"]["status"] == "SUBMITTED"
    empty = {"seconds": "", "action": None}
    assert client.post("/train/adapt", json=empty).json()["request"]["seconds"] == 60
    assert client.post("/train/", json={}).status_code == client.post("/scoring/scores").status_code == 200
    body = {"device": "cuda", "multi_gpu": True, "gpus": "all", "max_workers": 1, "k": 2}
    assert client.post("/batch/infer/sam2sgp?images=unlabeled", json=body).status_code == 200
    assert client.post("/batch/infer/sam2sgp?images=unannotated", json={}).status_code == 200
    assert app.tasks.started == [
        ("train", {"model": "finetune", "max_epochs": 2}),
        ("train", {"model": "adapt", "seconds": 90.0}),
        ("train", {"model": "finetune", "action": "train", "learning_rate": 0.01}),
        ("train", {"model": "adapt"}),
        ("train", {"model": "adapt", "seconds": 60.0, "action": None}),
        ("train", {"model": "finetune"}),
        ("train", {"model": "adapt"}),
        ("scoring", {"method": "scores"}),
        ("batch_infer", {"model": "sam2sgp", "k": 2, "device": "cuda", "images": "unlabeled"}),
        ("batch_infer", {"model": "sam2sgp", "images": "unannotated"}),
    ]
    assert client.get("/train/").json() == {"status": "DONE"} and len(client.get("/train/?all=true").json()) == 7
    assert client.get("/train/?check_if_running=true").status_code == 404


def test_of_all_trainings_one_waits_for_the_other(client, app, monkeypatch):
    monkeypatch.setattr(app.tasks, "waiting", lambda method: len(app.tasks.started))
    assert client.post("/train/", json={}).json().keys() == {"finetune", "adapt"}
    assert client.post("/train/", json={}).status_code == 429
    assert [request["model"] for _, request in app.tasks.started] == ["finetune", "adapt"]


def test_of_all_trainings_those_that_wait_are_told_when_the_queue_is_full(client, app, monkeypatch):
    start, full = app.tasks.start, "train: expected at most 8 that wait, found as many; try again later."

    def almost_full(method, request, enqueue):
        if app.tasks.started:
            raise Busy(full)
        return start(method, request, enqueue)

    monkeypatch.setattr(app.tasks, "start", almost_full)
    answer = client.post("/train/?enqueue=true", json={})
    assert answer.status_code == 200
    assert answer.json()["finetune"]["result"]["status"] == "SUBMITTED" and answer.json()["finetune"]["detail"] is None
    assert answer.json()["adapt"] == {"result": None, "detail": full}
    assert client.post("/train/?enqueue=true", json={}).status_code == 429
    assert [request["model"] for _, request in app.tasks.started] == ["finetune"]


def test_a_roll_back_of_all_models_is_one_and_nothing_is_trained_after_it(client, app):
    back, chosen = {"action": "roll_back"}, {"action": ["train", "roll_back"]}
    for body in ({"finetune": back, "adapt": chosen}, {"adapt": back}, {"finetune": back, "adapt": back}):
        assert client.post("/train/", json=body).status_code == 200
    models = ("finetune", "adapt", "finetune")
    assert app.tasks.started == [("train", {"model": model, **back}) for model in models]


def test_each_training_takes_its_own_options(client, app):
    assert_refused(client.post("/train/adapt", json={"max_epochs": 2}))
    assert_refused(client.post("/train/adapt", json={"seconds": 1}))
    assert_refused(client.post("/train/finetune", json={"seconds": 60}))
    assert app.tasks.started == []


def test_unknown_names_are_not_found_and_the_known_ones_are_told(client, app):
    for path, known in (
        ("/train/other", "finetune"),
        ("/scoring/other", "scores"),
        ("/batch/infer/other", "sam2sgp"),
        ("/activelearning/other", "random"),
    ):
        answer = client.post(path, json={})
        assert answer.status_code == 404 and f"expected one of {known}" in answer.json()["detail"]
    answer = client.post("/scoring/", json={})
    assert answer.status_code == 400 and "/scoring/scores" in answer.json()["detail"]
    assert app.tasks.started == []


def test_batches_are_of_images_of_the_datastore_only(client, app):
    for image in ("/etc/passwd", "../a", "nobody", "", "a.png", "a/../a", str(app.studies / "a.png")):
        assert_refused(client.post("/batch/infer/sam2sgp", json={"images": [image]}))
        assert_refused(client.post("/batch/infer/sam2sgp", json={"images": ["a", image]}))
    assert app.tasks.started == []
    assert client.post("/batch/infer/sam2sgp", json={"images": ["a"]}).status_code == 200
