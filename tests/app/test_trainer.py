"""The fine-tuning task: what it trains on, when it publishes, how it is followed, stopped and undone."""

import json
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from lib.checks import Conflict, RequestError, StorageError
from lib.trainers.data import digest, split
from lib.trainers.finetune import FineTuning
from lib.trainers.status import StatusHandler
from lib.weights import Weights
from sam2sgp.data import class_names, load_datalist
from sam2sgp.data.phantom import make_phantoms
from sam2sgp.errors import DataError, WeightsError
from sam2sgp.files import write_text
from sam2sgp.networks import SAM2SGP, load_weights, save_weights
from tests.e2e.disks import disk

BUNDLE = Path(__file__).parents[2] / "bundle"
TINY = {
    "image_size": 64,
    "episodes_per_step": 2,
    "images_per_episode": 4,
    "clip_length": 2,
    "max_k": 2,
    "k": 2,
    "num_workers": 0,
    "val_max_cases": 2,
    "three_d_memory": False,
    "region_below": 0.0,
}
REQUEST = {"model": "finetune", "device": "cpu", "max_epochs": 1, "episodes_per_epoch": 2}


@pytest.fixture(autouse=True)
def own_hook(monkeypatch):
    """The bundle's `initialize` replaces the hook that prints uncaught exceptions."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trainer") / "set"
    return make_phantoms(directory, 6, size=(64, 64), num_slices=6, modalities=("us",), progress=False)


@pytest.fixture(scope="module")
def cases(phantoms):
    """A labelled picture of each of six patients."""
    return list({case["patient"]: case for case in load_datalist(phantoms)}.values())


class Events(list):
    def __call__(self, action, **facts):
        self.append((action, facts))


def a_task(tmp_path, cases, phantoms, start=BUNDLE / "models" / "model.pt", left_out=()):
    weights = Weights(tmp_path / "weights", start)
    names = class_names(phantoms)
    events = Events()
    task = FineTuning(BUNDLE, tmp_path, weights, lambda: (cases, left_out), lambda: names, TINY, audit=events)
    return task, weights, events


def some(count, patients):
    return [{"name": f"n{i}", "patient": f"p{i % patients}", "image": "i", "label": "l"} for i in range(count)]


def test_whole_patients_are_held_back_and_stay_so_as_labels_are_added():
    sections = split(some(24, 12))
    patients = {name: {case["patient"] for case in cases} for name, cases in sections.items()}
    assert len(patients["validation"]) == 3 and len(patients["training"]) == 9
    assert not patients["validation"] & patients["training"]
    grown = {case["patient"] for case in split(some(26, 13))["validation"]}
    assert grown == patients["validation"] or len(grown & patients["validation"]) >= 2


def test_too_few_patients_are_refused_in_one_sentence(tmp_path, phantoms):
    why = "labels/final/x.png: expected a label, found none."
    task, weights, events = a_task(tmp_path, some(5, 3), phantoms, left_out=[why])
    with pytest.raises(DataError, match="at least 4 patients, found 5 of 3"):
        task(REQUEST, None)
    assert task.stats()["state"] == "failed" and "at least 4 patients" in task.stats()["message"]
    assert task.stats()["left_out"] == [why]
    assert weights.active().name == "embedded" and not events and not task.work.exists()


def test_the_digest_follows_label_content_and_not_where_files_are(tmp_path):
    def sections(folder, content):
        folder.mkdir()
        (folder / "image").write_bytes(b"12")
        (folder / "label").write_bytes(content)
        case = {"name": "a", "patient": "p", "image": str(folder / "image"), "label": str(folder / "label")}
        return {"training": [case], "validation": []}

    one, same, other = (
        sections(tmp_path / name, content) for name, content in zip("abc", (b"x", b"x", b"y"), strict=True)
    )
    assert digest(one) == digest(same) != digest(other)
    assert digest(one) != digest({"training": [], "validation": one["training"]})


def test_better_weights_are_published_as_a_plain_file_and_can_be_rolled_back(tmp_path, phantoms, cases):
    torch.manual_seed(0)
    start = SAM2SGP("nano", 64)
    load_weights(start, BUNDLE / "models" / "model.pt")
    with torch.no_grad():  # spoilt, so that a few steps make it better
        start.refinement.requires_grad_(True)
        for parameter in start.refinement.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    save_weights(start, tmp_path / "spoilt.pt")
    task, weights, events = a_task(tmp_path, cases, phantoms, tmp_path / "spoilt.pt")
    stats = task({**REQUEST, "learning_rate": 3e-3, "episodes_per_epoch": 16}, None)
    assert stats["state"] == "published", stats
    assert stats["new_metric"] > stats["start_metric"] and stats["best_metric"] > 0
    assert stats["epoch"] == stats["max_epochs"] == 1 and stats["step"] == stats["steps"] == 8
    assert stats["weights"]["version"] == "1" and stats["weights"]["before"] == "embedded"
    assert stats["history"] == [{"epoch": 1, "metric": stats["metric"]}]
    load_weights(SAM2SGP("nano", 64), weights.active().path)
    assert (weights.active().path.parent / "lora" / "adapter_model.safetensors").is_file()
    assert [path.name for path in task.work.iterdir()] == ["tensorboard"]
    assert [action for action, _ in events] == ["train", "publish"]

    assert task({"model": "finetune", "action": ["roll_back"]}, None)["state"] == "rolled_back"
    assert weights.active().name == "embedded" and events[-1][0] == "roll_back"


@pytest.mark.parametrize(
    "option",
    [
        {"max_epochs": "$__import__('os').getcwd()"},
        {"max_epochs": 1.5},
        {"learning_rate": "nan"},
        {"episodes_per_epoch": 0},
        {"device": "$exit()"},
        {"action": "delete"},
    ],
)
def test_options_that_cannot_work_are_refused_and_none_is_run_as_code(tmp_path, phantoms, cases, option):
    task, _, events = a_task(tmp_path, cases, phantoms)
    with pytest.raises(RequestError, match=next(iter(option))):
        task({**REQUEST, **option}, None)
    assert not events


def test_options_are_the_bundles_and_the_panels_lists_count_as_their_first_element(tmp_path, phantoms, cases):
    task, _, _ = a_task(tmp_path, cases, phantoms)
    train, overlay = (json.loads((BUNDLE / "configs" / name).read_text()) for name in ("train.json", "finetune.json"))
    declared = {**train, **overlay}
    config = task.info()["config"]
    assert config["max_epochs"] == declared["max_epochs"] and config["learning_rate"] == declared["learning_rate"]
    assert config["action"] == ["train", "roll_back"]
    options = task._options({**config, "device": ["cpu"]})
    assert options["device"] == "$torch.device('cpu')" and options["max_epochs"] == declared["max_epochs"]


def test_only_devices_that_are_there_are_taken(tmp_path, phantoms, cases, monkeypatch):
    task, _, _ = a_task(tmp_path, cases, phantoms)
    monkeypatch.setattr("lib.trainers.finetune.name_to_device", lambda name: name or "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert task._device("cpu") == "cpu"
    assert task._device(None) == task._device("cuda:0") == "cuda:0"
    for name in ("cuda:1", "mps", "cuda:x"):
        with pytest.raises(RequestError, match="device is"):
            task._device(name)


def test_a_killed_training_reads_as_stopped_and_the_next_one_goes_on_but_publishes_nothing_that_is_not_better(
    tmp_path, phantoms, cases, monkeypatch
):
    task, weights, events = a_task(tmp_path, cases, phantoms)
    request = {**REQUEST, "max_epochs": 2, "learning_rate": 1e-12}
    epoch = StatusHandler._epoch

    def killed(handler, engine):
        epoch(handler, engine)
        if engine.state.epoch == 1:
            raise KeyboardInterrupt  # like SIGKILL, nothing of the task's own handles it

    monkeypatch.setattr(StatusHandler, "_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        task(request, None)
    monkeypatch.undo()
    assert task.stats()["state"] == "running" and task.stats()["best_epoch"] == 1
    written = json.loads(task.status.path.read_text())
    write_text(task.status.path, json.dumps({**written, "pid_created": 0.0}))
    stopped = task.stats()
    assert stopped["state"] == "stopped" and "after 1 of 2 epochs" in stopped["message"]
    assert weights.active().name == "embedded" and not events[0][1]["resumed"]

    stats = task(request, None)
    assert stats["state"] == "kept" and stats["epoch"] == 2 and "'embedded' stay in use" in stats["message"]
    assert [action for action, _ in events] == ["train", "train", "keep"] and events[1][1]["resumed"]
    assert weights.versions() == [weights.active()]


def test_a_training_that_finds_no_space_says_so_and_goes_on_when_there_is_some(tmp_path, phantoms, cases):
    # Enough to begin with, but too little for a checkpoint.
    with disk(tmp_path / "state", 2) as state:
        task, weights, events = a_task(state.folder, cases, phantoms)
        with pytest.raises(StorageError, match="training: expected to write to the state folder.*free some space") as e:
            task(REQUEST, None)
        assert e.value.status == 507 and "\n" not in str(e.value)
        assert task.stats()["state"] == "failed" and task.stats()["message"] == str(e.value)
        assert weights.active().name == "embedded" and not list(task.work.glob("*.pt"))
        state.resize(256)
        assert task(REQUEST, None)["state"] in ("published", "kept")
        with state.read_only(), pytest.raises(StorageError, match="Read-only file system.*permissions"):
            task(REQUEST, None)


def test_one_training_at_a_time(tmp_path, phantoms, cases):
    task, _, _ = a_task(tmp_path, cases, phantoms)
    task.folder.mkdir()
    with FileLock(task.folder / ".lock"):
        for action in ("train", "roll_back"):
            with pytest.raises(Conflict, match="running already"):
                task({**REQUEST, "action": action}, None)


def test_other_labels_or_options_begin_anew(tmp_path, phantoms, cases):
    task, _, events = a_task(tmp_path, cases, phantoms)
    sections = split(cases)
    assert task._prepare(sections, ["a"]) is None
    (task.work / "last.pt").touch()
    task._remember(0.5)
    assert task._prepare(sections, ["a"]) == 0.5 and (task.work / "last.pt").exists()
    assert task._prepare(sections, ["b"]) is None and not (task.work / "last.pt").exists()


def test_rolling_back_where_there_is_nothing_before_says_so(tmp_path, phantoms, cases):
    task, _, _ = a_task(tmp_path, cases, phantoms)
    with pytest.raises(WeightsError, match="none before"):
        task({"model": "finetune", "action": "roll_back"}, None)
    with FileLock(task.folder / ".lock", timeout=0):
        pass  # released
