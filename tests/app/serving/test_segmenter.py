"""The segmenter: the support set follows the labels, requests are honest, and weights are exchanged whole."""

import io
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lib.checks import NotFound, RequestError
from lib.serving.loaded_network import LoadedNetwork
from lib.serving.options import Options
from lib.serving.published_weights import Weights
from lib.serving.segmenter import NoSupport, Stopped
from lib.stores import image_identity
from lib.stores.audit import content_hash
from sam2sgp.data.io import read_label
from sam2sgp.errors import DataError
from sam2sgp.networks import save_weights
from tests.helpers.nifti_files import save_nifti

PICTURES = ["us_000_0", "us_001_0", "us_002_0", "us_003_0"]
QUERY = "us_003_0"


def used(result) -> set[str]:
    return {item["image"] for items in result["used"].values() for item in items}


def dice(result, label) -> float:
    truth, found = torch.as_tensor(read_label(label)) > 0, result["pred"] > 0
    return float(2 * (truth & found).sum() / (truth.sum() + found.sum()))


def test_an_approved_label_guides_the_very_next_request_and_leaves_with_its_file(studio):
    made = studio(PICTURES, ["us_000_0"])
    segmenter = made.segmenter()
    assert used(segmenter.segment(made.image(QUERY))) == {"us_000_0"}
    # Whoever only looks at an image scales it like a request.
    prepared = segmenter.prepare(made.image(QUERY), QUERY)
    assert segmenter.state().scaling == prepared["support_scaling"] and prepared["support_scaling"].kinds
    made.approve("us_001_0")
    assert used(segmenter.segment(made.image(QUERY))) == {"us_000_0", "us_001_0"}
    made.label("us_000_0").unlink()
    result = segmenter.segment(made.image(QUERY))
    assert used(result) == {"us_001_0"} and result["support_items"] == 1


def test_seed_pairs_guide_together_with_approved_labels(studio, tmp_path):
    made = studio(PICTURES, ["us_000_0"])
    for kind in ("image", "label"):
        (tmp_path / "seeds" / f"{kind}s").mkdir(parents=True)
        shutil.copy(made.known["us_001_1"][kind], tmp_path / "seeds" / f"{kind}s")
    segmenter = made.segmenter(support_dir=str(tmp_path / "seeds"))
    assert used(segmenter.segment(made.image(QUERY))) == {"us_000_0", "seeds/us_001_1"}


def test_a_label_edited_in_place_changes_the_next_result(studio):
    made = studio(PICTURES, ["us_000_0"])
    segmenter = made.segmenter()
    before = segmenter.segment(made.image(QUERY))
    # The same pixels of another image's label, in the very file.
    shutil.copyfile(made.known["us_001_0"]["label"], made.label("us_000_0"))
    after = segmenter.segment(made.image(QUERY))
    (old,), (new,) = (result["used"]["class_1"] for result in (before, after))
    assert old["image"] == new["image"] and old["item"] != new["item"]
    fresh = made.segmenter(state_dir=str(made.folder / "other")).segment(made.image(QUERY))
    assert torch.equal(after["pred"], fresh["pred"])


def test_whether_a_volume_is_cut_like_the_support_set_is_told_of_the_set_as_it_is_now(studio):
    made = studio([])
    image = np.random.default_rng(0).normal(size=(8, 8, 8)).astype(np.float32)
    label = np.zeros(image.shape, np.uint8)
    label[2:6, 2:6, 2:6] = 1
    affines = {"axial": np.diag([1.0, 1, 3, 1]), "sagittal": np.diag([3.0, 1, 1, 1])}
    for name, affine in (*affines.items(), ("query", affines["sagittal"])):
        save_nifti(made.studies / f"{name}.nii.gz", image, affine)
    segmenter = made.segmenter(three_d_memory="false")
    for approved, said in (("axial", ["It is cut into sagittal slices,"]), ("sagittal", [])):
        save_nifti(made.studies / "labels" / "final" / f"{approved}.nii.gz", label, affines[approved])
        warnings = segmenter.segment(made.studies / "query.nii.gz")["warnings"]
        assert [sentence[:31] for sentence in warnings] == said


