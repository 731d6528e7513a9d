"""What the trainings have in common: one at a time, an outcome that is told, and weights that stay where it fails."""

import errno

import pytest
from filelock import FileLock

from lib.checks import Conflict, RequestError, StorageError
from lib.serving.options import AdaptParams
from lib.serving.published_weights import Weights
from lib.trainers.publishing import Publishing
from sam2sgp.errors import DataError, WeightsError


class Training(Publishing):
    """Does what a test gives it."""

    params = AdaptParams

    def __init__(self, folder, weights, work=lambda: None):
        super().__init__("A training", folder, weights, lambda action, **facts: self.events.append((action, facts)))
        self.events, self.work = [], work

    def config(self):
        return {}

    def _make_weights(self, request, history):
        self.work()


@pytest.fixture
def weights(tmp_path):
    (tmp_path / "start.pt").write_bytes(b"weights")
    return Weights(tmp_path / "weights", tmp_path / "start.pt")


def failing(error):
    def work():
        raise error

    return work


def test_only_one_of_any_kind_runs_at_a_time(tmp_path, weights):
    training = Training(tmp_path, weights)
    training.folder.mkdir()
    with FileLock(training.folder / ".lock"), pytest.raises(Conflict, match="is running already"):
        training({}, None)
    assert training({}, None)["weights"]["version"] == "embedded"


def test_a_failure_is_told_in_one_sentence_and_the_weights_stay(tmp_path, weights):
    training = Training(tmp_path, weights, failing(DataError("a.png: expected a label, found none.\nMore of it.")))
    with pytest.raises(DataError):
        training({}, None)
    stats = Training(tmp_path, weights).stats()
    assert (stats["state"], stats["message"]) == ("failed", "a.png: expected a label, found none.")
    assert stats["weights"]["version"] == "embedded" and training.events == []


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (DataError("a.png: expected a label, found none."), DataError),
        (OSError(errno.ENOSPC, "no place"), StorageError),
        (OSError(errno.EIO, "a broken disk"), StorageError),
    ],
)
def test_what_fails_after_new_weights_came_into_use_says_so(tmp_path, weights, error, raised):
    def work():
        weights.publish(tmp_path / "start.pt", {})
        raise error

    training = Training(tmp_path, weights, work)
    with pytest.raises(raised) as caught:
        training({}, None)
    stats = training.stats()
    assert stats["state"] == "failed" and stats["weights"]["version"] == "1"
    assert stats["message"].endswith("The weights '1' are in use already, in the place of 'embedded'.")
    for text in (stats["message"], str(caught.value)):
        assert "stay as they are" not in text


def test_a_roll_back_that_can_not_be_noted_says_which_weights_are_in_use(tmp_path, weights, monkeypatch):
    weights.publish(tmp_path / "start.pt", {})
    training = Training(tmp_path, weights)
    monkeypatch.setattr(training, "audit", lambda *about, **facts: failing(OSError(errno.ENOSPC, "no place"))())
    with pytest.raises(StorageError, match="The weights 'embedded' are in use already, in the place of '1'"):
        training({"action": "roll_back"}, None)


def test_one_that_was_stopped_after_new_weights_came_into_use_says_so(tmp_path, weights, monkeypatch):
    def work():
        training.status.update(start_weights="embedded")
        told.append(Training(tmp_path, weights).stats())
        weights.publish(tmp_path / "start.pt", {})
        told.append(Training(tmp_path, weights).stats())

    told = []
    training = Training(tmp_path, weights, work)
    monkeypatch.setattr("lib.trainers.status.is_running", lambda mark: False)
    training({}, None)
    assert [stats["state"] for stats in told] == ["stopped", "stopped"]
    assert told[0]["message"] == "The training was stopped; the weights are as before."
    assert told[1]["message"] == "The training was stopped, but its weights '1' are in use already."


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_takes_nothing_more_is_told_as_that(tmp_path, weights, number):
    def work():
        try:
            raise OSError(number, "no place")
        except OSError as error:
            raise RuntimeError("the writer failed") from error

    with pytest.raises(StorageError, match="found no place; free some space"):
        Training(tmp_path, weights, work)({}, None)


def test_a_mistake_of_the_code_keeps_its_traceback(tmp_path, weights):
    with pytest.raises(ZeroDivisionError):
        Training(tmp_path, weights, failing(ZeroDivisionError("division by zero")))({}, None)
    assert Training(tmp_path, weights).stats()["state"] == "failed"


def test_weights_are_rolled_back_once_for_each_that_was_published(tmp_path, weights):
    weights.publish(tmp_path / "start.pt", {})
    training = Training(tmp_path, weights, failing(AssertionError("nothing is trained")))
    assert training({"action": "roll_back"}, None)["state"] == "rolled_back"
    assert training.events == [("roll_back", {"weights": "embedded", "replaced": "1"})]
    with pytest.raises(WeightsError, match="none before them"):
        training({"action": "roll_back"}, None)


def test_an_option_that_cannot_work_starts_nothing(tmp_path, weights):
    training = Training(tmp_path, weights, failing(AssertionError("it was started")))
    with pytest.raises(RequestError, match="seconds"):
        training({"seconds": "soon"}, None)
    assert training.info()["options"]["properties"].keys() == {"action", "seconds"}
