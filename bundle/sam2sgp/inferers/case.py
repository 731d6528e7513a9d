"""The one way from a case to its result, for evaluation, inference, the server and Python alike.

case ─ prepare ─ prepared case ─ segment ─ CaseResult: class map on the case's own grid, confidence, support used

>>> segmenter = CaseSegmenter(network, inferer, transform)  # doctest: +SKIP
>>> result = segmenter.segment(segmenter.prepare({"name": "a", "image": "a.nii.gz"}))  # doctest: +SKIP
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from sam2sgp.data.classes import check_label_values, renumbered, values_in
from sam2sgp.data.io import PLANES
from sam2sgp.errors import DataError, Sam2SgpError, cause_of
from sam2sgp.evaluation.confidence import confidence_sums
from sam2sgp.inferers.one_piece import keep_main_parts, sentence
from sam2sgp.inferers.support_set import Chunk, Step, SupportSetInferer
from sam2sgp.networks import SAM2SGP
from sam2sgp.support.bank import SupportBank
from sam2sgp.support.familiarity import case_distance
from sam2sgp.transforms.acquired import Acquired, other_than
from sam2sgp.transforms.array import class_probabilities, label_map, uncertainty
from sam2sgp.transforms.cases import Case, PreparedCase

OTHER_PLANE = (
    "It is cut into {own} slices, but all volumes of the support set into {planes} ones, by their voxel sizes: expect "
    "a poor result; use a support set of the same kind of scan, or cut both alike (setting `slice_axis`)."
)


@dataclass(eq=False)
class CaseResult:
    """What was found in a case of Z slices, for C classes; maps are on the case's own grid, on the CPU."""

    pred: Tensor
    """(Z, H, W) class values, uint8 or int32."""

    main: int
    """The slice with the most of all classes in `pred`, labelled ones too."""

    pseudo: Tensor
    """(S, S) class indices of the pseudo-masks there, at the network's size."""

    box: Tensor
    """(Z, C, 4) box prompts at the network's size; negative where there was none."""

    confidence: dict[int, float]
    """Mean probability of each class where it was found, by value; NaN where it was not. Parts that were left out then,
    see `sam2sgp.inferers.one_piece`, count, and so they do in `uncertainty`."""

    support: dict[int, tuple[Tensor, Tensor]]
    """The items that guided, by class value: their numbers and similarities (Z, K)."""

    support_distance: float
    """How unlike the support images it is, see `sam2sgp.support.familiarity`."""

    maybe_absent: list[int]
    """Values of classes that were found though there is less sign of them than in any support image, see
    `sam2sgp.inferers.signs`."""

    seconds: float
    """What segmenting took."""

    warnings: list[str] = field(default_factory=list)
    """Sentences on what may be wrong with the image or the result."""

    probability: Tensor | None = None
    """(Z, C + 1, H, W) float16, of background and classes, where asked for."""

    uncertainty: Tensor | None = None
    """(Z, H, W) float16 in [0, 1]: their normalised entropy, where asked for."""

    pred_index: Tensor | None = None
    """(Z, H, W) uint8 class indices 0..C, where the case is labelled."""

    truth_index: Tensor | None = None
    """(Z, H, W) uint8 true class indices, where the case is labelled."""

    def entries(self) -> dict:
        """Those that there are, by name, for transforms on dicts."""
        named = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in named.items() if value is not None}


