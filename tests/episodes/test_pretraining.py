"""Collections of data sets, and the episodes of pre-training."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.transforms import Compose
from PIL import Image

from sam2sgp.episodes import EpisodeSettings, PretrainingDataset, TaskShares, load_collection
from sam2sgp.errors import DataError
from sam2sgp.support.items import AS_GIVEN
from sam2sgp.transforms import FitToSquared, LoadCased, ScaleIntensityByModalityd

SIZE = 32
# Four images that hold the target, as it is labelled.
PLAIN = EpisodeSettings(
    group_size=4, empty_fraction=0.0, invert_probability=0.0, union_probability=0.0, clip_probability=0.0
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Sets a (20 pictures) and b (12, of which some are of patients of c), held-out c, and d of three pictures."""
    root = tmp_path_factory.mktemp("collection")
    rng = np.random.default_rng(0)
    for name, count in (("a", 20), ("b", 12), ("c", 6), ("d", 3)):
        for folder in ("images", "masks"):
            (root / name / folder).mkdir(parents=True)
        for number in range(count):
            shared = name in "bc" and number < 6
            stem = f"patient{number:03d}" if shared else f"{name}{number}"
            image = rng.integers(20, 90, (64, 64)).astype(np.uint8)
            mask = np.zeros((64, 64), np.uint8)
            y, x = rng.integers(10, 40, 2)
            mask[y : y + 14, x : x + 10] = 255
            image[mask > 0] += 120
            Image.fromarray(image).save(root / name / "images" / f"{stem}.png")
            Image.fromarray(mask).save(root / name / "masks" / f"{stem}.png")
    return root


def dataset(root, tmp_path, section="train", **arguments) -> PretrainingDataset:
    transform = Compose([LoadCased(), ScaleIntensityByModalityd(), FitToSquared(size=2 * SIZE)])
    data = load_collection(root, section, held_out=["c"], related=[["b", "c"]])
    common = {"cache_dir": str(tmp_path), "episodes": 20, "settings": PLAIN, "progress": False}
    return PretrainingDataset(SIZE, data=data, transform=transform, **common | arguments)


def test_no_patient_is_on_two_sides(root):
    sections = {
        name: load_collection(root, name, held_out=["c"], related=[["b", "c"]])
        for name in ("train", "val", "test", "held_out")
    }
    patients = {name: {case["patient"] for case in cases} for name, cases in sections.items()}
    assert len(patients["held_out"]) == 6
    for first in patients:
        for second in patients:
            if first != second:
                assert not patients[first] & patients[second]
    assert {case["group"] for case in sections["train"]} == {"a", "b", "d"}
    assert sum(case["group"] == "d" for case in sections["train"]) == 3, "too few to be split"
    assert len(patients["test"] | patients["train"] | patients["val"]) == 20 + 6 + 3


def test_equal_names_in_sets_that_are_not_related_are_different_persons(root):
    apart, related = (load_collection(root, "train", ["c"], links) for links in ([], [["b", "c"]]))
    names = [{case["patient"] for case in cases if case["group"] == "b"} for cases in (apart, related)]
    assert {name[:7] for name in names[0] - names[1]} == {"patient"}


def test_unknown_held_out_set_is_refused(root):
    with pytest.raises(DataError, match="'?nothing"):
        load_collection(root, "train", held_out=["nothing"])
    with pytest.raises(DataError, match="dataset_dir"):
        load_collection(root / "absent", "train")


def test_balanced_episodes_go_through_the_groups(root, tmp_path):
    data = dataset(root, tmp_path, "held_out", balanced=True, episodes=3)
    assert data.groups == ["c"] and len(data) == 3
    assert int(data[1]["group"]) == 0
    train = dataset(root, tmp_path, balanced=True, episodes=2, fewest_patients=2)
    assert [int(train[i]["group"]) for i in range(len(train))] == [0, 1, 2, 0, 1, 2]


def test_a_group_of_fewer_patients_than_asked_for_is_not_taken_by_patients(root, tmp_path):
    assert dataset(root, tmp_path, "held_out", fewest_patients=6).groups == ["c"]
    with pytest.raises(DataError, match="at least two patients"):
        dataset(root, tmp_path, "held_out", fewest_patients=7)


def test_a_region_makes_objects_larger(root, tmp_path):
    areas = []
    for probability in (0.0, 1.0):
        data = dataset(root, tmp_path, shares=TaskShares(region_probability=probability))
        areas.append(np.mean([data[i]["label"].mean() for i in range(10)]))
    assert areas[1] > 2 * areas[0]


def test_a_region_shows_the_object_sharply(root, tmp_path):
    """The mean intensity inside the mask stays the object's: image and mask are cut alike."""
    data = dataset(root, tmp_path, shares=TaskShares(region_probability=0.5, crop_probability=0.5))
    for i in range(10):
        episode = data[i]
        inside = episode["image"][:, :1][episode["label"] > 0]
        outside = episode["image"][:, :1][episode["label"] == 0]
        assert inside.mean() > outside.mean() + 0.3


@pytest.mark.parametrize("kind", ["synthetic", "superpixel", "threshold", "label_operation"])
def test_each_kind_of_task_changes_the_episodes(root, tmp_path, kind):
    plain, changed = (dataset(root, tmp_path, shares=TaskShares(**{f"{kind}_probability": p})) for p in (0.0, 1.0))
    assert any(not torch.equal(plain[i]["label"], changed[i]["label"]) for i in range(4))
    for i in range(4):
        episode = changed[i]
        assert episode["image"].shape == (4, 3, SIZE, SIZE) and episode["label"].shape == (4, 1, SIZE, SIZE)
        assert set(episode["label"].unique().tolist()) <= {0.0, 1.0} and episode["label"].any()
        assert 0 <= episode["image"].min() and episode["image"].max() <= 1


def test_superpixel_episodes_show_any_image_of_a_set_with_or_without_the_target(tmp_path):
    stack = torch.rand(6, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    label = torch.zeros(6, SIZE, SIZE, dtype=torch.long)
    label[0, 8:20, 8:20] = 1  # one slice in six holds the target
    whole = [torch.nn.functional.avg_pool2d(s[None], 9, 1, 4)[0] for s in stack]

    def prepare(case: dict) -> dict:
        made = {"image": torch.stack(whole), "label": label, "geometry": SimpleNamespace(spacing=None, slice_axis=2)}
        made["scaling"] = AS_GIVEN
        return FitToSquared(size=SIZE)(made)

    data = []
    for name in ("p1", "p2"):
        (tmp_path / name).write_text(name)
        data.append({"name": name, "patient": name, "group": "a", "image": tmp_path / name, "label": tmp_path / name})
    made = PretrainingDataset(
        SIZE,
        TaskShares(superpixel_probability=1.0),
        fewest_patients=2,
        data=data,
        transform=prepare,
        cache_dir=str(tmp_path / "c"),
        episodes=96,
        settings=EpisodeSettings(group_size=2, empty_fraction=0.0, clip_probability=0.0),
        progress=False,
    )
    shown = set()
    for index in range(40):
        image = made[index]["image"][0, :1]
        shown |= {n for n, own in enumerate(whole) if torch.allclose(image, own.half().float(), atol=1e-3)}
    assert len(shown) >= 4
