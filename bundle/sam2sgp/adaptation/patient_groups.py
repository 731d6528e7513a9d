"""Which support images show the same patient.

In: cases of a support set. Out: a patient group for each case; cases of one stay on one side of every split, because
an image teaches the answer for its neighbour, and what is judged on neighbours looks better than it is.

Where names tell the patients, a patient group is a patient. Where they don't, cases are grouped by look. Slices of one
volume, frames of one video and copies share fine detail at the same place (edges of the chest wall, grain of the
tissue); images of different patients share anatomy, but not that. So the measure is the correlation of the images'
detail, what is left after their local mean is taken away; it does not depend on a network.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from sam2sgp.data.io import image_stem

# Side in pixels at which images are compared, and side of the square of a local mean.
SIDE = 64
WINDOW = 9
# Outside of this range of an image's intensities is its frame or background: its border is the same in all images.
DARK, BRIGHT = 0.08, 0.97
# Share of the pixels that two images must have in common for their frames to be left out.
MIN_COMMON = 0.2
# How far a pair must stand out from the others, in their standard deviations, to be neighbours, and consecutive names
# with it. A pair below `LEAST` never is; above `MOST` two images are one, whatever the others are like.
DEVIATIONS = 4.0
DEVIATIONS_CONSECUTIVE = 3.0
LEAST, MOST = 0.15, 0.8
# Below this, volumes are of different patients: those of one scan or two phases of one have above 0.9, those of
# different patients, of which the two most similar slices count, up to 0.6, and a few don't tell what is usual.
LEAST_OF_VOLUMES = 0.65


@dataclass(frozen=True)
class PatientGroups:
    """The patient groups of a support set: of one patient each, or of images that look like one patient's.

    owner: per case, the name of its patient group. by: "patients", told by the names, or "look".
    """

    owner: tuple[str, ...]
    by: str

    def __len__(self) -> int:
        return len(set(self.owner))

    def __str__(self) -> str:
        """For a log: how many groups were found, and how."""
        if self.by == "patients":
            return f"{len(self)} patients, told apart by name"
        return f"{len(self)} groups of images that look like one patient's (names do not tell the patients apart)"


def names_tell_patients(cases: Sequence[dict]) -> bool:
    """Whether patients are known: some cases share one; if all do, it is one that their names begin with."""
    patients = {case["patient"] for case in cases}
    if len(patients) == 1:
        return all(case["name"].startswith(case["patient"]) for case in cases)
    return len(patients) < len(cases)


def find_patient_groups(cases: Sequence[dict], images: Sequence[Tensor]) -> PatientGroups:
    """Group the cases of a support set.

    Args:
        cases: dicts with `name` and `patient`.
        images: of each case the slices (Z, C, H, W) that are in the support set.
    """
    if len(cases) == 1 or names_tell_patients(cases):
        return PatientGroups(tuple(case["patient"] for case in cases), "patients")
    similarity = case_similarity(images)
    others = similarity[~torch.eye(len(cases), dtype=torch.bool)]
    usual = others.median()
    # Below the median no pair of neighbours stretches the deviation.
    deviation = usual - others.quantile(0.16)
    factor = torch.full_like(similarity, DEVIATIONS)
    for first, second in consecutive([case["name"] for case in cases]):
        factor[first, second] = factor[second, first] = DEVIATIONS_CONSECUTIVE
    is_volume = torch.tensor([len(slices) > 1 for slices in images])
    least = torch.where(is_volume & is_volume[:, None], LEAST_OF_VOLUMES, LEAST)
    linked = similarity > (usual + factor * deviation).clamp(min=least).clamp(max=MOST)
    _, labels = connected_components(linked.numpy(), directed=False)
    return PatientGroups(tuple(f"group {label + 1}" for label in labels), "look")


def consecutive(names: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of numbers of names that differ by one in their last number and in nothing else.

    Example:
        >>> consecutive(["scan_9", "scan_10", "other_11"])
        [(0, 1)]
    """
    places = {}
    for place, name in enumerate(names):
        if match := re.fullmatch(r"(.*?)(\d+)(\D*)", image_stem(name)):
            places[match[1], int(match[2]), match[3]] = place
    following = ((place, places.get((head, number + 1, tail))) for (head, number, tail), place in places.items())
    return [(place, after) for place, after in following if after is not None]


def case_similarity(images: Sequence[Tensor]) -> Tensor:
    """Similarity (N, N) of cases of slices (Z, C, H, W): that of their two most similar slices."""
    counts = [len(slices) for slices in images]
    rows = detail_similarity(torch.cat([_reduced(slices) for slices in images])).split(counts)
    return torch.stack([torch.stack([part.max() for part in row.split(counts, 1)]) for row in rows])


def detail_similarity(images: Tensor) -> Tensor:
    """Correlation (N, N) of the fine detail of images (N, 1, h, w), without frames and backgrounds."""
    low, high = (images.flatten(1).quantile(share, 1)[:, None, None, None] for share in (0.01, 0.99))
    level = (_local_mean(images, 3) - low) / (high - low).clamp(min=torch.finfo(images.dtype).eps)
    detail = images - _local_mean(images, WINDOW)
    detail = detail / (
        _local_mean(detail**2, WINDOW).sqrt() + 0.5 * detail.flatten(1).std(1)[:, None, None, None] + 1e-6
    )
    frame = _opened(((level < DARK) | (level > BRIGHT)).float(), 7)
    inside = 1 - _dilated(frame, 2 * WINDOW // 2 * 2 + 1)
    masked = _correlation(detail.flatten(1), inside.flatten(1))
    common = inside.flatten(1) @ inside.flatten(1).T / inside[0].numel()
    whole = _correlation(detail.flatten(1), torch.ones_like(inside.flatten(1)))
    return torch.where(common >= MIN_COMMON, masked, whole)


def _reduced(slices: Tensor) -> Tensor:
    """(Z, C, H, W) -> (Z, 1, SIDE, SIDE)."""
    return F.interpolate(slices.float().mean(1, keepdim=True), size=(SIDE, SIDE), mode="bilinear", antialias=True)


def _correlation(values: Tensor, weights: Tensor) -> Tensor:
    """Correlation of rows (N, P) over the pixels that both of a pair weigh."""
    weighted = values * weights
    energy = (weighted * values) @ weights.T
    return weighted @ weighted.T / (energy * energy.T).sqrt().clamp(min=torch.finfo(values.dtype).tiny)


def _local_mean(values: Tensor, side: int) -> Tensor:
    return F.avg_pool2d(F.pad(values, (side // 2,) * 4, mode="replicate"), side, stride=1)


def _dilated(mask: Tensor, side: int) -> Tensor:
    return F.max_pool2d(mask, side, stride=1, padding=side // 2)


def _opened(mask: Tensor, side: int) -> Tensor:
    """Without parts smaller than a square of this side."""
    return _dilated(1 - _dilated(1 - mask, side), side)
