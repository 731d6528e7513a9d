"""The adaptation task: what it publishes, who gets it, and when it ends."""

import errno
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from lib.checks import Conflict, RequestError, StorageError
from lib.serving import loaded_network
from lib.serving.options import AdaptParams
from lib.serving.published_weights import Weights
from lib.serving.segmenter import NoSupport
from lib.trainers import adapt
from lib.trainers.adapt import AdaptTask
from sam2sgp.adaptation import Adaptation, plan
from sam2sgp.adaptation.patient_groups import PatientGroups
from sam2sgp.adaptation.record import AdaptationRecord
from sam2sgp.errors import WeightsError
from tests.app.conftest import Studio
from tests.helpers.bundle_runs import computing_with_one_thread

LABELLED = ["us_000_0", "us_001_0", "us_002_0"]
QUERY, LATER = "us_003_0", "us_003_1"
REQUEST = {"model": "adapt", "action": ["train"], "seconds": 60}


class Judged:
    """Adaptations of two steps, whose correctors get a share and a gain in Dice, whatever they are worth."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch, self.share, self.seconds = patch, 0.6, 0.0
        self.adapt = adapt.adapt
        patch.setattr(plan, "WHOLE_SIZE", 64)
        patch.setattr(adapt, "adapt", self)

    def __call__(self, network, bank, seconds, progress, inferer):
        self.patch.setattr(AdaptationRecord, "is_adapted", self.share > 0)
        self.seconds = seconds
        adaptation = self.adapt(network, bank, None, 2, progress=progress, inferer=inferer)
        choices = adaptation.record.choices
        for name, choice in choices.items():
            choices[name] = replace(choice, share=self.share, plain=0.5, adapted=0.6)
        return adaptation


@pytest.fixture
def made(studio):
    return studio([*LABELLED, QUERY, LATER], LABELLED)


@pytest.fixture
def weights(made):
    return Weights(made.folder / "weights", made.settings().start_weights)


@pytest.fixture
def judged(monkeypatch):
    return Judged(monkeypatch)


def a_task(made, weights, events=None):
    def audit(action, **facts):
        if events is not None:
            events.append(action)

    return AdaptTask(made.folder / "state", weights, made.segmenter(weights), audit)


@pytest.fixture
def task(made, weights):
    return a_task(made, weights)


@pytest.fixture(scope="module")
def published(tmp_path_factory, phantom_cases):
    """A weights folder with an adaptation to the three labels in use, the stats of its making and what was audited."""
    made = Studio(tmp_path_factory.mktemp("adapted"), phantom_cases)
    made.add(*LABELLED)
    made.approve(*LABELLED)
    weights, events = Weights(made.folder / "weights", made.settings().start_weights), []
    with pytest.MonkeyPatch.context() as patch, computing_with_one_thread():
        judged = Judged(patch)
        stats = a_task(made, weights, events)(REQUEST, None)
    assert judged.seconds == 60
    return weights.folder, stats, events


@pytest.fixture
def adapted(weights, published):
    """These weights, in use."""
    shutil.copytree(published[0], weights.folder)
    assert weights.active().name == "1"
    return weights


def test_a_clear_gain_is_published_in_the_place_of_the_weights_that_it_corrects(published, made):
    folder, stats, events = published
    assert stats["state"] == "published" and "The adapted weights '1' are in use" in stats["message"], stats
    assert (stats["dice_before"], stats["dice"], stats["judged"]) == (0.5, pytest.approx(0.6), 3)
    assert stats["labels"] == stats["patients"] == 3
    assert stats["weights"]["version"] == "1" and stats["weights"]["before"] == "embedded"
    assert events == ["train", "publish"]
    start = made.settings().start_weights
    assert (folder / "1" / "model.pt").read_bytes() == start.read_bytes()
    assert made.segmenter().gain_of_adaptation(Weights(folder, start).active()) == pytest.approx(0.1)


def test_it_counts_for_images_of_other_patients_until_it_is_rolled_back(made, weights, published):
    segmenter = made.segmenter(weights)

    def segment(name):
        segmenter.refresh()
        segmenter.wait()
        return segmenter.segment(made.image(name), image_id=name)

    before, own = segment(QUERY), segment(LABELLED[0])
    assert before["adapted"] is own["adapted"] is False
    shutil.copytree(published[0], weights.folder)
    after = segment(QUERY)
    assert after["weights"] == "1" and after["adapted"] is True and after["warnings"] == []
    assert after["confidence"] != before["confidence"]
    again = made.segmenter(weights).segment(made.image(QUERY), image_id=QUERY)
    assert again["adapted"] and torch.equal(again["pred"], after["pred"]) and again["confidence"] == after["confidence"]
    # The correctors have learned from its own label.
    unadapted = segment(LABELLED[0])
    assert unadapted["adapted"] is False and unadapted["confidence"] == own["confidence"]

    made.label(LABELLED[0]).unlink()
    assert segment(LABELLED[0])["adapted"] is False, "a label that is taken back was learned from, too"
    made.approve(LABELLED[0])

    made.approve(LATER)
    assert segment(QUERY)["adapted"] is True, "further labels of the same classes guide beside it"

    assert a_task(made, weights)({**REQUEST, "action": "roll_back"}, None)["state"] == "rolled_back"
    made.label(LATER).unlink()
    back = segment(QUERY)
    assert back["adapted"] is False and torch.equal(back["pred"], before["pred"])


def test_a_label_that_it_learned_from_and_that_changed_since_is_told_until_it_is_made_again(
    made, adapted, judged, monkeypatch
):
    segmenter = made.segmenter(adapted)
    segmenter.refresh()
    assert segmenter.status()["adaptation"]["text"] == "Adapted to 3 labels."
    label = np.array(Image.open(made.label(LABELLED[0])))
    Image.fromarray(np.roll(label, 3, axis=0)).save(made.label(LABELLED[0]))
    made.label(LABELLED[1]).unlink()
    made.approve(LATER)
    result = segmenter.segment(made.image(QUERY), image_id="upload")
    told = segmenter.status()["adaptation"]
    assert (told["changed"], told["later"], told["used"]) == ([LABELLED[0], LABELLED[1]], 1, True)
    assert result["adapted"] and result["warnings"] == [told["text"]]
    assert f"2 were corrected or removed since ({LABELLED[0]}, {LABELLED[1]})" in told["text"]
    assert "`adapt` again" in told["text"]
    # Where it doesn't count, it decides nothing.
    assert segmenter.segment(made.image(LABELLED[0]), image_id=LABELLED[0])["warnings"] == []

    made.approve(LABELLED[1])
    assert AdaptTask(made.folder / "state", adapted, segmenter)(REQUEST, None)["state"] == "published"
    segmenter.refresh()
    segmenter.wait()
    assert segmenter.status()["weights"] == "2"
    assert segmenter.status()["adaptation"]["text"] == "Adapted to 4 labels."


def test_without_one_there_is_nothing_to_tell(made):
    segmenter = made.segmenter()
    segmenter.refresh()
    assert segmenter.status()["adaptation"] is None


def test_one_that_is_not_used_has_no_gain_that_a_fine_tuning_must_beat(made, adapted, monkeypatch):
    monkeypatch.setattr("lib.serving.loaded_network.load_weights", lambda *_: pytest.fail("a network is loaded"))
    assert made.segmenter(adapted).gain_of_adaptation(adapted.active()) == pytest.approx(0.1)
    assert made.segmenter(adapted, percentiles="[5, 95]").gain_of_adaptation(adapted.active()) == 0


def test_on_another_device_for_want_of_memory_it_is_left_out_and_said_and_comes_back(made, adapted, monkeypatch):
    segmenter = made.segmenter(adapted)
    before = segmenter.segment(made.image(QUERY), image_id=QUERY)
    with monkeypatch.context() as patch:
        # The CPU by another name, as the second device.
        patch.setattr(loaded_network, "attempts", lambda device, batch_size: [(torch.device("cpu:0"), 1)])
        moved = segmenter.segment(made.image(LATER), image_id=LATER)
    assert moved["adapted"] is False and "on the CPU, without the adaptation" in moved["warnings"][0]
    after = segmenter.segment(made.image(LATER), image_id=LATER)
    assert before["adapted"] is after["adapted"] is True and after["confidence"] != moved["confidence"]


def test_labels_with_a_new_class_end_it_with_a_warning(made, adapted):
    made.approve(LATER)
    label = np.array(Image.open(made.label(LATER)))
    Image.fromarray(np.where(label > 0, 7, 0).astype(np.uint8)).save(made.label(LATER))
    result = made.segmenter(adapted).segment(made.image(QUERY), image_id=QUERY)
    (warning,) = result["warnings"]
    assert "The adaptation is not used" in warning and "`adapt` again" in warning
    assert result["adapted"] is False and result["weights"] == "1" and "class_7" in result["used"]


def test_other_preprocessing_ends_it_with_a_warning(made, adapted):
    result = made.segmenter(adapted, percentiles="[5, 95]").segment(made.image(QUERY), image_id=QUERY)
    assert "other settings" in result["warnings"][0] and result["adapted"] is False


def test_without_a_clear_gain_the_weights_stay_and_an_earlier_adaptation_is_taken_away(
    made, weights, task, published, judged
):
    judged.share = 0.0
    stats = task(REQUEST, None)
    assert stats["state"] == "kept" and "'embedded' stay in use" in stats["message"]
    shutil.copytree(published[0], weights.folder)
    stats = a_task(made, weights)(REQUEST, None)
    assert stats["state"] == "published" and "taken away" in stats["message"] and weights.active().name == "2"
    assert not (weights.active().path.parent / "adapted_to.json").exists()


def test_without_the_time_to_judge_an_earlier_adaptation_stays(made, adapted, monkeypatch):
    unfinished = AdaptationRecord(3, PatientGroups(("a", "b", "c"), "patients"), [], plan.Plan(64, False), judged=1)
    monkeypatch.setattr(adapt, "adapt", lambda *arguments, **options: Adaptation([], unfinished))
    stats = a_task(made, adapted)(REQUEST, None)
    assert stats["state"] == "kept" and "Give it more seconds. The weights '1' stay in use." in stats["message"]
    assert adapted.active().name == "1"


def test_a_full_disk_ends_it_with_the_weights_as_they_were(weights, task, judged, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sam2sgp.adaptation.store.save_file", full)
    with pytest.raises(StorageError, match="free some space .* The weights stay as they are"):
        task(REQUEST, None)
    assert task.stats()["state"] == "failed" and weights.active().name == "embedded"


def test_two_patients_are_too_few_and_none_is_an_error(made, weights, task):
    made.label(LABELLED[2]).unlink()
    stats = task(REQUEST, None)
    assert stats["state"] == "kept" and "The evidence is thin" in stats["message"] and "dice" not in stats
    for name in LABELLED[:2]:
        made.label(name).unlink()
    with pytest.raises(NoSupport, match="No approved label"):
        task(REQUEST, None)
    assert task.stats()["state"] == "failed" and weights.active().name == "embedded"


def test_what_a_fine_tuning_goes_on_from_stays_with_the_adapted_weights(made, weights, task, judged, tmp_path):
    (tmp_path / "halves.json").write_text('{"us_000": 0}')
    weights.publish(weights.active().path, {}, {"halves.json": tmp_path / "halves.json"})
    task(REQUEST, None)
    assert weights.active().name == "2"
    assert (weights.active().path.parent / "halves.json").read_text() == '{"us_000": 0}'


def test_a_damaged_adaptation_is_named_with_its_folder(made, adapted):
    folder = adapted.active().path.parent
    with open(folder / "correctors.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(WeightsError, match=f"{folder}: expected the adaptation .* restore the folder"):
        made.segmenter(adapted).segment(made.image(QUERY))


@pytest.mark.parametrize("option", [{"seconds": 5}, {"seconds": "long"}, {"seconds": 1e9}, {"action": "delete"}])
def test_options_that_cannot_work_are_refused(task, weights, option):
    with pytest.raises(RequestError, match=next(iter(option))):
        task({**REQUEST, **option}, None)
    assert weights.active().name == "embedded"


@pytest.mark.parametrize("nothing", ["", None, [], [""]])
def test_an_empty_field_stands_for_the_default(task, nothing):
    assert AdaptParams.of_request({**REQUEST, "seconds": nothing}).seconds == 60


def test_it_waits_for_no_other_training(task):
    task.folder.mkdir(parents=True)
    with FileLock(task.folder / ".lock"), pytest.raises(Conflict, match="is running already"):
        task(REQUEST, None)


def test_panels_are_told_of_the_options(task):
    info = task.info()
    assert info["config"] == {"action": ["train", "roll_back"], "seconds": 60.0}
    assert info["options"]["properties"].keys() == info["config"].keys()
