"""Episodes over many data sets, for in-context pre-training.

In: a folder of data folders. Out: a datalist over all of them in which no patient is on two sides, and episodes of
real and synthetic tasks, on whole images and on regions of interest.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import binary_dilation, binary_erosion, binary_fill_holes
from scipy.ndimage import label as components
from torch import Tensor

from sam2sgp.data.folders import DEFAULT_PATIENT_PATTERN, load_datalist
from sam2sgp.episodes.dataset import EpisodeDataset
from sam2sgp.episodes.settings import TaskShares
from sam2sgp.episodes.synthetic import noise_task, superpixel_task, threshold_task
from sam2sgp.errors import DataError

FEWEST_TO_SPLIT = 4
FEWEST_PATIENTS = 5
SLICES_OF_A_BLOCK = 3
MANY_CLASSES = 6
MIN_WINDOW = 0.2


def load_collection(
    root: str,
    section: str,
    held_out: Sequence[str] = (),
    related: Sequence[Sequence[str]] = (),
    patient_pattern: str = DEFAULT_PATIENT_PATTERN,
    split: Sequence[float] = (0.6, 0.1, 0.3),
    seed: int = 0,
) -> list[dict]:
    """Labelled cases of all data folders in a folder; `group` is `<folder>`, or `<folder>/<group>` where one is given.

    Args:
        root: folder whose subfolders are data folders.
        section: "train", "val", "test": of the sets that are not held out. "held_out": all cases of those that are.
        held_out: names of subfolders.
        related: groups of sets whose patients are the same persons where their names are equal, such as CT and PET of
            one study.
        patient_pattern, split, seed: as for `load_datalist`.

    Among related sets, a patient of a held-out one, or of the "val" or "test" section of any, is in no "train" section,
    nor a "test" patient in "val". A set of fewer than four cases is all "train".

    Raises:
        DataError: there is no data folder, or a held-out name is none.
    """
    folders = {path.name: path for path in sorted(Path(root).iterdir()) if path.is_dir()} if Path(root).is_dir() else {}
    if not folders or set(held_out) - set(folders):
        wanted = f"data folders, among them {', '.join(held_out)}" if held_out else "data folders"
        raise DataError(f"{root}: expected {wanted}, found {', '.join(folders) or 'none'}; correct `dataset_dir`.")
    options: dict[str, Any] = {"patient_pattern": patient_pattern, "split": split, "seed": seed}
    sections: dict[str, list[dict]] = defaultdict(list)
    for name, path in folders.items():
        split_into = {"train": "all"}
        if name in held_out:
            split_into = {"held_out": "all"}
        elif len(load_datalist(path, **options)) >= FEWEST_TO_SPLIT:
            split_into = {own: own for own in ("train", "val", "test")}
        for own, of_folder in split_into.items():
            for case in load_datalist(path, of_folder, **options):
                group = name if case["group"] == name else f"{name}/{case['group']}"
                sections[own].append({**case, "group": group})
    order = ("held_out", "test", "val", "train")
    family = {name: tuple(names) for names in related for name in names}

    def person(case: dict) -> tuple:
        name = case["group"].split("/")[0]
        return family.get(name, name), case["patient"]

    taken: set[tuple] = set()
    for own in order:
        if own == section:
            return [case for case in sections[own] if person(case) not in taken]
        taken |= {person(case) for case in sections[own]}
    raise DataError(f"section is {section!r}: expected one of {', '.join(order)}.")


class PretrainingDataset(EpisodeDataset):
    """Episodes of real and synthetic tasks over a collection of data sets.

    Cases are prepared at `2 * size`, so that a region of interest is still sharp at `size`.

    Args:
        size: side S of the episodes' images in pixels.
        shares: which tasks are drawn, and what is shown of the images.
        balanced: episode i is of group i modulo their number, and `episodes` counts those of each group; for
            validation. Else the group is drawn by the square root of its number of patients times classes (at most
            six).
        fewest_patients: groups of fewer take each volume for a group and blocks of three of its slices for patients.
        **arguments: of `EpisodeDataset`.
    """

    def __init__(
        self,
        size: int,
        shares: TaskShares = TaskShares(),
        balanced: bool = False,
        fewest_patients: int = FEWEST_PATIENTS,
        **arguments,
    ) -> None:
        self.size = size
        self.kinds = ("noise", "superpixel", "threshold", "real")
        synthetic = [shares.synthetic_probability, shares.superpixel_probability, shares.threshold_probability]
        self.share_of_kind = [*synthetic, 1 - sum(synthetic)]
        self.shares = shares
        self.balanced = balanced
        self.fewest_patients = fewest_patients
        super().__init__(**arguments)
        self.patient_number = {patient: number for number, patient in enumerate(self.patients)}
        weights = [
            np.sqrt(min(len(classes), MANY_CLASSES) * max(len(patients) for patients in classes.values()))
            for _, classes in sorted(self.tasks.items())
        ]
        self.group_weights = np.asarray(weights) / np.sum(weights)

    @property
    def groups(self) -> list[str]:
        """Names of the groups, which `group` of an episode numbers."""
        return sorted(self.tasks)

    def __len__(self) -> int:
        return self.episodes * len(self.tasks) if self.balanced else self.episodes

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """An episode as of `EpisodeDataset`, in balanced datasets with `group` () int64."""
        episode = super().__getitem__(index)
        return {**episode, "group": torch.tensor(index % len(self.tasks))} if self.balanced else episode

    def _place(self, case: dict, index: int) -> tuple[str, str]:
        if self._patients_of[case["group"]] >= self.fewest_patients:
            return case["group"], f"{case['group']}/{case['patient']}"
        name = f"{case['group']}/{case['name']}"
        return name, f"{name}#{index // SLICES_OF_A_BLOCK}"

    def _index(self, progress: bool) -> None:
        found = defaultdict(set)
        for case in self.data:
            found[case["group"]].add(case["patient"])
        self._patients_of = {group: len(patients) for group, patients in found.items()}
        super()._index(progress)

    def _pairs(
        self, rng: np.random.Generator, index: int
    ) -> tuple[list[tuple[Tensor, Tensor]], list[int], list[tuple[int, int]]]:
        own = list(range(self.settings.group_size))
        single = [(number, 0) for number in own]
        kind = self.kinds[rng.choice(len(self.kinds), p=self.share_of_kind)]
        if kind == "noise":
            return noise_task(rng, self.settings.group_size, self.size), own, single
        group = sorted(self.tasks)[self._group(rng, index)]
        target = self._target(rng, group)
        if kind == "superpixel":
            image = self._any_image(rng, group, target)
            made = superpixel_task(rng, image, self.settings.group_size)
            if made is not None:
                return made, own, single
        drawn = self._draw(rng, group, target)
        invert = rng.random() < self.settings.invert_probability
        pairs = [self._load(image.case, image.slice, target, invert) for image in drawn]
        pairs = self._show(rng, pairs, [image.clip for image in drawn])
        if kind == "threshold":
            made = threshold_task(rng, [image for image, _ in pairs])
            if made is not None:
                return made, own, single
        if not invert and rng.random() < self.shares.label_operation_probability:
            pairs = _operate(rng, pairs)
        return pairs, [self.patient_number[image.patient] for image in drawn], [(i.clip, i.slice) for i in drawn]

    def _any_image(self, rng: np.random.Generator, group: str, target: set[int]) -> Tensor:
        """An image (3, S, S) of a group, labelled or not, as a whole or a part of it."""
        patients = self.slices[group]
        places = patients[sorted(patients)[rng.integers(len(patients))]]
        case, index, _ = places[rng.integers(len(places))]
        pair = self._load(case, index, target, invert=False)
        side = pair[0].shape[-1]
        length = side * (1.0 if rng.random() < 0.5 else rng.uniform(0.4, 0.9))
        centre = rng.uniform(length / 2, side - length / 2, 2)
        return _resize(_cut(pair[0], (*centre, length)), self.size, True)

    def _group(self, rng: np.random.Generator, index: int) -> int:
        if self.balanced:
            return index % len(self.tasks)
        return int(rng.choice(len(self.group_weights), p=self.group_weights))

    def _show(
        self, rng: np.random.Generator, pairs: list[tuple[Tensor, Tensor]], clips: list[int]
    ) -> list[tuple[Tensor, Tensor]]:
        """Cut the same kind of window out of each image, the same window within a clip, and bring it to S."""
        side = pairs[0][0].shape[-1]
        choice = rng.random()
        whole = (side / 2, side / 2, float(side))
        if choice < self.shares.region_probability:
            windows = self._regions(rng, pairs, side)
        elif choice < self.shares.region_probability + self.shares.crop_probability:
            length = side * rng.uniform(0.45, 0.9)
            centre = rng.uniform(length / 2, side - length / 2, 2)
            windows = [(*(centre + rng.normal(0, 0.03 * side, 2)), length) for _ in pairs]
            if sum(bool(_cut(mask, window).any()) for (_, mask), window in zip(pairs, windows, strict=True)) < 2:
                windows = [whole] * len(pairs)
        else:
            windows = [whole] * len(pairs)
        windows = [windows[clip] for clip in clips]
        return [
            (_resize(_cut(image, window), self.size, True), _resize(_cut(mask, window), self.size, False))
            for (image, mask), window in zip(pairs, windows, strict=True)
        ]

    @staticmethod
    def _regions(rng: np.random.Generator, pairs: list[tuple[Tensor, Tensor]], side: int) -> list[tuple]:
        """Windows (centre y, x, length) around the target; around another image's where the target is absent."""
        factor = rng.uniform(1.3, 3.0)
        boxes: list[list[float] | None] = []
        for _, mask in pairs:
            rows, columns = (torch.nonzero(mask[0].any(axis))[:, 0] for axis in (1, 0))
            if len(rows):
                edges = [float(value) for line in (rows, columns) for value in (line[0], line[-1] + 1)]
                boxes.append(edges)
            else:
                boxes.append(None)
        known = [box for box in boxes if box is not None]
        windows = []
        for box in boxes:
            y0, y1, x0, x1 = box or known[rng.integers(len(known))]
            length = max(y1 - y0, x1 - x0) * factor * rng.uniform(0.85, 1.18)
            length = float(np.clip(length, MIN_WINDOW * side, side))
            jitter = rng.normal(0, 0.06, 2) * length
            windows.append(((y0 + y1) / 2 + jitter[0], (x0 + x1) / 2 + jitter[1], length))
        return windows


