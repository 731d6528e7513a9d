"""Training episodes."""

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import Compose, RandFlipd, RandGaussianNoised
from PIL import Image
from torch.utils.data import BatchSampler

from sam2sgp import distributed
from sam2sgp.data import load_datalist
from sam2sgp.episodes import Augmentation, EpisodeDataset, EpisodeSampler, EpisodeSettings
from sam2sgp.errors import DataError
from sam2sgp.transforms import FitToSquared, LoadCased, ScaleIntensityByModalityd

SIZE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten wide pictures: class 1 on the left of each, class 2 on the right of the even ones."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (root / name).mkdir()
    for number in range(10):
        label = np.zeros((40, 80), dtype=np.uint8)
        label[10:30, 10:30] = 1
        if number % 2 == 0:
            label[10:30, 50:70] = 2
        Image.fromarray(rng.integers(0, 255, (40, 80), dtype=np.uint8)).save(root / "images" / f"{number}.png")
        Image.fromarray(label).save(root / "labels" / f"{number}.png")
    return root


def episodes(folder, tmp_path, augmentation: Augmentation | None = None, seed=0, **settings) -> EpisodeDataset:
    transform = Compose([LoadCased(), ScaleIntensityByModalityd(), FitToSquared(size=SIZE)])
    defaults = {"group_size": 4, "invert_probability": 0.0, "union_probability": 0.0, "clip_probability": 0.0}
    drawn = EpisodeSettings(**defaults | settings)
    data, changes, cache = load_datalist(folder), augmentation or Augmentation(), str(tmp_path / "cache")
    return EpisodeDataset(data, transform, cache, 20, drawn, changes, seed=seed, progress=False)