def prepare_case(case: Case, transform: Callable, bank: SupportBank | None = None) -> PreparedCase:
    """Preprocess a case; where nothing is stated of it, it is scaled like the cases of the bank.

    Of a volume that is sliced along another axis than all of the bank, and of an image of another modality or in
    another unit than all of it, its `warnings` tell.

    Raises:
        Sam2SgpError: the case can't be read or used, whatever its reader raised.
    """
    try:
        if bank is None:
            return transform(case)
        prepared = transform({**case, "support_scaling": bank.scaling(case.get("group"))})
        axes, own = bank.sliced_along(case.get("group")), prepared["geometry"].slice_axis
        if len(prepared["image"]) > 1 and axes and own not in axes:
            planes = " and ".join(PLANES[axis] for axis in sorted(axes))
            told = OTHER_PLANE.format(own=PLANES[own], planes=planes)
            prepared["warnings"] = [*prepared.get("warnings", ()), told]
        unlike = other_than(prepared.get("acquired", Acquired()), bank.acquisitions(case.get("group")))
        prepared["warnings"] = [*prepared.get("warnings", ()), *unlike]
        return prepared
    except Sam2SgpError:
        raise
    except Exception as error:  # whatever a reader raises for one file
        cause = cause_of(error)
        raise (cause if isinstance(cause, Sam2SgpError) else DataError(str(cause))) from error


@dataclass(frozen=True, eq=False, repr=False)
class CaseSegmenter:
    """Segments whole cases, one at a time. A variant is made by `dataclasses.replace`."""

    network: SAM2SGP
    """In evaluation mode, on the device to compute on."""

    inferer: SupportSetInferer
    """Segments slices, guided by its bank."""

    transform: Callable | None = None
    """Preprocessing of a case, which only `prepare` needs."""

    exclude_own_patient: bool = True
    """Never guide a case by support of its own patient."""

    probability: bool = False
    """Keep the probabilities of background and classes, see `class_probabilities`."""

    uncertainty: bool = False
    """Keep their normalised entropy, see `sam2sgp.transforms.uncertainty`."""

    def prepare(self, case: Case) -> PreparedCase:
        """See `prepare_case`."""
        assert self.transform is not None, "a CaseSegmenter without transform segments only prepared cases"
        return prepare_case(case, self.transform, self.inferer.bank)

    def work(self, case: PreparedCase) -> int:
        """What the numbers add up to that `segment` tells of its progress."""
        slices = len(case["image"])
        return slices * self.inferer.looks_at_case(slices)

    def segment(self, case: PreparedCase, step: Step | None = None) -> CaseResult:
        """Segment a prepared case.

        Args:
            step: is told of the progress, see `work`.

        Raises:
            DataError: the case is scored, and its label has a value that the support set does not declare.
        """
        started = time.perf_counter()
        bank = self.inferer.bank
        patient = case.get("patient") if self.exclude_own_patient else None
        truth = case.get("label")
        truth = truth if isinstance(truth, Tensor) else None
        maps = [name for name in ("probability", "uncertainty") if getattr(self, name)]
        found = _Collected(case, bank.class_values, truth, maps)
        for rows, logits, chunk in self.inferer.segment_case(case, self.network, patient, case.get("group"), step):
            found.add(rows, logits, chunk)
        shares: dict[int, float] = {}
        if self.inferer.settings.one_piece and len(case["image"]) > 1:
            shares = found.keep_main_parts(bank.one_piece(patient, case.get("group")))
        result = found.result(self.inferer.least_signs(self.network, case.get("group"), step))
        told = (sentence(bank.class_names[value], share) for value, share in shares.items())
        result.warnings = [*case.get("warnings", ()), *filter(None, told)]
        if truth is not None:
            check_label_values(case["source"], values_in(truth.numpy()), bank.class_names)
            result.pred_index = _indices(result.pred, bank.class_values)
            result.truth_index = _indices(truth, bank.class_values)
        result.seconds = time.perf_counter() - started
        return result


