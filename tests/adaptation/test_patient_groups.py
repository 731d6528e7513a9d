"""Which support images are put into one group."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sam2sgp.adaptation.patient_groups import case_similarity, consecutive, find_patient_groups

SIDE = 128


def texture(generator: torch.Generator, grain: int, *shape: int) -> Tensor:
    """Smooth noise (*shape, SIDE, SIDE) of a grain in pixels."""
    coarse = torch.randn(1, *shape, SIDE // grain, SIDE // grain, generator=generator)
    return F.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear")[0]


def patient(seed: int, slices: int) -> list[Tensor]:
    """Slices (1, 1, SIDE, SIDE) of a body in a dark frame: anatomy that all patients share, detail that is his own and
    changes from slice to slice by a fifth, a bright object, and noise."""
    own = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    body = (((rows - 64) / 50.0) ** 2 + ((columns - 64) / 58.0) ** 2 < 1).float()
    anatomy = texture(torch.Generator().manual_seed(99), 32, 1)[0]
    detail, found = texture(own, 4, 1)[0], []
    for _ in range(slices):
        detail = 0.9 * detail + 0.44 * texture(own, 4, 1)[0]
        image = 0.5 + 0.12 * anatomy + 0.08 * detail + 0.02 * torch.randn(SIDE, SIDE, generator=own)
        y, x = (torch.rand(2, generator=own) * 40 + 40).tolist()
        image[(rows - y) ** 2 + (columns - x) ** 2 < 64] += 0.2
        found.append((image.clamp(0.1, 1) * body)[None, None])
    return found


def named(names: list[str], patients: list[str] | None = None) -> list[dict]:
    return [{"name": n, "patient": p} for n, p in zip(names, patients or names, strict=True)]


def test_slices_of_one_volume_under_names_that_say_nothing_are_one_group():
    images = [slice for seed in range(4) for slice in patient(seed, 4)]
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()
    groups = find_patient_groups(named([f"{number:x}q" for number in range(100, 116)]), [images[i] for i in order])
    truth = [number // 4 for number in order]
    assert groups.by == "look" and len(groups) == 4
    assert len(set(zip(truth, groups.owner, strict=True))) == 4
    assert "4 groups" in str(groups) and "names do not tell" in str(groups)


def test_images_of_different_patients_that_share_anatomy_and_frame_are_not_put_together():
    images = [patient(seed, 1)[0] for seed in range(16)]
    assert len(find_patient_groups(named([f"{number:x}q" for number in range(100, 116)]), images)) == 16
    # Neither are they where their names follow each other.
    assert len(find_patient_groups(named([f"scan{number}" for number in range(16)]), images)) == 16


def test_copies_are_one_group():
    images = [patient(seed, 1)[0] for seed in range(6)]
    copy = (0.9 * images[2] + 0.02 * torch.randn(images[2].shape)).clamp(0, 1)
    groups = find_patient_groups(named(list("abcdefg")), [*images, copy])
    assert len(groups) == 6 and groups.owner[2] == groups.owner[6]


def test_names_that_tell_the_patients_are_believed():
    images = [patient(0, 1)[0]] * 4
    groups = find_patient_groups(named(list("abcd"), ["p1", "p1", "p2", "p3"]), images)
    assert groups.by == "patients" and groups.owner == ("p1", "p1", "p2", "p3")
    images = [patient(seed, 1)[0] for seed in range(4)]
    assert len(find_patient_groups(named([f"patient1_{number}" for number in range(4)], ["patient1"] * 4), images)) == 1


@pytest.mark.parametrize("count", [4, 8])
def test_one_name_for_all_tells_nothing(count):
    images = [patient(seed, 1)[0] for seed in range(count)]
    groups = find_patient_groups(named(list("abcdefgh")[:count], ["unknown"] * count), images)
    assert groups.by == "look" and len(groups) == count


def test_volumes_are_grouped_whole():
    volumes = [torch.cat(patient(seed, 3)) for seed in (0, 1, 2, 3)]
    again = torch.cat([volumes[1][2:], patient(9, 1)[0]])
    groups = find_patient_groups(named(list("abcde")), [*volumes, again])
    assert len(groups) == 4 and groups.owner[1] == groups.owner[4]


def test_volumes_of_different_patients_stay_apart():
    # Of many pairs of slices some are similar by chance.
    volumes = [torch.cat([patient(100 * seed + number, 1)[0] for number in range(12)]) for seed in range(6)]
    assert len(find_patient_groups(named(list("abcdef")), volumes)) == 6


def test_a_few_volumes_of_which_some_are_more_alike_than_others_are_of_different_patients():
    """As hippocampi, cut out and laid on each other: of four volumes the pairs don't tell what is usual."""
    shared = texture(torch.Generator().manual_seed(99), 4, 1)[0]
    own = [texture(torch.Generator().manual_seed(seed), 4, 3)[:, None] for seed in range(4)]
    volumes = [0.5 + 0.1 * volume + 0.08 * shared * (number < 3) for number, volume in enumerate(own)]
    similar = case_similarity(volumes)
    assert 0.3 < similar[0, 1] < 0.6 and similar[0, 3] < 0.2
    assert len(find_patient_groups(named(list("abcd")), volumes)) == 4
    # Single images that stand out as much are put together.
    assert len(find_patient_groups(named(list("abcd")), [volume[:1] for volume in volumes])) < 4


def test_names_follow_each_other_by_their_last_number():
    assert consecutive(["a_001_9", "a_001_10", "a_002_11", "b"]) == [(0, 1)]
