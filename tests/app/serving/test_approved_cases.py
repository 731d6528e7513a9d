"""Which labels make the support set, and how their coming and going is noticed."""

import json
import os
import shutil
import time
from pathlib import Path

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


def test_a_label_that_changes_while_its_record_is_read_is_noticed(studio, monkeypatch):
    made = studio(PICTURES, ["us_000_0"])
    cases = made.cases()
    settle(made)
    read = cases.datastore.get_label_info

    def replaced_meanwhile(*which):
        found = read(*which)
        os.utime(made.label("us_000_0"))
        return found

    monkeypatch.setattr(cases.datastore, "get_label_info", replaced_meanwhile)
    assert names(cases) == ["us_000_0"] and cases.changed(certain=False)
    monkeypatch.undo()
    assert names(cases) == ["us_000_0"] and not cases.changed(certain=False)


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
    assert [case["named"] for case in cases.cases()] == [[], [1, 3]]
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


@pytest.fixture
def seeds(tmp_path, phantom_cases):
    """A folder of labelled pairs, to which more can be copied."""

    class Seeds:
        folder = tmp_path / "seeds"

        def add(self, *names: str) -> None:
            for name in names:
                for kind in ("image", "label"):
                    target = self.folder / f"{kind}s"
                    target.mkdir(parents=True, exist_ok=True)
                    shutil.copy(phantom_cases[name][kind], target)

        def files(self, name: str) -> list:
            return list(self.folder.rglob(f"{name}.*"))

        def settle(self) -> None:
            old = time.time() - 60
            for path in [self.folder, *self.folder.rglob("*")]:
                os.utime(path, (old, old))

    made = Seeds()
    made.add("us_003_0")
    (made.folder / "labels.json").write_text(json.dumps({"1": "disc", "2": "ellipse", "3": "ring"}))
    return made


def test_seed_pairs_come_with_the_datastores_labels(studio, seeds):
    cases = studio(PICTURES, ["us_000_0"]).cases(support_dir=str(seeds.folder))
    assert names(cases) == ["us_000_0", "seeds/us_003_0"] and cases.seeds() == ["seeds/us_003_0"]
    assert cases.names([2]) == {2: "ellipse"}


def test_seed_pairs_that_come_change_and_go_are_followed(studio, seeds, phantom_cases, monkeypatch):
    made = studio(PICTURES, ["us_000_0"])
    settle(made)
    cases = made.cases(support_dir=str(seeds.folder))
    seeds.settle()
    assert cases.changed() and len(cases.cases()) == 2 and not cases.changed()
    seeds.add("us_002_0")
    assert cases.changed() and names(cases) == ["us_000_0", "seeds/us_002_0", "seeds/us_003_0"]
    assert cases.changed(), "within the clock's resolution"
    seeds.settle()
    assert len(cases.cases()) == 3 and not cases.changed()
    # Changed in place: the files are others, their list is the same and is not made again.
    with monkeypatch.context() as patch:
        patch.setattr("lib.serving.approved_cases.load_datalist", lambda *_, **__: pytest.fail("listed again"))
        (seeds.folder / "labels" / "us_002_0.png").write_bytes(Path(phantom_cases["us_001_0"]["label"]).read_bytes())
        assert cases.changed() and len(cases.cases()) == 3
    for path in seeds.files("us_003_0"):
        path.unlink()
    assert cases.changed() and names(cases) == ["us_000_0", "seeds/us_002_0"]
    (seeds.folder / "labels.json").write_text(json.dumps({"1": "circle"}))
    assert cases.changed() and cases.cases() and cases.names([1]) == {1: "circle"}


def test_a_seed_folder_that_cannot_be_listed_any_more_is_named_and_followed_again(studio, seeds):
    made = studio(PICTURES, ["us_000_0"])
    settle(made)
    seeds.settle()
    cases = made.cases(support_dir=str(seeds.folder))
    cases.cases()
    listing = {"training": [{"image": "images/us_003_0.png", "label": "labels/us_003_0.png"}]}
    (seeds.folder / "dataset.json").write_text(json.dumps(listing))
    assert cases.changed() and names(cases) == ["us_000_0", "seeds/us_003_0"] and cases.problem is None
    label = seeds.folder / "labels" / "us_003_0.png"
    content = label.read_bytes()
    label.unlink()
    assert cases.changed() and names(cases) == ["us_000_0"]
    assert "support_dir is not used" in cases.problem and "found no such file" in cases.problem
    label.write_bytes(content)
    seeds.settle()
    assert cases.changed() and names(cases) == ["us_000_0", "seeds/us_003_0"] and cases.problem is None


def test_the_pairs_of_a_datalist_file_are_followed(studio, seeds):
    seeds.add("us_002_0")
    entries = [{"image": f"images/{name}.png", "label": f"labels/{name}.png"} for name in ("us_002_0", "us_003_0")]
    listing = seeds.folder / "pairs.json"
    listing.write_text(json.dumps({"training": entries[:1]}))
    seeds.settle()
    made = studio(PICTURES)
    settle(made)
    cases = made.cases(support_dir=str(listing))
    assert names(cases) == ["pairs.json/us_002_0"] and not cases.changed()
    listing.write_text(json.dumps({"training": entries}))
    assert cases.changed() and names(cases) == ["pairs.json/us_002_0", "pairs.json/us_003_0"]