class _Collected:
    """The results of a case's slices, put together chunk by chunk.

    Args:
        truth: (Z, H, W) labelled class values; None: not labelled.
        maps: names of the maps to keep.
    """

    def __init__(self, case: PreparedCase, class_values: list[int], truth: Tensor | None, maps: list[str]) -> None:
        self.class_values, self.truth = class_values, truth
        values = torch.tensor([0, *class_values])
        slices, shape = len(case["image"]), case["letterbox"].original
        # As small as the values allow: of a long volume these arrays are gigabytes.
        self.values = values.to(torch.uint8 if values.max() <= 255 else torch.int32)
        self.pred = torch.zeros(slices, *shape, dtype=self.values.dtype)
        self.box = torch.zeros(slices, len(class_values), 4)
        # In half precision: of a long volume these are the largest arrays by far.
        shapes = {"probability": (len(values), *shape), "uncertainty": shape}
        self.maps = {name: torch.zeros(slices, *shapes[name], dtype=torch.float16) for name in maps}
        # Per class index, the sum of the winning probabilities, and of how many pixels.
        self.sums, self.counts = np.zeros(len(values)), np.zeros(len(values))
        self.support: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.distances: list[Tensor] = []
        self.sizes: list[Tensor] = []
        self.score = torch.full((len(class_values),), -torch.inf)
        # Pseudo-masks of all slices are kept: which one is shown is known only when all are done.
        size = case["letterbox"].size
        self.pseudo = torch.zeros(slices, size, size, dtype=torch.uint8)

    def add(self, rows: slice, logits: Tensor, chunk: Chunk) -> None:
        """Logits (B, C, H, W) of some slices, after all passes."""
        index = label_map(logits).cpu()
        self.pred[rows] = self.values[index.int()]
        for name, values_of in (("probability", class_probabilities), ("uncertainty", uncertainty)):
            if name in self.maps:
                self.maps[name][rows] = values_of(logits).cpu()
        shown = (index > 0).flatten(1).sum(1)
        self.distances.append(chunk.distance)
        self.sizes.append(shown)
        self.pseudo[rows] = label_map(chunk.output.pseudo_logits).cpu()
        self.box[rows] = chunk.output.box.cpu()
        self.score = torch.maximum(self.score, chunk.output.object_score.float().cpu().amax(0))
        winner = logits.max(1).values.sigmoid()
        sums, counts = confidence_sums(index.numpy(), winner.cpu().numpy(), len(self.values))
        self.sums += sums
        self.counts += counts
        for entry in chunk.retrieved:
            self.support.setdefault(entry.value, []).append((entry.index.cpu(), entry.similarity.cpu()))

    def keep_main_parts(self, values: list[int]) -> dict[int, float]:
        """See `sam2sgp.inferers.one_piece.keep_main_parts`; `values` of the classes that are one piece."""
        return keep_main_parts(self.pred, values, self.class_values, self.maps.get("probability"))

    def _main(self) -> int:
        """The slice with the most of all classes, found and labelled; the first of several."""
        shown = [int(found.count_nonzero()) for found in self.pred]
        if self.truth is not None:
            shown = [found + int(truth.count_nonzero()) for found, truth in zip(shown, self.truth, strict=True)]
        return shown.index(max(shown))

    def result(self, least_signs: Tensor) -> CaseResult:
        """The result of all slices; how long it took is not known here.

        Args:
            least_signs: (C,) object scores, below which a class may be absent.
        """
        faint, main = (self.score < least_signs).tolist(), self._main()
        return CaseResult(
            pred=self.pred,
            main=main,
            pseudo=self.pseudo[main].clone(),
            box=self.box,
            confidence={
                value: float(self.sums[i] / self.counts[i]) if self.counts[i] else float("nan")
                for i, value in enumerate(self.class_values, 1)
            },
            support={
                value: (torch.cat([index for index, _ in parts]), torch.cat([similarity for _, similarity in parts]))
                for value, parts in self.support.items()
            },
            support_distance=case_distance(torch.cat(self.distances), torch.cat(self.sizes)),
            maybe_absent=[value for i, value in enumerate(self.class_values) if faint[i] and self.counts[i + 1]],
            seconds=0.0,
            **self.maps,
        )


def _indices(values: Tensor, class_values: list[int]) -> Tensor:
    """Class values (Z, H, W), on the CPU -> class indices 0..C, uint8."""
    table = np.zeros(max(class_values, default=0) + 1, np.uint8)
    table[class_values] = np.arange(1, len(class_values) + 1)
    return torch.from_numpy(renumbered(values.numpy(), table))