def test_an_episode_holds_one_target_in_images_of_several_patients(folder, tmp_path):
    dataset = episodes(folder, tmp_path, empty_fraction=0.0)
    left = right = 0
    for index in range(20):
        episode = dataset[index]
        assert episode["image"].shape == (4, 3, SIZE, SIZE) and episode["label"].shape == (4, 1, SIZE, SIZE)
        assert 0 <= episode["image"].min() and episode["image"].max() <= 1
        assert len(set(episode["patient"].tolist())) == 4
        on_left = episode["label"][..., : SIZE // 2].flatten(1).amax(1)
        on_right = episode["label"][..., SIZE // 2 :].flatten(1).amax(1)
        assert (on_left + on_right == 1).all() and len(on_left.unique()) == 1, "one class, the same in all images"
        left += on_left[0].item()
        right += on_right[0].item()
    assert left > 4 and right > 4


def test_episodes_depend_on_seed_and_number_alone(folder, tmp_path):
    changes = Compose([RandFlipd(["image", "label"], prob=0.5), RandGaussianNoised("image", prob=0.5)])
    augmentation = Augmentation(image=changes)
    first = episodes(folder, tmp_path, augmentation=augmentation, seed=3)
    second = episodes(folder, tmp_path, augmentation=augmentation, seed=3)
    expected = [first[i] for i in (7, 2)]
    for i, episode in zip((2, 7), reversed(expected), strict=True):
        for key, value in second[i].items():
            assert torch.equal(value, episode[key]), key
    other = episodes(folder, tmp_path, augmentation=augmentation, seed=4)
    assert not torch.equal(other[7]["image"], expected[0]["image"])


def test_task_augmentation_is_the_same_for_all_images_of_an_episode(folder, tmp_path):
    flip = Compose([RandFlipd(["image", "label"], prob=0.5, spatial_axis=1)])
    together = episodes(folder, tmp_path, augmentation=Augmentation(task=flip), empty_fraction=0.0)
    apart = episodes(folder, tmp_path, augmentation=Augmentation(image=flip), empty_fraction=0.0)

    def sides(dataset):
        labels = [dataset[i]["label"][..., : SIZE // 2].flatten(1).amax(1) for i in range(20)]
        return {len(side.unique()) for side in labels}

    assert sides(together) == {1}
    assert 2 in sides(apart)


def test_inverted_targets_leave_the_padding_out(folder, tmp_path):
    plain = episodes(folder, tmp_path, empty_fraction=0.0)[5]["label"]
    inverted = episodes(folder, tmp_path, empty_fraction=0.0, invert_probability=1.0)[5]["label"]
    inside = slice(SIZE // 4, 3 * SIZE // 4)
    assert torch.equal(inverted[:, :, inside], 1 - plain[:, :, inside])
    assert inverted[:, :, : SIZE // 4].sum() == 0


def test_unions_join_two_classes(folder, tmp_path):
    dataset = episodes(folder, tmp_path, empty_fraction=0.0, union_probability=1.0)
    both = [
        label
        for i in range(10)
        for label in dataset[i]["label"]
        if label[..., : SIZE // 2].any() and label[..., SIZE // 2 :].any()
    ]
    assert both


def test_slices_without_the_target_are_mixed_in_as_often_as_asked(tmp_path):
    """Volumes of two slices, the target on the first only."""
    root = tmp_path / "volumes"
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True)
    for number in range(6):
        label = np.zeros((20, 20, 2), dtype=np.uint8)
        label[5:15, 5:15, 0] = 1
        for name, array in (("images", np.random.default_rng(number).random((20, 20, 2))), ("labels", label)):
            affine = np.diag([1.0, 1.0, 5.0, 1.0])
            nib.save(nib.Nifti1Image(array.astype(np.float32), affine), root / name / f"{number}.nii.gz")

    def empty(fraction):
        dataset = episodes(root, tmp_path, empty_fraction=fraction, group_size=6)
        holds = torch.stack([dataset[i]["label"].flatten(1).amax(1) for i in range(40)])
        assert holds[:, :2].all(), "the first two always hold the target"
        return float((holds[:, 2:] == 0).float().mean())

    assert empty(0.0) == 0
    assert empty(0.5) == pytest.approx(0.5, abs=0.12)


def test_one_patient_is_not_enough(folder, tmp_path):
    transform = Compose([LoadCased(), ScaleIntensityByModalityd(), FitToSquared(size=SIZE)])
    data = [{**case, "patient": "same"} for case in load_datalist(folder)]
    with pytest.raises(DataError, match="two patients"):
        EpisodeDataset(data, transform, str(tmp_path / "cache"), 1, EpisodeSettings(clip_probability=0), progress=False)


def test_every_epoch_has_episodes_of_its_own_whoever_asks(folder, tmp_path):
    dataset = episodes(folder, tmp_path)
    sampler = EpisodeSampler(dataset)
    first = list(sampler)
    sampler.set_epoch(2)
    assert first == list(range(20)) and list(sampler) == list(range(40, 60))
    resumed = EpisodeSampler(dataset)
    resumed.set_epoch(2)
    assert list(resumed) == list(range(40, 60))


@pytest.mark.parametrize("count, last", [(20, [[16, 17], [18, 19]]), (15, [[12, 13], [14]]), (17, [[16], [16]])])
def test_processes_share_the_episodes_of_a_step_as_one_would_accumulate_them(monkeypatch, count, last):
    steps = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        sampler = EpisodeSampler(range(count), batch_size=2)
        steps.append(list(BatchSampler(sampler, 2, drop_last=False)))
        assert len(list(sampler)) == len(sampler)
        # An episode of another process counts for nothing here.
        assert [bool(sampler.own(step)) for step in range(sampler.steps)][-1] == (rank == 0 or count != 17)
    assert len(steps[0]) == len(steps[1]) and [steps[0][-1], steps[1][-1]] == last
    assert [number for pair in zip(*steps, strict=True) for batch in pair for number in batch][:count] == list(
        range(count)
    )


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """Three volumes of nine slices and one of two; voxels hold their slice's number, class 1 is on slices 3 to 6."""
    root = tmp_path_factory.mktemp("volumes")
    for name in ("images", "labels"):
        (root / name).mkdir()
    for number, count in enumerate((9, 9, 9, 2)):
        image = np.zeros((SIZE, SIZE, count), dtype=np.float32)
        image[:] = np.arange(count) / 10
        image[0, 0, 0] = 1
        label = np.zeros(image.shape, dtype=np.uint8)
        label[8:24, 8:24, 3 if count > 3 else 0 : 7] = 1
        for name, array in (("images", image), ("labels", label)):
            nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.0, 5.0, 1.0])), root / name / f"case{number}.nii.gz")
    return root


def test_an_episode_of_clips_holds_runs_of_neighbouring_slices_of_two_patients(volumes, tmp_path):
    noise = RandGaussianNoised("image", prob=1.0, std=0.02)
    settings = {"group_size": 7, "empty_fraction": 0.0, "clip_probability": 1.0, "clip_length": 3, "clip_stride": 2}
    dataset = episodes(volumes, tmp_path, augmentation=Augmentation(image=Compose([noise])), **settings)
    plain = episodes(volumes, tmp_path, **settings)
    for number in range(12):
        episode, unchanged = dataset[number], plain[number]
        frames, distance = episode["frame_index"], episode["frame_distance"]
        assert frames.shape == distance.shape == (7, 2)
        assert frames[6].tolist() == [-1, -1], "the image that is left over is no clip"
        place = (unchanged["image"].flatten(1).median(1).values * 8).round().long()
        for first in (0, 3):
            clip = list(range(first, first + 3))
            assert {*place[clip].diff().tolist()} in ({2}, {-2}), "neighbours, two slices apart"
            assert len({*episode["patient"][clip].tolist()}) == 1
            for image in clip:
                assert frames[image].tolist() == [other for other in clip if other != image]
                assert torch.equal(distance[image], (place[frames[image]] - place[image]).abs())
            change = (episode["image"] - unchanged["image"])[clip, :, 16:]
            inside = [i for i in range(3) if 0.1 < unchanged["image"][clip[i]].median() < 0.9]
            assert change[inside].abs().max() > 1e-4
            assert torch.allclose(change[inside], change[inside[:1]].expand(len(inside), -1, -1, -1), atol=1e-6)
        assert episode["patient"][0] != episode["patient"][3]


def test_pictures_are_never_in_clips(folder, tmp_path):
    episode = episodes(folder, tmp_path, group_size=6, clip_probability=1.0)[0]
    assert (episode["frame_index"] == -1).all() and len(set(episode["patient"].tolist())) > 3