def test_labels_of_other_tags_never_guide(studio):
    made = studio(PICTURES, ["us_000_0"])
    made.approve("us_001_0", tag="original")
    made.approve("us_002_0", tag="review")
    assert used(made.segmenter().segment(made.image(QUERY))) == {"us_000_0"}


def test_without_an_approved_object_the_answer_says_what_to_do_first(studio, tmp_path):
    made = studio(PICTURES)
    segmenter = made.segmenter()
    with pytest.raises(NoSupport, match="label an image by hand and approve its label \\(tag 'final'\\)") as caught:
        segmenter.segment(made.image(QUERY))
    assert caught.value.status == 409
    made.approve("us_000_0")
    assert segmenter.segment(made.image(QUERY))["support_items"] == 1


def test_an_empty_label_is_no_object(studio):
    made = studio(PICTURES, ["us_000_0"])
    made.label("us_000_0").write_bytes(_png(np.zeros((64, 80), np.uint8)))
    with pytest.raises(NoSupport):
        made.segmenter().segment(made.image(QUERY))


def test_a_labelled_image_is_not_guided_by_its_own_patient(studio):
    pictures = [*PICTURES, "us_003_1"]
    made = studio(pictures, ["us_000_0", QUERY, "us_003_1"])
    segmenter = made.segmenter(patient_pattern=r"^us_\d+")
    assert used(segmenter.segment(made.image(QUERY), image_id=QUERY)) == {"us_000_0"}
    # An unlabelled image may be guided by others of its patient.
    made.label(QUERY).unlink()
    assert used(segmenter.segment(made.image(QUERY), image_id=QUERY)) == {"us_000_0", "us_003_1"}


def test_an_image_with_no_label_but_its_own_is_refused(studio):
    made = studio(PICTURES, [QUERY])
    with pytest.raises(NoSupport, match=f"image {QUERY}: expected approved labels of other patients"):
        made.segmenter().segment(made.image(QUERY), image_id=QUERY)


def test_a_label_that_cannot_be_used_leaves_the_others_at_work(studio):
    made = studio(PICTURES, ["us_000_0", "us_001_0"])
    made.label("us_001_0").write_bytes(_png(np.ones((32, 32), np.uint8)))
    segmenter = made.segmenter()
    assert used(segmenter.segment(made.image(QUERY))) == {"us_000_0"}
    (error,) = segmenter.status()["errors"]
    assert error.startswith(f"{made.label('us_001_0')}: expected a label of its image's size") and "32" in error


def test_what_may_be_wrong_with_labels_that_are_used_is_told_after_a_restart_too(studio):
    made = studio(PICTURES, ["us_000_0"])
    values = np.zeros((64, 80), np.uint8)
    values[8:40, 10:30], values[40:60, 40:70] = 1, 255
    made.label("us_000_0").write_bytes(_png(values))
    for _ in range(2):
        segmenter = made.segmenter()
        assert segmenter.segment(made.image(QUERY))["support_items"] == 1
        (told,) = segmenter.status()["warnings"]
        assert told.startswith(f"{made.label('us_000_0')}: value 255 beside 1 often marks pixels to ignore")
    made.approve("us_000_0")
    segmenter.take_in()
    assert segmenter.status()["warnings"] == []


def test_an_approved_label_guides_nothing_once_another_image_is_in_the_place_of_its_own(studio):
    made = studio(PICTURES, ["us_000_0"])
    segmenter = made.segmenter()
    label = made.known["us_001_0"]["label"]
    segmenter.cases.datastore.save_label("us_001_0", str(label), "final", {"label_info": [{"idx": 1, "name": "disc"}]})
    shutil.copy(made.image("us_001_0"), made.folder / "copy.png")
    shutil.copy(made.folder / "copy.png", made.image("us_001_0"))
    assert len(segmenter.usable_cases()[0]) == 2
    shutil.copy(made.image("us_002_0"), made.image("us_001_0"))
    (case,), (sentence,) = segmenter.usable_cases()
    assert case["name"] == "us_000_0"
    assert sentence.startswith("image us_001_0: expected an approved label of this image, found one that was made of")
    segmenter.take_in()
    status = segmenter.status()
    assert status["errors"] == [sentence] and status["cases"] == 1


