"""3DM: what was found on one slice of a volume guides its neighbours.

    window of slices ─ encode once ─ segment each singly ─ anchors ─ from each anchor up and down, guided by support and
    neighbours ─ mean of both

The volume passes in windows of a bounded number of slices, so memory does not grow with its length. In a window all
slices are segmented with only the support set; per class and extent, the one that the support set explains best is an
anchor. Where the support set has taught how little evidence there is without the class
(`sam2sgp.inferers.object_gate`), slices with no more stay empty. From the anchors it goes on in both directions: each
slice is guided by its support and by the last slices segmented on the way, which enter as memory with SAM2's temporal
encoding, as a support item would. A slice is reached from its nearest anchor, and the end of the window before is an
anchor too.

A slice's logits are the mean of those with only the support set and those with memory. Memory by itself carries a
mistake on from slice to slice; the support set by itself does not know the neighbours. On volumes that served for the
choice, the mean was better than either (`benchmarks/volumes.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce

import torch
from torch import Tensor

from sam2sgp.errors import ConfigError
from sam2sgp.inferers.object_gate import Thresholds, among_neighbours, evidence_of, without_absent
from sam2sgp.networks import SAM2SGP, ImageFeatures, SGPOutput, SupportMemory
from sam2sgp.support.bank import Retrieved
from sam2sgp.transforms.array import label_map

MIN_WINDOW, MAX_WINDOW = 8, 64
WINDOW_BYTES = 256 * 2**20
# An extent whose anchor is worth less than this share of the best one's has none.
MIN_ANCHOR = 0.25
# Share of what memory makes of a slice; the rest is what was known of it before.
MEMORY_SHARE = 0.5

Segment = Callable[[ImageFeatures, list[Retrieved], "dict[int, SupportMemory]"], SGPOutput]


@dataclass
class Frame:
    """A segmented slice as memory: its index in the volume, memory (1, 1, 1), and whether the class is on it."""

    slice_index: int
    memory: SupportMemory
    present: bool

    def at(self, slice_index: int) -> SupportMemory:
        """The memory with its distance from a slice of the volume."""
        distance, item = (
            self.memory.tokens.new_full((1, 1, 1), number, dtype=torch.int64)
            for number in (abs(slice_index - self.slice_index), -1 - self.slice_index)
        )
        return replace(self.memory, distance=distance, item=item)


@dataclass(frozen=True)
class VolumeMemory:
    """The settings of 3D memory.

    Raises:
        ConfigError: `frames` is below 1.
    """

    frames: int = 2
    """Neighbouring slices that guide a slice, at least 1."""

    def __post_init__(self) -> None:
        frames = self.frames
        if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
            raise ConfigError(f"memory_frames is {frames!r}: expected the number of neighbouring slices, at least 1.")

    @staticmethod
    def window(features: ImageFeatures, classes: int, size: int) -> int:
        """Slices held at a time, with their features and results, from the features of a few.

        classes: C; size: S, of the network.
        """
        held = (value for field in fields(features) if (value := getattr(features, field.name)) is not None)
        tensors = [tensor for value in held for tensor in (value if isinstance(value, tuple) else (value,))]
        per_slice = sum(tensor.nbytes for tensor in tensors) // len(features)
        # Logits of final and pseudo-mask, twice while batches are put together.
        per_slice += 2 * 2 * classes * size**2 * torch.float32.itemsize
        return max(MIN_WINDOW, min(MAX_WINDOW, WINDOW_BYTES // per_slice))


class Propagation:
    """Goes through the windows of one volume.

    Args:
        settings: of the 3D memory.
        network: in evaluation mode.
        segment: (features of B slices, what was retrieved, frames by class index) -> output for all C classes;
            logits of classes without support are far below 0.
        class_values: of the C classes.
        thresholds: evidence up to which a class is absent from a slice, by what the support set by itself says.
        batch_size: slices segmented at a time where they don't depend on each other; bounds memory.
        step: is told how many more slices were looked at; of each, three times.
    """

    def __init__(
        self,
        settings: VolumeMemory,
        network: SAM2SGP,
        segment: Segment,
        class_values: Sequence[int],
        thresholds: Thresholds,
        batch_size: int,
        step: Callable[[int], None],
    ) -> None:
        self.settings = settings
        self.network = network
        self.segment = segment
        self.class_values = list(class_values)
        self.thresholds = thresholds
        self.batch_size = batch_size
        self.step = step
        self.start = 0
        # The most evidence of each class so far, (C,).
        self.most = torch.zeros_like(thresholds.in_image)
        # Per class index, the last slices segmented on the way up.
        self.carried: dict[int, list[Frame]] = {}

    def __call__(self, features: ImageFeatures, retrieved: list[Retrieved]) -> SGPOutput:
        """Segment the next W slices of the volume; `retrieved` is for all of them."""
        window = _Window(self, features, retrieved)
        self.carried = window.sweep(True, self.carried)
        window.sweep(False, {})
        self.start += len(features)
        return window.output


class _Window:
    """Slices [start, start + W) of a volume while they are segmented.

    output: (W, C, ...), at first of the support set only. entries: {class index: its support}. anchors: {class
    index: where it starts}. upward: {class index: (W,) whether a slice is reached going up}. absent: {class index:
    slices without it}.
    """

    def __init__(self, propagation: Propagation, features: ImageFeatures, retrieved: list[Retrieved]) -> None:
        self.settings, self.start = propagation.settings, propagation.start
        self.network, self.segment = propagation.network, propagation.segment
        self.features = features
        retrieved = [replace(entry, likely=_without_gaps(entry.likely)) for entry in retrieved]
        self.entries = {propagation.class_values.index(entry.value): entry for entry in retrieved}
        self.step = propagation.step
        count, parts = len(features), []
        for rows in torch.arange(count).split(propagation.batch_size):
            parts.append(self.segment(features[rows], [entry.rows(rows) for entry in retrieved], {}))
            self.step(len(rows))
        self.output = SGPOutput.concatenate(parts)
        evidence = among_neighbours(evidence_of(self.output))
        propagation.most = torch.maximum(propagation.most, evidence.amax(0))
        absent = propagation.thresholds.absent(evidence, propagation.most)
        self.output.logits = without_absent(self.output.logits, absent)
        self.anchors: dict[int, list[int]] = {}
        self.upward: dict[int, list[bool]] = {}
        self.absent: dict[int, set[int]] = {}
        shown = label_map(self.output.logits)
        for class_index in self.entries:
            self.absent[class_index] = set(torch.nonzero(absent[:, class_index].cpu())[:, 0].tolist())
            self.anchors[class_index] = self._explained_best(class_index, shown == class_index + 1)
            before = _shows(propagation.carried.get(class_index, []))
            self.upward[class_index] = _upward([-1] * before + self.anchors[class_index], count)

    def _explained_best(self, class_index: int, shown: Tensor) -> list[int]:
        """Slices to start from: of each run of slices that show the class, (W, S, S) bool, the best one.

        The best one has the most pixels of the class, each counted by its certainty, times the similarity of the
        support.
        """
        certainty = (2 * self.output.logits[:, class_index].sigmoid() - 1) * shown
        similarity = self.entries[class_index].similarity.to(shown.device).mean(1).clamp(min=0)
        worth = (certainty.flatten(1).sum(1) * similarity).tolist()
        tops = [max(run, key=worth.__getitem__) for run in _runs([value > 0 for value in worth])]
        return [top for top in tops if worth[top] >= MIN_ANCHOR * max(worth)]

    def sweep(self, up: bool, trails: dict[int, list[Frame]]) -> dict[int, list[Frame]]:
        """Go through the slices in one direction; trails are the last slices on the way, per class index.

        Going up, a slice that shows a class of which nothing was known becomes an anchor. Going down from it, slices
        on which the class was not found are looked at again, until it ends.
        """
        slices = range(len(self.features))
        for slice_index in slices if up else reversed(slices):
            due = [class_index for class_index in self.entries if self._is_due(class_index, slice_index, up, trails)]
            starting = [class_index for class_index in self.entries if slice_index in self.anchors[class_index]]
            guided = [class_index for class_index in due if class_index in trails]
            if guided:
                self._guide(guided, slice_index, trails)
            for class_index in starting:
                trails.pop(class_index, None)
            unknown = [class_index for class_index in due if not _shows(trails.get(class_index, []))]
            if due or starting:
                self._remember([*due, *starting], slice_index, trails)
            if up:
                for class_index in unknown:
                    if _shows(trails.get(class_index, [])):
                        self.anchors[class_index].append(slice_index)
            self.step(1)
        return trails

    def _guide(self, class_indices: list[int], slice_index: int, trails: dict[int, list[Frame]]) -> None:
        """Segment some classes of a slice once more, with the slices on their trails as memory."""
        row = torch.tensor([slice_index])
        frames = {class_index: self._memory(trails[class_index], slice_index) for class_index in class_indices}
        entries = [self.entries[class_index].rows(row) for class_index in class_indices]
        found = self.segment(self.features[row], entries, frames)
        known = self.output.logits[slice_index, class_indices]
        found.logits[0, class_indices] = torch.lerp(known, found.logits[0, class_indices], MEMORY_SHARE)
        for field in fields(SGPOutput):
            getattr(self.output, field.name)[slice_index, class_indices] = getattr(found, field.name)[0, class_indices]

    def _is_due(self, class_index: int, slice_index: int, up: bool, trails: dict[int, list[Frame]]) -> bool:
        if (
            slice_index in self.anchors[class_index]
            or slice_index in self.absent[class_index]
            or not self.entries[class_index].likely[slice_index]
        ):
            return False
        if self.upward[class_index][slice_index] == up:
            return True
        return (
            not up
            and _shows(trails.get(class_index, []))
            and not bool((self.output.logits[slice_index, class_index] > 0).any())
        )

    def _remember(self, class_indices: list[int], slice_index: int, trails: dict[int, list[Frame]]) -> None:
        """Put what a slice shows of some classes on their trails; a trail begins where a class is."""
        winner = label_map(self.output.logits[slice_index][None])
        masks = torch.stack([winner == class_index + 1 for class_index in class_indices], 1).float()
        present = masks.flatten(2).any(2)[0].tolist()
        memory = self.network.encode_support(self.features[torch.tensor([slice_index])], masks)
        first = torch.zeros(1, 1, 1, dtype=torch.int64, device=masks.device)
        for number, class_index in enumerate(class_indices):
            if present[number] or class_index in trails:
                own = memory.select(first, torch.tensor([number], device=masks.device))
                trail = trails.setdefault(class_index, [])
                trail.append(Frame(self.start + slice_index, own, present[number]))
                del trail[: -self.settings.frames]

    def _memory(self, trail: list[Frame], slice_index: int) -> SupportMemory:
        """The slices of a trail as memory (1, 1, M) for a slice."""
        return reduce(SupportMemory.beside, [frame.at(self.start + slice_index) for frame in trail])


def _without_gaps(likely: Tensor) -> Tensor:
    """Whether a class is likely on slices, (W,) bool, or on both neighbours of a slice."""
    between = likely.clone()
    between[1:-1] |= likely[:-2] & likely[2:]
    return between


def _shows(trail: list[Frame]) -> bool:
    return any(frame.present for frame in trail)


def _upward(starts: list[int], count: int) -> list[bool]:
    """Whether each of `count` slices is reached going up from its nearest start, the lower one of two."""
    if not starts:
        return [True] * count
    nearest = (min(starts, key=lambda start: (abs(start - slice_index), start)) for slice_index in range(count))
    return [start <= slice_index for slice_index, start in enumerate(nearest)]


def _runs(found: Sequence[bool]) -> Iterator[list[int]]:
    """Numbers of neighbouring true entries, run by run."""
    run: list[int] = []
    for number, value in enumerate([*found, False]):
        if value:
            run.append(number)
        elif run:
            yield run
            run = []