def _cut(values: Tensor, window: tuple[float, float, float]) -> Tensor:
    """Square window (centre y, x, length) of (C, H, W), zero outside."""
    length = max(2, round(window[2]))
    if length == values.shape[-1]:
        return values
    top, left = (round(centre - length / 2) for centre in window[:2])
    height, width = values.shape[-2:]
    inside = values[..., max(top, 0) : max(top + length, 0), max(left, 0) : max(left + length, 0)]
    before = (max(-top, 0), max(-left, 0))
    after = [length - offset - extent for offset, extent in zip(before, inside.shape[-2:], strict=True)]
    return F.pad(inside, (before[1], after[1], before[0], after[0]))


def _resize(values: Tensor, size: int, is_image: bool) -> Tensor:
    if values.shape[-1] == size:
        return values
    if is_image:
        return F.interpolate(values[None], size=(size, size), mode="bilinear", align_corners=False, antialias=True)[0]
    return F.interpolate(values[None], size=(size, size), mode="nearest-exact")[0]


def _operate(rng: np.random.Generator, pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Ask for another form of the target, the same in each image."""
    kind = rng.choice(["edge", "part", "wider", "narrower", "filled"])
    width, side = int(rng.integers(1, 4)), int(rng.integers(4))
    changed = [_changed(mask[0].numpy() > 0.5, kind, width, side) for _, mask in pairs]
    if not all(new.any() for new, (_, mask) in zip(changed, pairs, strict=True) if mask.any()):
        return pairs
    return [
        (image, torch.from_numpy(new[None].astype(np.float32))) for (image, _), new in zip(pairs, changed, strict=True)
    ]


def _changed(mask: np.ndarray, kind: str, width: int, side: int) -> np.ndarray:
    if kind == "edge":
        return binary_dilation(mask, iterations=width) & ~binary_erosion(mask, iterations=width)
    if kind == "wider":
        return binary_dilation(mask, iterations=2 * width)
    if kind == "narrower":
        return binary_erosion(mask, iterations=width)
    if kind == "filled":
        return binary_fill_holes(mask)
    parts, count = components(mask)
    if count < 2:
        return mask
    areas = np.bincount(parts.ravel())[1:]
    # The outermost of the parts that are no specks, on the side asked for.
    large = [number + 1 for number, area in enumerate(areas) if area >= 0.2 * areas.max()]
    centres = {number: np.argwhere(parts == number).mean(0)[side % 2] for number in large}
    best = (min if side < 2 else max)(centres, key=lambda number: centres[number])
    return parts == best