@pytest.mark.parametrize("take_in", ["catch_up", "keep_up"])
def test_touched_images_are_read_in_the_background_while_requests_go_on(studio, monkeypatch, take_in):
    made = studio(["us_000_0", "us_001_0", "us_002_0"], ["us_000_0"])
    segmenter = made.segmenter()
    assert segmenter.catch_up()
    segmenter.cases.datastore.save_label("us_001_0", str(made.known["us_001_0"]["label"]), "final", {})
    os.utime(made.image("us_001_0"), ns=(0, 10**9))
    is_free = []

    def look():
        is_free.append(segmenter.lock.acquire(blocking=False))
        if is_free[-1]:
            segmenter.lock.release()

    def hashed(path):
        if Path(path) == made.image("us_001_0"):
            other = threading.Thread(target=look)
            other.start()
            other.join()
        return content_hash(path)

    monkeypatch.setattr(image_identity, "content_hash", hashed)
    assert getattr(segmenter, take_in)(**({"wait": 60} if take_in == "keep_up" else {}))
    assert "us_001_0" in segmenter.state().cases and is_free == [True]


def test_a_training_gets_every_label_but_those_that_cannot_be_used_and_is_told_which(studio, monkeypatch):
    made = studio(PICTURES, PICTURES)
    made.label("us_001_0").write_bytes(_png(np.ones((32, 32), np.uint8)))
    made.label("us_002_0").write_bytes(b"no picture")
    (made.studies / "labels.json").write_text('{"1": "disc", "2": "ellipse", "3": "ring"}')
    made.label("us_003_0").write_bytes(_png(np.full((64, 80), 7, np.uint8)))
    segmenter = made.segmenter(support_max_items="1")
    monkeypatch.setattr("lib.serving.loaded_network.load_weights", lambda *_: pytest.fail("a network is loaded"))
    cases, left_out = segmenter.usable_cases()
    assert [case["name"] for case in cases] == ["us_000_0"]
    assert [reason.partition(":")[0] for reason in left_out] == [str(made.label(f"us_00{n}_0")) for n in (1, 2, 3)]
    assert "its image's size" in left_out[0] and "value 7" in left_out[2]


def test_a_label_that_a_training_saw_first_guides_the_next_request(studio):
    made = studio(PICTURES, ["us_000_0"])
    segmenter = made.segmenter()
    segmenter.segment(made.image(QUERY))
    made.approve("us_001_0")
    for path in [made.studies, *made.studies.rglob("*")]:
        os.utime(path, (1e9, 1e9))
    assert len(segmenter.usable_cases()[0]) == 2
    assert used(segmenter.segment(made.image(QUERY))) == {"us_000_0", "us_001_0"}


def test_the_result_comes_from_the_labels(studio):
    made = studio([*PICTURES, "us_000_1", "us_001_1", "us_002_1"], PICTURES[:3])
    made.approve("us_000_1", "us_001_1", "us_002_1")
    good = dice(made.segmenter().segment(made.image(QUERY)), made.known[QUERY]["label"])
    corner = np.zeros((64, 80), np.uint8)
    corner[:8, :8] = 1
    for label in (made.studies / "labels" / "final").iterdir():
        label.write_bytes(_png(corner))
    bad = dice(made.segmenter().segment(made.image(QUERY)), made.known[QUERY]["label"])
    assert good > bad + 0.2


