"""Segmentation of the slices of a case guided by a support bank, a batch of slices at a time."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from monai.inferers import Inferer
from torch import Tensor

from sam2sgp import distributed
from sam2sgp.evaluation.confidence import is_doubtful
from sam2sgp.heap import give_back
from sam2sgp.inferers.adapting import UsableAdaptation
from sam2sgp.inferers.doubted_labels import doubted_labels
from sam2sgp.inferers.items_as_queries import ItemsAsQueries, Judgement
from sam2sgp.inferers.object_gate import ABSENT_LOGIT, ObjectGate, Thresholds, evidence_of, without_absent
from sam2sgp.inferers.precision import autocast
from sam2sgp.inferers.query_cache import QueryCache
from sam2sgp.inferers.second_pass import SecondPass
from sam2sgp.inferers.settings import InferenceSettings
from sam2sgp.inferers.signs import LeastSigns
from sam2sgp.inferers.volume import Propagation
from sam2sgp.networks import SAM2SGP, ImageFeatures, SGPOutput, SupportMemory
from sam2sgp.support.bank import Retrieved, SupportBank
from sam2sgp.support.encodings import Step
from sam2sgp.support.familiarity import Familiarity
from sam2sgp.transforms.array import Region, label_map, pixel_size, to_three_channels
from sam2sgp.transforms.cases import PreparedCase

# Images and classes that go through the network together: more take memory, and no less time.
ROWS = 64
# Bringing `ABSENT_LOGIT` to another grid may change it by this much.
ROUNDING = 1e-3


@dataclass
class Chunk:
    """Result for the slices [start, start + B) of a case.

    output: maps of all C classes of the bank. retrieved: their support. distance: (B,) how far each slice is from the
    support images, see `sam2sgp.support.familiarity`.
    """

    start: int
    output: SGPOutput
    retrieved: list[Retrieved]
    distance: Tensor


@dataclass(eq=False, repr=False)
class SupportSetInferer(Inferer):
    """Segment with the support items that the sampler chooses for each slice and class.

    A variant is made by `dataclasses.replace`. It shares the bank and what the support set taught with the sampler of
    the first; to learn again, as with another sampler, it takes `gate=None` and `signs=None`.

    Args:
        bank: the support bank. It is encoded at the first use and again after `reset`.
        settings: by what is segmented.
        query_cache: features of queries that may come again; None: each is encoded whenever it comes.
        gate: tells which classes are absent, where `settings.object_gate` is on; None: a new one.
        signs: how clear a sign of the classes the support images give; None: to be learned.
        adaptation: to the bank, by whose results those of whole cases are averaged; None: there is none.

    Classes without an eligible support item get `ABSENT_LOGIT` everywhere: they are not segmented.

    Example:
        >>> from sam2sgp.support import ItemRules, SupportSampler
        >>> inferer = SupportSetInferer(SupportBank([], dict, rules=ItemRules(allow_empty=True), progress=False))
        >>> settings = replace(inferer.settings, sampler=SupportSampler(k=1))
        >>> variant = replace(inferer, settings=settings, gate=None, signs=None)
        >>> variant.bank is inferer.bank, variant.gate.sampler.k, inferer.gate.sampler.k
        (True, 1, 8)
        >>> replace(inferer, settings=settings).gate is inferer.gate
        True
    """

    bank: SupportBank
    settings: InferenceSettings = InferenceSettings()
    query_cache: QueryCache | None = None
    gate: ObjectGate | None = None
    signs: LeastSigns | None = None
    adaptation: UsableAdaptation | None = None

    def __post_init__(self) -> None:
        self._gate = self.gate = self.gate or ObjectGate(ItemsAsQueries(self.bank, self.settings.sampler))
        self._signs = self.signs = self.signs or LeastSigns(self._gate.items)
        self.second_pass = SecondPass(self.bank, self.settings, self.query_cache)
        self._mirrored: SupportSetInferer | None = None
        self._familiarity: Familiarity | None = None
        # The version of the bank whose labels were doubted or not, and of how many items that was known.
        self._doubted: tuple[int, int] | None = None
        # The version of the bank when that was made.
        self._version = 0

    def reset(self) -> None:
        """Forget the encoded support set, because the network has changed."""
        self.bank.forget()
        self._mirrored = None
        self.adaptation = None
        self._gate.forget()
        self._signs.forget()
        self._doubted = None

    def guided_by(self, bank: SupportBank, settings: InferenceSettings | None = None) -> "SupportSetInferer":
        """The same settings, or others, with another bank, and without an adaptation."""
        return SupportSetInferer(bank, settings or self.settings)

    def encode(self, network: SAM2SGP) -> None:
        """Encode the support set now, not at the first image.

        Several processes share the work where the bank has a folder; all of them must call this.
        """
        device = next(network.parameters()).device
        with torch.no_grad(), autocast(device.type, self.settings.precision):
            if distributed.is_active():
                self.bank.encode_share(network, device, *distributed.place_on_machine())
                distributed.barrier()
            self.bank.encode(network, device)

    def __call__(self, inputs: Tensor, network: SAM2SGP, *args, **kwargs) -> Tensor:
        """Images (Z, C', S, S) in [0, 1] -> logits (Z, C, S, S); keyword arguments as of `chunks`."""
        return torch.cat([chunk.output.logits for chunk in self.chunks(inputs, network, **kwargs)])

    @torch.no_grad()
    def chunks(
        self,
        inputs: Tensor,
        network: SAM2SGP,
        patient: str | None = None,
        group: str | None = None,
        volume: bool = False,
        step: Step | None = None,
    ) -> Iterator[Chunk]:
        """Segment slice by slice.

        Args:
            inputs: (Z, C', S, S) images in [0, 1], on any device.
            network: on the device to compute on, in evaluation mode.
            patient: support items of this patient are not used.
            group: where the bank holds items of this group, only those are used.
            volume: the images are the slices of one volume, in order; they guide each other where `volume_memory` is
                given.
            step: is told of the progress: each slice counts `looks` times.
        """
        device = next(network.parameters()).device
        if self.adaptation is not None:
            self.adaptation.refuse(patient, self.bank)
        with autocast(device.type, self.settings.precision):
            self.bank.encode_missing(network, device)
            step = step or _no_step
            thresholds = self.thresholds(network, device, group, step)
            batches = self._encoded(inputs, network, device)
            if self.looks(len(inputs), volume) > 1:
                yield from self._propagated(batches, network, thresholds, patient, group, step)
                return
            for start, features in batches:
                retrieved = self.bank.retrieve(network, features, self.settings.sampler, patient, group)
                output = self._segment(network, features, retrieved)
                output.logits = without_absent(output.logits, thresholds.absent(evidence_of(output)))
                step(len(features))
                yield Chunk(start, output, retrieved, self._distance(network, features, patient))

    @torch.no_grad()
    def segment_case(
        self,
        case: PreparedCase,
        network: SAM2SGP,
        patient: str | None = None,
        group: str | None = None,
        step: Step | None = None,
    ) -> Iterator[tuple[slice, Tensor, Chunk]]:
        """Segment a prepared case on its own grid: which slices, their logits (B, C, H, W), and the chunk.

        The logits are those of `at_own_pixels`, averaged with those of the mirrored case where `settings.mirror` says
        so, and with those of the adaptation. `step` is told of the progress: each slice counts `looks_at_case` times.
        """
        step = step or _no_step
        pixel = pixel_size(case["geometry"].spacing)
        found = self._both_passes(case, network, patient, group, step)
        mirror = self.settings.mirror
        # Whether a volume is doubtful would be known only when the results of all its slices were held.
        if mirror == "auto" and len(case["image"]) == 1:
            (only,) = found
            found, mirror, step = iter([only]), self._is_doubtful(*only[1:]), _without_progress(step)
        if mirror is True:
            mirrored = self.mirrored(network, step)._both_passes(_mirrored(case), network, patient, group, step)
            found = map(_mean_of_both, found, mirrored)
        for rows, logits, chunk in found:
            if self.adaptation is not None:
                logits = self.adaptation.average(logits, case["image_full"][rows], pixel, chunk.distance)
            yield rows, logits, chunk

    def _both_passes(
        self, case: PreparedCase, network: SAM2SGP, patient: str | None, group: str | None, step: Step
    ) -> Iterator[tuple[slice, Tensor, Chunk]]:
        """As `segment_case`, by the first and the second pass."""
        pixel = pixel_size(case["geometry"].spacing)
        volume = len(case["image"]) > 1
        for chunk in self.chunks(case["image"], network, patient, group, volume=volume, step=step):
            rows = slice(chunk.start, chunk.start + len(chunk.output.logits))
            logits = case["letterbox"].restore(chunk.output.logits)
            logits = self.at_own_pixels(logits, case["image_full"][rows], network, pixel, patient, group)
            step(len(logits))
            yield rows, logits, chunk

    @torch.no_grad()
    def mirrored(self, network: SAM2SGP, step: Step | None = None) -> "SupportSetInferer":
        """An inferer that is guided by the mirrored bank, which is encoded; which classes are absent, this one says.

        `step` as of `SupportBank.encode`.
        """
        device = next(network.parameters()).device
        with autocast(device.type, self.settings.precision):
            self.bank.encode_missing(network, device)
            mirrored = self.bank.mirrored()
            mirrored.encode_missing(network, device, step)
        if self._mirrored is None or self._mirrored.bank is not mirrored:
            settings = replace(self.settings, mirror=False, object_gate=False)
            self._mirrored = SupportSetInferer(mirrored, settings, self.query_cache)
        return self._mirrored

    def _is_doubtful(self, logits: Tensor, chunk: Chunk) -> bool:
        """Whether a class that was found is of low confidence, or guided by fewer than k items; where none was found,
        whether one of those looked for is guided by so few."""
        count = logits.shape[1]
        if not count:
            return False
        classes, winner = label_map(logits).cpu().numpy(), logits.amax(1).sigmoid().cpu().numpy()
        found = {self.bank.class_values[index - 1] for index in np.unique(classes).tolist() if index}
        guiding = [entry for entry in chunk.retrieved if bool(entry.likely.any())]
        few = {entry.value for entry in guiding if entry.index.shape[1] < self.settings.sampler.k}
        return bool(few & found if found else few) or is_doubtful(classes, winner, count + 1)

    def _distance(self, network: SAM2SGP, features: ImageFeatures, patient: str | None) -> Tensor:
        """How far images (B,) are from the support images, of other patients than `patient`."""
        if self._familiarity is None or self._version != self.bank.version:
            patients = [item.patient for item in self.bank.items]
            if self.adaptation is not None:
                patients = self.adaptation.owners
            self._familiarity, self._version = Familiarity.of(self.bank.embedding, patients), self.bank.version
        return self._familiarity(network.retrieval_embedding(features), patient)

    def looks(self, slices: int, volume: bool) -> int:
        """How often `chunks` looks at each of so many slices: once, and again in both directions of a volume."""
        return 3 if volume and self.settings.volume_memory and slices > 1 else 1

    def looks_at_case(self, slices: int) -> int:
        """How often `segment_case` looks at each of so many slices: as often as `chunks`, and in the second pass; all
        of that twice where every case is mirrored, too."""
        return (self.looks(slices, slices > 1) + 1) * (2 if self.settings.mirror is True else 1)

    def thresholds(
        self, network: SAM2SGP, device: torch.device, group: str | None = None, step: Step | None = None
    ) -> Thresholds:
        """The evidence up to which each class counts as absent, learned once from the encoded bank.

        `step` is told of 0 slices before each item that is looked at. What it raises ends the learning, which goes on
        from there the next time.
        """
        if not self.settings.object_gate or not self.bank.items:
            return Thresholds.none(len(self.bank.class_values)).to(device)
        return self._gate(partial(self._judge, network, device, step or _no_step), group).to(device)

    @torch.no_grad()
    def least_signs(self, network: SAM2SGP, group: str | None = None, step: Step | None = None) -> Tensor:
        """The object scores (C,) below which an image shows less sign of a class than any support image, on the CPU;
        learned once from the encoded bank, see `LeastSigns`; `step` as of `thresholds`.

        Labels that what is found in their images contradicts are added to the bank's warnings.
        """
        device = next(network.parameters()).device
        with autocast(device.type, self.settings.precision):
            least = self._signs(partial(self._judge, network, device, step or _no_step), group)
        items = self._gate.items
        if (judged := (self.bank.version, len(items.judged))) != self._doubted:
            self._doubted = judged
            self.bank.warn(doubted_labels(items))
        return least

    def _judge(
        self, network: SAM2SGP, device: torch.device, step: Step, number: int, retrieved: list[Retrieved]
    ) -> Judgement:
        """An item as a query."""
        step(0)
        item = self.bank.items[number]
        image = to_three_channels(item.image.to(device, torch.float32))[None]
        output = self._segment(network, network.encode(image), retrieved)
        masks, found = self.bank.masks([item])[0] > 0, output.logits[0] > 0
        size, of_found, overlap = (part.flatten(1).sum(1) for part in (masks, found, masks & found))
        return Judgement(evidence_of(output)[0], size, of_found, output.object_score[0], overlap)

    def _encoded(self, inputs: Tensor, network: SAM2SGP, device: torch.device) -> Iterator[tuple[int, ImageFeatures]]:
        """Start and features of each batch."""
        batch_size = self.settings.batch_size
        for start in range(0, len(inputs), batch_size):
            image = to_three_channels(inputs[start : start + batch_size].to(device, torch.float32))
            if self.query_cache is None:
                yield start, network.encode(image)
            else:
                yield start, self.query_cache(image, network, self.bank.fingerprint)

    def _propagated(
        self,
        batches: Iterator[tuple[int, ImageFeatures]],
        network: SAM2SGP,
        thresholds: Thresholds,
        patient: str | None,
        group: str | None,
        step: Step,
    ) -> Iterator[Chunk]:
        """The chunks of a volume, window by window."""
        segment = partial(self._segment, network)
        memory, batch_size, values = self.settings.volume_memory, self.settings.batch_size, self.bank.class_values
        assert memory is not None, "slices guide each other only where there is a setting for it"
        propagation = Propagation(memory, network, segment, values, thresholds, batch_size, step)
        held: list[ImageFeatures] = []
        begin, window = 0, 0

        def flush() -> Iterator[Chunk]:
            features = ImageFeatures.concatenate(held)
            count = len(features)
            held.clear()
            retrieved = self.bank.retrieve(network, features, self.settings.sampler, patient, group)
            distance = self._distance(network, features, patient)
            output = propagation(features, retrieved)
            # Freed before the caller works on the results, which bounds the memory.
            del features
            give_back()
            for start in range(0, count, batch_size):
                rows = slice(start, start + batch_size)
                yield Chunk(begin + start, output.rows(rows), [entry.rows(rows) for entry in retrieved], distance[rows])

        for start, features in batches:
            window = window or memory.window(features, len(values), network.image_size)
            if held and start + len(features) - begin > window:
                yield from flush()
                begin = start
            held.append(features)
        yield from flush()

    def at_own_pixels(
        self,
        logits: Tensor,
        images: Tensor,
        network: SAM2SGP,
        pixel: tuple[float, float] = (1.0, 1.0),
        patient: str | None = None,
        group: str | None = None,
    ) -> Tensor:
        """Correct logits (B, C, H, W) that `chunks` gave, brought to the images' grid: see `SecondPass`.

        Images much longer than wide are segmented again window by window before, see `Region.windows`.
        """
        shape = tuple(logits.shape[-2:])
        windows = Region.windows(shape, network.image_size, pixel)
        if not windows:
            return self.second_pass(logits, images, network, pixel, patient, group)
        total, weights = torch.zeros_like(logits), logits.new_zeros(shape)
        for window in windows:
            cropped = images[(..., *window.place)]
            found = window.restore(self(window.apply(images), network, patient=patient, group=group))
            found = self.second_pass(found, cropped, network, pixel, patient, group)
            weight = window.window(shape).to(logits.device)
            total[(..., *window.place)] += weight * found
            weights[window.place] += weight
        return total / weights

    def _segment(
        self,
        network: SAM2SGP,
        features: ImageFeatures,
        retrieved: list[Retrieved],
        frames: dict[int, SupportMemory] | None = None,
    ) -> SGPOutput:
        """Segment classes of equal K together, some at a time, and put the results in the order of the bank's classes.

        Classes that aren't likely on an image get `ABSENT_LOGIT` there.

        Args:
            frames: by class index, for some classes, memory (B, 1, M) of slices next to the support.
        """
        if not all(bool(entry.likely.all()) for entry in retrieved):
            rows = []
            for row in range(len(features)):
                own = slice(row, row + 1)
                likely = [entry.rows(own) for entry in retrieved if entry.likely[row]]
                rows.append(self._segment(network, features[own], likely, frames))
            return SGPOutput.concatenate(rows)
        frames = frames or {}
        batch, classes = len(features), len(self.bank.class_values)
        size = network.image_size
        device = features.embedding.device
        out = SGPOutput(
            logits=torch.full((batch, classes, size, size), ABSENT_LOGIT, device=device),
            pseudo_logits=torch.full((batch, classes, size, size), ABSENT_LOGIT, device=device),
            box=torch.full((batch, classes, 4), -1.0, device=device),
            iou=torch.zeros(batch, classes, device=device),
            object_score=torch.full((batch, classes), ABSENT_LOGIT, device=device),
        )
        by_count: dict[tuple[int, int], list[tuple[Retrieved, int]]] = defaultdict(list)
        for entry in retrieved:
            class_index = self.bank.class_values.index(entry.value)
            more = frames[class_index].tokens.shape[2] if class_index in frames else 0
            by_count[entry.index.shape[1], more].append((entry, class_index))
        few = max(1, ROWS // batch)
        parts = [(more, group[i : i + few]) for (_, more), group in by_count.items() for i in range(0, len(group), few)]
        for more, members in parts:
            entries, class_indices = map(list, zip(*members, strict=True))
            support = self.bank.select(entries)
            if more:
                support = support.beside(SupportMemory.of_classes([frames[number] for number in class_indices]))
            output = network.segment(features, support)
            for name, values in vars(output).items():
                getattr(out, name)[:, class_indices] = values.float()
        return out


def _mirrored(case: PreparedCase) -> PreparedCase:
    """The images of a case mirrored left to right."""
    full = case["image_full"].flip(-1)
    return {**case, "image_full": full, "image": case["letterbox"].apply(full)}


def _mean_of_both(
    own: tuple[slice, Tensor, Chunk], mirrored: tuple[slice, Tensor, Chunk]
) -> tuple[slice, Tensor, Chunk]:
    """What was found in slices, with the mean of its logits and those of the mirrored slices.

    A class that is absent from a slice stays so, and one that was not looked for in the mirrored slice is as it was
    found: a mean with `ABSENT_LOGIT` would bring the one back and take the other away.
    """
    rows, logits, chunk = own
    other = mirrored[1].flip(-1)
    absent = logits.amax((-2, -1)) < ABSENT_LOGIT + ROUNDING
    unseen = (other - ABSENT_LOGIT).abs().amax((-2, -1)) < ROUNDING
    return rows, torch.where((absent | unseen)[..., None, None], logits, (logits + other) / 2), chunk


def _without_progress(step: Step) -> Step:
    """Only asks whether to go on: how much work a case is was told before it turned out to be doubtful."""
    return lambda slices: step(0)


def _no_step(slices: int) -> None:
    """Nobody wants to know."""
