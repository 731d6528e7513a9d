"""The fine-tuning task: what it trains on, when it publishes, how it is followed, stopped and undone."""

import json
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from lib.checks import Conflict, RequestError, StorageError
from lib.serving.published_weights import Weights
from lib.trainers.finetune import FineTuning
from lib.trainers.status import StatusHandler
from sam2sgp.data import class_names, load_datalist
from sam2sgp.data.phantom import make_phantoms
from sam2sgp.errors import DataError, WeightsError
from sam2sgp.files import write_text
from sam2sgp.networks import SAM2SGP, load_weights
from tests.e2e.disks import disk
from tests.helpers.labelled import some
from tests.helpers.spoilt import save_spoilt_weights

BUNDLE = Path(__file__).parents[3] / "bundle"
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


def test_a_training_says_what_it_does_from_its_beginning(tmp_path, phantoms):
    task, _, _ = a_task(tmp_path, [], phantoms)
    shown = []
    task.cases = lambda: (shown.append(task.stats()) or [], [])
    with pytest.raises(DataError):
        task(REQUEST, None)
    assert shown[0]["state"] == "running" and shown[0]["message"]


def test_too_few_patients_are_refused_in_one_sentence(tmp_path, phantoms):
    why = "labels/final/x.png: expected a label, found none."
    task, weights, events = a_task(tmp_path, some(5, 3), phantoms, left_out=[why])
    with pytest.raises(DataError, match="at least 4 patients, found 5 of 3"):
        task(REQUEST, None)
    assert task.stats()["state"] == "failed" and "at least 4 patients" in task.stats()["message"]
    assert task.stats()["left_out"] == [why]
    assert weights.active().name == "embedded" and not events and not task.work.exists()


def test_better_weights_are_published_as_a_plain_file_and_can_be_rolled_back(tmp_path, phantoms, cases):
    spoilt = save_spoilt_weights(tmp_path / "spoilt.pt")
    task, weights, events = a_task(tmp_path, cases, phantoms, spoilt)
    request = {**REQUEST, "learning_rate": 3e-3, "episodes_per_epoch": 32}
    stats = task(request, None)
    assert stats["state"] == "published", stats
    assert stats["new_metric"] - stats["start_metric"] > stats["gain_error"] > 0 and stats["best_metric"] > 0
    assert stats["judged"] == 6, "every label is judged"
    assert stats["epoch"] == stats["max_epochs"] == 2 and stats["step"] == stats["steps"] == 32
    assert stats["weights"]["version"] == "1" and stats["weights"]["before"] == "embedded"
    assert [(row["part"], row["epoch"]) for row in stats["history"]] == [(0, 1), (1, 2)]
    assert stats["history"][1]["metric"] == stats["metric"]
    assert {str(path.relative_to(task.work)) for path in task.work.rglob("*") if path.is_dir()} >= {
        "half_0/tensorboard",
        "half_1/tensorboard",
    }
    assert not [path for path in task.work.rglob("*") if path.is_file() and "events" not in path.name]
    assert [action for action, _ in events] == ["train", "publish"]

    load_weights(SAM2SGP("lite", 64), weights.active().path)
    # What serves is the mean of both halves' weights, and those were not trained alike.
    folder = weights.active().path.parent
    states = [torch.load(folder / f"half_{half}.pt", weights_only=True) for half in (0, 1)]
    mean = torch.load(weights.active().path, weights_only=True)
    changed = [name for name in mean if not torch.equal(states[0][name], states[1][name])]
    assert changed
    for name in changed:
        assert torch.allclose(mean[name], (states[0][name] + states[1][name]) / 2, atol=1e-6)
    half_of = json.loads((folder / "halves.json").read_text())
    assert half_of.keys() == {case["patient"] for case in cases}

    # The next training of a half starts from that half's own weights, which never saw the other's labels.
    starts, run = [], FineTuning._run
    task._run = lambda settings, half: starts.append(settings["model_file"]) or run(task, settings, half)
    assert task({**REQUEST, "learning_rate": 1e-12}, None)["state"] == "kept"
    assert starts == [str(folder / "half_0.pt"), str(folder / "half_1.pt")]
    (folder / "halves.json").write_text("{")
    with pytest.raises(WeightsError, match="halves.json.*restore it, or roll back"):
        task(request, None)

    assert task({"model": "finetune", "action": ["roll_back"]}, None)["state"] == "rolled_back"
    assert weights.active().name == "embedded" and events[-1][0] == "roll_back"


def test_each_half_trains_on_its_own_patients_alone_and_is_judged_on_the_others(tmp_path, phantoms, cases, monkeypatch):
    task, weights, _ = a_task(tmp_path, cases, phantoms)
    listings = []

    def run(settings, half):
        listings.append(json.loads(Path(settings["dataset_dir"]).read_text()))
        return weights.active().path

    monkeypatch.setattr(task, "_run", run)
    dice = iter([{"a": 0.5, "b": 0.5}, {"a": 0.9, "b": 0.7}, {"c": 0.5, "d": 0.5}, {"c": 0.1, "d": 0.4}])
    monkeypatch.setattr(task, "_dice", lambda path, settings: next(dice))
    stats = task(REQUEST, None)
    assert stats["state"] == "kept", "one half's luck does not pay for the other's loss"
    assert (stats["start_metric"], stats["new_metric"]) == (0.5, pytest.approx(0.525))
    patients = [
        [{case["patient"] for case in listing[name]} for name in ("training", "validation")] for listing in listings
    ]
    assert patients[0] == patients[1][::-1] and len(patients[0][0]) == len(patients[0][1]) == 3
    assert not patients[0][0] & patients[0][1]


