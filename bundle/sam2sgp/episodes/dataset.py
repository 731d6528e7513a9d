"""Training episodes: a few images of one task, each to be segmented with the others as its support.

One item of `EpisodeDataset` is one episode: G slices with the binary mask of one target. Within a batch every image
is encoded once and serves both as query and as support of the others (`SupportSampler` chooses which), which costs a
(K + 1)-th of encoding separate support images. In an episode of clips, the images are short runs of neighbouring
slices, which guide each other as they do in a volume.
"""

import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from sam2sgp import distributed
from sam2sgp.data.coding import LabelCoding
from sam2sgp.episodes.case_cache import CaseCache
from sam2sgp.episodes.settings import Augmentation, EpisodeSettings
from sam2sgp.errors import DataError
from sam2sgp.progress import Bar
from sam2sgp.transforms.array import to_three_channels
from sam2sgp.transforms.cases import completed
from sam2sgp.transforms.scaling import agreed, is_open, log_scalings

logger = logging.getLogger(__name__)

MIN_PIXELS = 4


@dataclass
class Drawn:
    """A slice of an episode: its patient, the number of its case, its index there, and the number of its clip."""

    patient: str
    case: int
    slice: int
    clip: int


class EpisodeDataset(Dataset):
    """Random but reproducible episodes: item i is a function of only the seed and i.

    Args:
        data: labelled cases, dicts with `image` and `label`, and `patient` and `group` where they are known.
        transform: preprocessing of a case, see `sam2sgp.transforms`.
        cache_dir: folder for prepared cases, see `CaseCache`.
        episodes: number of episodes in an epoch.
        settings: what is drawn for each.
        augmentation: how its images are changed.
        seed: of all random choices.
        progress: show a bar while cases are prepared.

    Raises:
        DataError: no class is present in images of two patients, so that no query could have a support.
    """

    def __init__(
        self,
        data: list[dict],
        transform: Callable,
        cache_dir: str,
        episodes: int,
        settings: EpisodeSettings,
        augmentation: Augmentation = Augmentation(),
        *,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        self.data = cast(list[dict], completed(data))
        self.transform = transform
        self.cache = CaseCache(cache_dir, transform)
        self.episodes = episodes
        self.settings = settings
        self.augmentation = augmentation
        self.seed = seed
        # tasks[group][class value][patient] lists (case, slice); slices[group][patient] lists all with their classes.
        self.tasks: dict[str, dict[int, dict[str, list]]] = {}
        self.slices: dict[str, dict[str, list]] = {}
        # lengths[case] is the number of its slices.
        self.lengths: list[int] = []
        self._index(progress)

    def _agree_on_scaling(self, progress: bool) -> None:
        """Prepare all cases; those whose scaling is open follow the others of their group, see `agreed`."""
        bar = Bar(self.data, desc="Preparing training images", unit="case", disable=not progress)
        scalings = [self.cache[case].scaling for case in bar]
        by_group = defaultdict(list)
        for case, scaling in zip(self.data, scalings, strict=True):
            by_group[case["group"]].append(scaling)
        for number, (case, scaling) in enumerate(zip(self.data, scalings, strict=True)):
            common = agreed(by_group[case["group"]])
            if common and is_open(scaling):
                self.data[number] = case | {"support_scaling": common}
                scalings[number] = self.cache[self.data[number]].scaling
        log_scalings(logger, "Training images", [case["name"] for case in self.data], scalings)

    def _index(self, progress: bool) -> None:
        tasks: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
        slices: dict = defaultdict(lambda: defaultdict(list))
        codings: dict[str, LabelCoding] = defaultdict(LabelCoding)
        self._agree_on_scaling(progress)
        for number, case in enumerate(self.data):
            label = self.cache[case].label
            self.lengths.append(len(label))
            held: set[int] = set()
            for index in range(len(label)):
                counts = np.bincount(label[index].ravel())
                held.update(np.flatnonzero(counts).tolist())
                present = {int(value) for value in np.flatnonzero(counts >= MIN_PIXELS) if value}
                group, patient = self._place(case, index)
                slices[group][patient].append((number, index, present))
                for value in present:
                    tasks[group][value][patient].append((number, index))
            codings[case["group"]].check(case["label"], held)
        self.patients = sorted({patient for patients in slices.values() for patient in patients})
        for group, classes in tasks.items():
            usable = {value: dict(patients) for value, patients in sorted(classes.items()) if len(patients) > 1}
            if usable:
                self.tasks[group] = usable
                self.slices[group] = dict(slices[group])
        if not self.tasks:
            raise DataError(
                f"Training expected a class labelled in images of at least two patients, found {len(self.data)} "
                f"labelled images of {len(self.patients)} patients without one; add labelled images, or set "
                "`patient_pattern` if file names are mistaken for one patient's."
            )

    def _place(self, case: dict, index: int) -> tuple[str, str]:
        """Group and patient that a slice counts as."""
        return case["group"], case["patient"]

    def __len__(self) -> int:
        return self.episodes

    @property
    def images_repeat(self) -> bool:
        """Whether the same slice comes again as the very same image."""
        return self.augmentation.variants is not None or not (self.augmentation.task or self.augmentation.image)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Episode `index` (any non-negative number, see `EpisodeSampler`).

        Returns:
            image (G, 3, S, S) float32 in [0, 1]; label (G, 1, S, S) float32 in {0, 1}; patient (G,) int64;
            seed () int64 for random choices that the training step makes. With clips also frame_index (G, L - 1) int64,
            the other images of an image's clip, -1 where there is none, and frame_distance (G, L - 1) int64, how many
            slices away they are.
        """
        rng = np.random.default_rng([self.seed, index])
        task_seed = int(rng.integers(2**31))
        pairs, patients, places = self._pairs(rng, index)
        # The slices of a clip are changed alike.
        own_seeds = [int(rng.integers(2**31)) for _ in pairs]
        if self.augmentation.variants is not None:
            # Patients still differ within a variant, as images do in an episode without variants.
            task_seed %= self.augmentation.variants
            generators = [np.random.default_rng([self.seed, task_seed, patient]) for patient in patients]
            own_seeds = [int(generator.integers(2**31)) for generator in generators]
        images, labels = [], []
        for (image, label), (clip, _) in zip(pairs, places, strict=True):
            sample = {"image": image, "label": label}
            for transform, seed in ((self.augmentation.task, task_seed), (self.augmentation.image, own_seeds[clip])):
                if transform is not None:
                    transform.set_random_state(seed=seed)
                    sample = transform(sample)
            images.append(torch.as_tensor(sample["image"]).clamp(0, 1))
            labels.append((torch.as_tensor(sample["label"]) > 0.5).float())
        return {
            "image": torch.stack([_plain(image) for image in images]),
            "label": torch.stack([_plain(label) for label in labels]),
            "patient": torch.tensor(patients),
            "seed": torch.tensor(int(rng.integers(2**31))),
            **(self._frames(places) if self.settings.clip_probability else {}),
        }

    def _frames(self, places: list[tuple[int, int]]) -> dict[str, Tensor]:
        """The other images of each image's clip, and how many slices away they are."""
        index = torch.full((len(places), self.settings.clip_length - 1), -1)
        distance = torch.zeros_like(index)
        for own, (clip, slice_index) in enumerate(places):
            others = [number for number, (other, _) in enumerate(places) if other == clip and number != own]
            for column, number in enumerate(others):
                index[own, column] = number
                distance[own, column] = abs(places[number][1] - slice_index)
        return {"frame_index": index, "frame_distance": distance}

    def _pairs(
        self, rng: np.random.Generator, index: int
    ) -> tuple[list[tuple[Tensor, Tensor]], list[int], list[tuple[int, int]]]:
        """Images (3, S, S) with masks (1, S, S) of one episode before augmentation; the patients' numbers; each image's
        clip and slice."""
        group = sorted(self.tasks)[rng.integers(len(self.tasks))]
        target = self._target(rng, group)
        invert = rng.random() < self.settings.invert_probability
        drawn = self._draw(rng, group, target)
        pairs = [self._load(image.case, image.slice, target, invert) for image in drawn]
        return pairs, [self.patients.index(image.patient) for image in drawn], [(i.clip, i.slice) for i in drawn]

    def _target(self, rng: np.random.Generator, group: str) -> set[int]:
        classes = list(self.tasks[group])
        target = {int(rng.choice(classes))}
        if len(classes) > 1 and rng.random() < self.settings.union_probability:
            target.add(int(rng.choice([value for value in classes if value not in target])))
        return target

    def _draw(self, rng: np.random.Generator, group: str, target: set[int]) -> list[Drawn]:
        """The images of an episode; the first two (clips) hold the target and are of different patients."""
        holders: dict[str, list] = defaultdict(list)
        for value in sorted(target):
            for patient, places in self.tasks[group][value].items():
                holders[patient] += places
        settings, length = self.settings, 1
        if settings.clip_probability and rng.random() < settings.clip_probability:
            span = (settings.clip_length - 1) * settings.clip_stride + 1
            long = {name: [(n, i) for n, i in places if self.lengths[n] >= span] for name, places in holders.items()}
            long = {name: places for name, places in long.items() if places}
            if len(long) > 1:
                holders, length = long, settings.clip_length
        count = settings.group_size // length
        names = sorted(holders)
        order = list(rng.permutation(len(names)))
        if len(order) < count:
            order += list(rng.integers(len(names), size=count - len(order)))
        drawn: list[Drawn] = []
        for number, choice in enumerate(order[:count]):
            patient = names[choice]
            places = holders[patient]
            if number > 1 and rng.random() < settings.empty_fraction:
                empty = [(n, i) for n, i, present in self.slices[group][patient] if not present & target]
                places = [(n, i) for n, i in empty if length == 1 or self.lengths[n] >= span] or places
            case, slice_index = places[rng.integers(len(places))]
            first = len(drawn)
            drawn += [Drawn(patient, case, index, first) for index in self._clip(rng, case, slice_index, length)]
        while len(drawn) < settings.group_size:
            patient = names[rng.integers(len(names))]
            places = holders[patient]
            case, slice_index = places[rng.integers(len(places))]
            drawn.append(Drawn(patient, case, slice_index, len(drawn)))
        return drawn

    def _clip(self, rng: np.random.Generator, case: int, slice_index: int, length: int) -> list[int]:
        """Indices of `length` slices of a case, one of which is `slice_index`, in a random direction."""
        if length == 1:
            return [slice_index]
        stride, last = self.settings.clip_stride, self.lengths[case] - 1
        fitting = [
            start
            for start in range(slice_index - (length - 1) * stride, slice_index + 1, stride)
            if start >= 0 and start + (length - 1) * stride <= last
        ]
        start = fitting[rng.integers(len(fitting))] if fitting else min(slice_index, last - (length - 1) * stride)
        indices = [start + number * stride for number in range(length)]
        return indices[:: int(rng.choice([-1, 1]))]

    def _load(self, number: int, index: int, target: set[int], invert: bool) -> tuple[Tensor, Tensor]:
        case = self.cache[self.data[number]]
        image = to_three_channels(torch.from_numpy(np.asarray(case.image[index], dtype=np.float32)))
        mask = np.isin(case.label[index], sorted(target))
        if invert:
            top, left, height, width = case.valid
            inside = np.zeros_like(mask)
            inside[top : top + height, left : left + width] = True
            mask = inside & ~mask
        return image, torch.from_numpy(mask[None].astype(np.float32))


class EpisodeSampler(DistributedSampler):
    """Numbers of the episodes of each epoch and, in distributed training, of each process.

    MONAI's engines tell a `DistributedSampler` the epoch, so that every epoch has new episodes and a resumed training
    goes on with those it would have had. The worker processes hold no state.

    In a step each of W processes gets the next `batch_size` episodes, as if one process accumulated W batches. In the
    last step there may be fewer. A process for which there are none then gets one that another has too, because all
    must take part; `PaddedSteps` sees to it that it doesn't count.

    Args:
        dataset: gives the number of episodes in an epoch.
        batch_size: of the loader that uses this.
    """

    def __init__(self, dataset: EpisodeDataset, batch_size: int = 1) -> None:
        super().__init__(dataset, num_replicas=distributed.world_size(), rank=distributed.rank(), shuffle=False)
        self.batch_size = batch_size

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return -(-len(self.dataset) // (self.num_replicas * self.batch_size))

    def own(self, step: int) -> range:
        """Episodes of this process in a step; none for some processes in the last one."""
        start = (step * self.num_replicas + self.rank) * self.batch_size
        count = len(self.dataset)
        return range(min(start, count), min(start + self.batch_size, count))

    def __iter__(self):
        offset = self.epoch * len(self.dataset)
        for step in range(self.steps):
            padding = step * self.num_replicas * self.batch_size
            yield from (offset + index for index in self.own(step) or [padding])

    def __len__(self) -> int:
        return sum(len(self.own(step)) or 1 for step in range(self.steps))


def _plain(tensor: Tensor) -> Tensor:
    return tensor.as_tensor() if hasattr(tensor, "as_tensor") else tensor