def test_options_reach_the_method(studio):
    made = studio(PICTURES, PICTURES[:3])
    segmenter = made.segmenter()
    everything = segmenter.segment(made.image(QUERY), Options())
    one = segmenter.segment(made.image(QUERY), Options(k=1))
    assert all(len(items) == 1 for items in one["used"].values())
    assert max(len(items) for items in everything["used"].values()) == 3
    drawn = segmenter.segment(made.image(QUERY), Options(k=1, retrieval="random"))
    assert drawn["used"] != one["used"] or not torch.equal(drawn["pred"], one["pred"])
    # What the support set teaches is learned with the items that guide.
    inferers = segmenter._serving.inferers.values()
    assert len({inferer.settings.sampler for inferer in inferers}) == 3
    assert all(inferer.signs.sampler == inferer.gate.sampler == inferer.settings.sampler for inferer in inferers)
    classes = segmenter.segment(made.image(QUERY), Options(classes=("class_1", "2")))
    assert classes["names"] == {1: "class_1", 2: "class_2"}
    assert set(classes["pred"].unique().tolist()) <= {0, 1, 2}
    same = torch.isin(everything["pred"], torch.tensor([1, 2]))
    assert torch.equal(classes["pred"], everything["pred"].where(same, 0))
    assert "uncertainty" not in everything
    unsure = segmenter.segment(made.image(QUERY), Options(uncertainty=True))["uncertainty"]
    assert unsure.shape == everything["pred"].shape and 0 <= float(unsure.min()) < float(unsure.max()) <= 1


def test_an_unknown_class_is_refused_with_those_that_are_known(studio):
    made = studio(PICTURES, ["us_000_0"])
    with pytest.raises(NotFound, match="classes: expected some of class_1.*found liver"):
        made.segmenter().segment(made.image(QUERY), Options(classes=("liver",)))


@pytest.mark.parametrize(
    "request_, options",
    [
        ({}, Options()),
        ({"k": "3", "classes": "disc, ring"}, Options(k=3, classes=("disc", "ring"))),
        ({"k": [4, 5], "retrieval": ["random", "similarity"]}, Options(k=4, retrieval="random")),
        ({"classes": ["all", "disc"]}, Options()),
        ({"three_d_memory": "false", "uncertainty": True}, Options(three_d_memory=False, uncertainty=True)),
        ({"k": "", "classes": "", "retrieval": None}, Options()),
    ],
)
def test_options_are_read_as_viewers_send_them(request_, options):
    assert Options.of_request(request_) == options


@pytest.mark.parametrize("request_", [{"k": 0}, {"k": "many"}, {"retrieval": "psychic"}, {"uncertainty": "maybe"}])
def test_ill_options_are_refused(request_):
    (key,) = request_
    with pytest.raises(RequestError, match=f"^{key}: expected"):
        Options.of_request(request_)


def test_an_unreadable_image_is_named_by_its_id(studio):
    made = studio(PICTURES, ["us_000_0"])
    made.image(QUERY).write_bytes(b"no picture")
    with pytest.raises(DataError, match=f"^{QUERY}: ") as caught:
        made.segmenter().segment(made.image(QUERY), image_id=QUERY)
    assert str(made.studies) not in str(caught.value)


def test_a_second_request_on_an_image_computes_only_what_is_new(studio, monkeypatch):
    made = studio(PICTURES, PICTURES[:2])
    # A second pass looks where the first one found something, which differs with K.
    segmenter = made.segmenter(region_below="0")
    first = segmenter.segment(made.image(QUERY), Options(k=1))
    encoded, segmented = [], []
    network, encode, segment = segmenter.network, segmenter.network.encode, segmenter.network.segment
    monkeypatch.setattr(network, "encode", lambda image: encoded.append(len(image)) or encode(image))
    monkeypatch.setattr(network, "segment", lambda *args: segmented.append(len(args[0])) or segment(*args))
    second = segmenter.segment(made.image(QUERY), Options(k=1))
    assert not encoded and not segmented and torch.equal(first["pred"], second["pred"])
    assert first.keys() == second.keys()
    assert first["used"] == second["used"] and first["confidence"] == second["confidence"]
    other = segmenter.segment(made.image(QUERY), Options(k=1, classes=("class_1",)))
    assert not segmented and other["used"].keys() == {"class_1"}
    assert torch.equal(other["pred"], first["pred"].where(first["pred"] == 1, 0))
    assert torch.equal(segmenter.segment(made.image(QUERY), Options(k=1))["pred"], first["pred"])
    more = segmenter.segment(made.image(QUERY), Options(k=2))
    assert segmented and not encoded and not torch.equal(more["pred"], first["pred"])
    shutil.copy(made.known["us_003_1"]["image"], made.image(QUERY))
    assert not torch.equal(segmenter.segment(made.image(QUERY), Options(k=1))["pred"], first["pred"])
    assert encoded