@pytest.mark.parametrize(
    "in_use, gain, state, told",
    [
        (True, 0.05, "kept", "than with the adaptation, which gains 0.1000"),
        (True, 0.2, "published", "They are not adapted"),
        (False, 0.05, "published", "are in use."),
    ],
)
def test_adapted_weights_give_way_only_to_a_gain_above_that_of_an_adaptation_in_use(
    tmp_path, phantoms, cases, monkeypatch, in_use, gain, state, told
):
    task, weights, _ = a_task(tmp_path, cases, phantoms)
    made_for = tmp_path / "adapted_to.json"
    made_for.write_text("{}")
    weights.publish(weights.active().path, {"dice": 0.6, "dice_before": 0.5}, {made_for.name: made_for})
    task.gain_of_adaptation = lambda version: 0.1 if in_use and version.name == "1" else 0.0
    monkeypatch.setattr(task, "_run", lambda settings, half: weights.active().path)
    measured = [{"a": 0.5, "b": 0.5}, {"a": 0.51 + gain, "b": 0.49 + gain}]
    dice = iter([*measured, *({f"other {name}": value for name, value in part.items()} for part in measured)])
    monkeypatch.setattr(task, "_dice", lambda path, settings: next(dice))
    stats = task(REQUEST, None)
    assert stats["state"] == state and told in stats["message"]
    assert weights.active().path.with_name(made_for.name).is_file() == (state == "kept")


def test_a_training_that_broke_off_goes_on_although_an_adaptation_was_published_meanwhile(
    tmp_path, phantoms, cases, monkeypatch
):
    task, weights, _ = a_task(tmp_path, cases, phantoms)
    monkeypatch.setattr(task, "_run", lambda settings, half: weights.active().path)
    left = [{"a": 0.5, "b": 0.5}] * 3
    monkeypatch.setattr(task, "_dice", lambda path, settings: left.pop())
    with pytest.raises(IndexError):
        task(REQUEST, None)
    made_for = tmp_path / "adapted_to.json"
    made_for.write_text("{}")
    weights.publish(weights.active().path, {"dice": 0.5, "dice_before": 0.5}, {made_for.name: made_for})
    # Of both halves, before and after, only what is missing.
    left.append({"a": 0.5, "b": 0.5})
    assert task(REQUEST, None)["state"] == "kept"


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
    schema = task.info()["options"]["properties"]
    assert schema.keys() == config.keys() and schema["learning_rate"]["anyOf"][0]["maximum"] == 10
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


def test_a_training_that_ends_with_its_server_reads_as_stopped_and_goes_on_where_it_was_after_a_restart(
    tmp_path, phantoms, cases, monkeypatch
):
    """Killed after the first epoch of the second half: then all that was built is gone, but for what is on the disk."""
    request = {**REQUEST, "max_epochs": 2, "learning_rate": 1e-12}
    step, epoch, dice = StatusHandler._step, StatusHandler._epoch, FineTuning._dice
    trained, measured = [], []

    def stepped(handler, engine):
        trained.append((handler.part, engine.state.epoch))
        step(handler, engine)

    def killed(handler, engine):
        epoch(handler, engine)
        if trained and trained[-1] == (1, 1):
            raise KeyboardInterrupt  # like SIGKILL, nothing of the task's own handles it

    monkeypatch.setattr(StatusHandler, "_step", stepped)
    monkeypatch.setattr(FineTuning, "_dice", lambda task, *given: measured.append(1) or dice(task, *given))
    with monkeypatch.context() as patch:
        patch.setattr(StatusHandler, "_epoch", killed)
        task, weights, events = a_task(tmp_path, cases, phantoms)
        with pytest.raises(KeyboardInterrupt):
            task(request, None)
    assert trained == [(0, 1), (0, 2), (1, 1)] and len(measured) == 3
    assert task.stats()["state"] == "running" and weights.active().name == "embedded"
    assert [action for action, _ in events] == ["train"] and not events[0][1]["resumed"]

    written = json.loads(task.status.path.read_text())
    write_text(task.status.path, json.dumps({**written, "pid_started": 0.0}))
    task, weights, events = a_task(tmp_path, cases, phantoms)
    stopped = task.stats()
    assert stopped["state"] == "stopped" and "after 3 of 4 epochs" in stopped["message"]
    stats = task(request, None)
    assert trained[3:] == [(1, 2)] and len(measured) == 4
    assert [(row["part"], row["epoch"]) for row in stats["history"]] == [(0, 1), (0, 2), (1, 3), (1, 4)]
    # It publishes nothing that is not better.
    assert stats["state"] == "kept" and stats["epoch"] == 4 and "'embedded' stay in use" in stats["message"]
    assert [action for action, _ in events] == ["train", "keep"] and events[0][1]["resumed"]
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
    task, _, _ = a_task(tmp_path, cases, phantoms)
    dice = {"p": 0.5}
    assert task._prepare("labels", ["a"]).measured("before_0", lambda: dice) == dice
    (task.work / "last.pt").touch()
    run = task._prepare("labels", ["a"])
    assert run.dice == {"before_0": dice} and (task.work / "last.pt").exists()
    assert run.measured("before_0", dict) == dice and run.measured("after_0", dict) == {}
    run = task._prepare("labels", ["b"])
    assert run.dice == {} and not (task.work / "last.pt").exists()
    run.measured("before_0", lambda: dice)
    assert task._prepare("others", ["b"]).dice == {}


def test_rolling_back_where_there_is_nothing_before_says_so(tmp_path, phantoms, cases):
    task, _, _ = a_task(tmp_path, cases, phantoms)
    with pytest.raises(WeightsError, match="none before"):
        task({"model": "finetune", "action": "roll_back"}, None)
    with FileLock(task.folder / ".lock", timeout=0):
        pass  # released
