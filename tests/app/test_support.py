"""Which labels make the support set, and how their coming and going is noticed."""

import json
import os
import shutil
import time

import pytest
from PIL import Image

PICTURES = ["us_000_0", "us_001_0", "us_002_0"]


def names(cases) -> list[str]:
    return [case["name"] for case in cases.cases()]


def settle(studio) -> None:
    """Make all times of the folder so old that a change would show."""
    old = time.time() - 60
    for path in [studio.studies, *studio.studies.rglob("*")]:
        os.utime(path, (old, old))


def test_only_final_labels_are_cases(studio):
    made = studio(PICTURES, ["us_000_0"])
    made.approve("us_001_0", tag="original")
    cases = made.cases()
    (case,) = cases.cases()
    assert case["name"] == "us_000_0"
    assert (case["image"], case["label"]) == (str(made.image("us_000_0")), str(made.label("us_000_0")))


def test_labels_that_come_go_and_change_their_tag_are_noticed(studio):
    made = studio(PICTURES, ["us_000_0"])
    cases = made.cases()
    assert cases.changed() and names(cases) == ["us_000_0"]
    made.approve("us_001_0")
    assert cases.changed() and names(cases) == ["us_000_0", "us_001_0"]
    (made.studies / "labels" / "review").mkdir()
    shutil.move(made.label("us_000_0"), made.studies / "labels" / "review")
    assert cases.changed() and names(cases) == ["us_001_0"]
    made.label("us_001_0").unlink()
    assert cases.changed() and names(cases) == []


def test_a_label_edited_in_place_is_noticed_and_nothing_else_is(studio):
    made = studio(PICTURES, ["us_000_0", "us_001_0"])
    cases = made.cases()
    settle(made)
    cases.cases()
    assert not cases.changed()
    made.approve("us_002_0", tag="original")
    assert not cases.changed(), "a label of another tag"
    with open(made.label("us_000_0"), "r+b") as file:
        file.write(file.read())
    assert cases.changed()


def test_what_changed_within_the_clocks_resolution_is_looked_at_again(studio):
    cases = studio(PICTURES, ["us_000_0"]).cases()
    cases.cases()
    assert cases.changed()


def test_a_label_of_another_kind_under_the_same_id_takes_its_place(studio):
    made = studio(PICTURES, ["us_000_0"])
    cases = made.cases()
    settle(made)
    cases.cases()
    with Image.open(made.label("us_000_0")) as label:
        label.save(made.label("us_000_0").with_suffix(".tif"))
    assert cases.changed()
    assert cases.cases()[0]["label"].endswith(".tif")


def test_names_come_from_declarations_then_from_labels_then_from_values(studio, phantom_cases):
    made = studio(PICTURES, ["us_000_0"])
    cases = made.cases()
    info = {"label_info": [{"name": "disc", "idx": 1}, {"name": "ring", "idx": 3}, "ill", {"idx": "2", "name": "no"}]}
    cases.datastore.save_label("us_001_0", phantom_cases["us_001_0"]["label"], "final", info)
    cases.cases()
    assert cases.names([1, 2, 3]) == {1: "disc", 2: "class_2", 3: "ring"}
    assert cases.declared() == {}
    (made.studies / "labels.json").write_text(json.dumps({"1": "circle", "2": "ring"}))
    cases.cases()
    assert cases.names([1, 2, 3]) == {1: "circle", 2: "ring", 3: "ring (3)"}
    assert cases.declared() == {1: "circle", 2: "ring", 3: "ring"}


@pytest.mark.parametrize(
    "image_id, info, patient",
    [
        ("us_001_3", {}, "us_001"),
        ("other", {}, "other"),
        ("us_001_3", {"PatientID": "P7"}, "P7"),
        ("us_001_3", {"PatientID": "UNK"}, "us_001"),
    ],
)
def test_an_images_patient_is_its_tags_or_what_its_id_says(studio, image_id, info, patient):
    cases = studio(PICTURES).cases(patient_pattern=r"^us_\d+")
    assert cases.patient_of(image_id, info) == patient


def test_seed_pairs_come_with_the_datastores_labels(studio, tmp_path, phantom_cases):
    seeds = tmp_path / "seeds"
    for kind in ("image", "label"):
        (seeds / f"{kind}s").mkdir(parents=True)
        shutil.copy(phantom_cases["us_003_0"][kind], seeds / f"{kind}s")
    (seeds / "labels.json").write_text(json.dumps({"1": "disc", "2": "ellipse", "3": "ring"}))
    cases = studio(PICTURES, ["us_000_0"]).cases(support_dir=str(seeds))
    assert names(cases) == ["us_000_0", "seeds/us_003_0"]
    assert cases.names([2]) == {2: "ellipse"}