def test_a_kept_result_is_not_given_for_another_support_set_or_as_another_patient(studio):
    made = studio(PICTURES, ["us_000_0"])
    segmenter = made.segmenter()
    segmenter.segment(made.image(QUERY))
    made.approve("us_001_0")
    assert used(segmenter.segment(made.image(QUERY))) == {"us_000_0", "us_001_0"}
    made.approve(QUERY)
    assert used(segmenter.segment(made.image(QUERY))) == {"us_000_0", "us_001_0", QUERY}
    assert used(segmenter.segment(made.image(QUERY), image_id=QUERY)) == {"us_000_0", "us_001_0"}
    assert used(segmenter.segment(made.image(QUERY))) == {"us_000_0", "us_001_0", QUERY}


def test_a_kept_result_is_not_given_when_an_item_turns_out_to_be_of_the_images_own_patient(studio):
    made = studio(PICTURES, PICTURES[:3])
    segmenter = made.segmenter()
    name = "us_000_0"
    note = segmenter.cases.datastore.update_image_info
    note(name, {"PatientID": "one person"})
    assert used(segmenter.segment(made.image(name), image_id=name)) == {"us_001_0", "us_002_0"}
    note("us_001_0", {"PatientID": "one person"})
    assert used(segmenter.segment(made.image(name), image_id=name)) == {"us_002_0"}
    note("us_001_0", {"PatientID": "another one"})
    assert used(segmenter.segment(made.image(name), image_id=name)) == {"us_001_0", "us_002_0"}


@pytest.fixture
def other_weights(tmp_path, studio):
    """A weights file of the same network that segments otherwise."""

    def make(segmenter):
        state = {name: value.clone() for name, value in segmenter.network.state_dict().items()}
        torch.manual_seed(0)
        for parameter in segmenter.network.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        path = tmp_path / "other.pt"
        save_weights(segmenter.network, path)
        segmenter.network.load_state_dict(state)
        return path

    return make


def test_new_weights_serve_only_when_their_tokens_are_made(studio, monkeypatch, other_weights):
    made = studio(PICTURES, PICTURES[:2])
    weights = Weights(made.folder / "weights", made.settings().start_weights)
    segmenter = made.segmenter(weights)
    old = segmenter.segment(made.image(QUERY))
    weights.publish(other_weights(segmenter), {})
    go_on, encode = threading.Event(), LoadedNetwork.encode
    monkeypatch.setattr(LoadedNetwork, "encode", lambda loaded: go_on.wait(60) and encode(loaded))
    for _ in range(2):
        during = segmenter.segment(made.image(QUERY))
        assert during["weights"] == "embedded" and torch.equal(during["pred"], old["pred"])
    assert segmenter.status()["rebuilding"] == "1"
    # Approved while tokens are made: used at once by the old weights, and by the new ones as soon as they serve.
    made.approve("us_002_0")
    between = segmenter.segment(made.image(QUERY))
    assert between["weights"] == "embedded" and used(between) == set(PICTURES[:3])
    go_on.set()
    segmenter.wait()
    new = segmenter.segment(made.image(QUERY))
    assert new["weights"] == "1" and used(new) == set(PICTURES[:3])
    fresh = made.segmenter(weights, state_dir=str(made.folder / "fresh")).segment(made.image(QUERY))
    assert torch.equal(new["pred"], fresh["pred"]) and not torch.equal(new["pred"], between["pred"])
    assert segmenter.status()["rebuilding"] is None
    weights.roll_back()
    segmenter.refresh()
    segmenter.wait()
    back = segmenter.segment(made.image(QUERY))
    assert back["weights"] == "embedded" and torch.equal(back["pred"], between["pred"])


def test_weights_that_cannot_be_loaded_leave_the_old_ones_at_work_with_a_warning(studio):
    made = studio(PICTURES, PICTURES[:2])
    weights = Weights(made.folder / "weights", made.settings().start_weights)
    segmenter = made.segmenter(weights)
    old = segmenter.segment(made.image(QUERY))
    broken = made.folder / "broken.pt"
    broken.write_bytes(b"no weights")
    weights.publish(broken, {})
    segmenter.refresh()
    segmenter.wait()
    result = segmenter.segment(made.image(QUERY))
    assert torch.equal(result["pred"], old["pred"]) and result["weights"] == "embedded"
    assert "The weights '1' can't be put in use" in result["warnings"][0]
    weights.roll_back()
    assert segmenter.segment(made.image(QUERY))["warnings"] == []


def test_two_threads_get_what_one_would(studio):
    made = studio(PICTURES, PICTURES[:2])
    segmenter = made.segmenter()
    names = ["us_002_0", "us_003_0"]
    alone = {name: segmenter.segment(made.image(name))["pred"] for name in names}
    found: dict[str, list] = {name: [] for name in names}

    def work(name):
        for k in (1, 8, 1, 8):
            found[name].append(segmenter.segment(made.image(name), Options(k=k))["pred"])

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        assert len(found[name]) == 4 and all(torch.equal(found[name][i], alone[name]) for i in (1, 3))


def test_the_state_of_the_support_set_costs_nothing_to_ask(studio):
    made = studio(PICTURES, PICTURES[:2])
    segmenter = made.segmenter()
    assert segmenter.status()["items"] == 0, "nothing is loaded before it is needed"
    segmenter.refresh()
    assert segmenter.status()["items"] == 2 and set(segmenter.class_names().values()) == {
        "class_1",
        "class_2",
        "class_3",
    }


def test_asking_for_the_state_does_not_wait_for_a_request(studio):
    made = studio(PICTURES, PICTURES[:2])
    segmenter = made.segmenter()
    segmenter.refresh()
    made.approve("us_002_0")
    release, held = threading.Event(), threading.Event()

    def hold():
        with segmenter.lock:
            held.set()
            release.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    assert not segmenter.keep_up(wait=0)
    assert segmenter.status()["items"] == 2
    release.set()
    thread.join()
    assert segmenter.keep_up(wait=60)
    assert segmenter.status()["items"] == 3


def _png(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


class SetAfter:
    """An event that is set once it has been asked so many times."""

    def __init__(self, times: int) -> None:
        self.left = times

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_a_segmentation_stops_at_the_next_slice_when_its_client_has_gone(studio):
    made = studio(["mr_000", "mr_001"], ["mr_000"])
    segmenter = made.segmenter()
    never = SetAfter(1000)
    expected = segmenter.segment(made.image("mr_001"), gone=never)["pred"]
    asked = 1000 - never.left
    assert asked > 6
    fresh = made.segmenter()
    for times in (0, 3):
        gone = SetAfter(times)
        with pytest.raises(Stopped):
            fresh.segment(made.image("mr_001"), gone=gone)
        assert gone.left == -1
    assert torch.equal(fresh.segment(made.image("mr_001"))["pred"], expected)


def test_it_is_told_meanwhile_how_far_a_segmentation_is(studio):
    made = studio(["mr_000", "mr_001"], ["mr_000"])
    segmenter, told = made.segmenter(), []

    class Looking:
        """Asked before each step whether the client has gone."""

        def is_set(self) -> bool:
            told.append(segmenter.underway.told("mr_001"))
            return False

    segmenter.segment(made.image("mr_001"), image_id="mr_001", gone=Looking())
    totals, done = {entry["total"] for entry in told}, [entry["done"] for entry in told]
    # Each of six slices is looked at, in both directions of the volume, and in the second pass.
    assert totals == {0, 24} and done == sorted(done) and done[-1] >= 18
    assert segmenter.underway.told("mr_001") == segmenter.underway.told("mr_000") == {"done": 0, "total": 0}


def test_a_server_that_ends_stops_its_segmentations(studio):
    made = studio(PICTURES, ["us_000_0"])
    segmenter = made.segmenter()
    segmenter.ending.set()
    with pytest.raises(Stopped):
        segmenter.segment(made.image(QUERY))
