"""Evaluation and inference over whole cases, on the case's own grid.

One iteration is one case, which a `CaseSegmenter` segments. A case that can't be read is recorded and passed over.
"""

import logging
import math
from collections.abc import Callable, Sequence

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, EventEnum, Events
from ignite.metrics import Metric
from monai.engines import SupervisedEvaluator
from monai.engines.utils import IterationEvents
from monai.handlers import MeanDice
from monai.metrics import compute_dice
from torch import Tensor
from torch.utils.data import Dataset

from sam2sgp.errors import DataError, Sam2SgpError
from sam2sgp.heap import give_back
from sam2sgp.inferers import CaseSegmenter, prepare_case
from sam2sgp.support.bank import SupportBank
from sam2sgp.transforms.cases import Case, PreparedCase, completed

logger = logging.getLogger(__name__)

# Entries of a case that nobody needs after it is segmented; of a long volume they are gigabytes.
IMAGES = ("image", "image_full")


class QueryDataset(Dataset):
    """Cases, prepared one at a time; a case that can't be prepared becomes {"name", "source", "number", "error"}.

    Args:
        data: the cases, dicts with `image` at least.
        transform: preprocessing of a case.
        bank: the support bank that guides the cases. Where nothing is stated of a case, it is scaled like that.

    Attributes:
        chosen: numbers in `data` of the cases to go through; None: all.
        stamp: what it makes of a case before the case is read is put at `stamp`.
    """

    def __init__(self, data: Sequence[Case], transform: Callable, bank: SupportBank | None = None) -> None:
        self.data = completed(data)
        self.transform = transform
        self.bank = bank
        self.chosen: Sequence[int] | None = None
        self.stamp: Callable[[Case], object] | None = None

    def __len__(self) -> int:
        return len(self.data if self.chosen is None else self.chosen)

    def __getitem__(self, index: int) -> dict:
        number = index if self.chosen is None else self.chosen[index]
        case = self.data[number]
        try:
            stamp = self.stamp(case) if self.stamp else None
            return {**prepare_case(case, self.transform, self.bank), "number": number, "stamp": stamp}
        except Sam2SgpError as error:  # one file must not end the run
            failed = {"name": case["name"], "source": str(case["image"]), "number": number}
            return {**failed, "error": str(error)}


def first(batch: list) -> dict:
    """Collate function of a loader whose batch is one case."""
    return batch[0]


def class_maps(output: list[dict]) -> tuple[list, list]:
    """Output transform for MONAI's metric handlers: predicted and true class indices (1, Z, H, W) of scored cases."""
    scored = [case for case in output if "truth_index" in case]
    return [case["pred_index"][None] for case in scored], [case["truth_index"][None] for case in scored]


def episode_masks(output: list[dict]) -> tuple[list[Tensor], list[Tensor]]:
    """Output transform for metrics of training: predicted and true masks (1, S, S) of the images of a step."""
    return [image["pred"]["logits"] > 0 for image in output], [image["label"] for image in output]


class CaseDice(MeanDice):
    """MONAI's `MeanDice` of what `class_maps` gives; 0 where every case failed, which MONAI takes for a fault."""

    def compute(self) -> float:
        return super().compute() if len(self.metric_fn) else 0.0


class EpisodeDice(Metric):
    """Mean Dice of episodes, for model selection over many data sets.

    Reads `label` and `pred` of the evaluator's output and `group` of its batch. Images without the target don't count.
    Groups count equally, and where there are groups of held-out sets, those and the others do.

    Args:
        groups: names of the groups, which `group` numbers.
        held_out: names of data sets that are not trained on; a group is `<set>` or `<set>/<part>`.
    """

    def __init__(self, groups: list[str], held_out: Sequence[str] = ()) -> None:
        self.groups = groups
        self.held_out = set(held_out)
        super().__init__(output_transform=lambda output: output)

    def reset(self) -> None:
        self.sums, self.counts = torch.zeros(2, len(self.groups), dtype=torch.float64).unbind()

    def iteration_completed(self, engine: Engine) -> None:
        output = engine.state.output
        dice = compute_dice(output["pred"] > 0, output["label"])[:, 0].double().cpu()
        group = engine.state.batch["group"].repeat_interleave(len(dice) // len(engine.state.batch["group"]))
        found = ~dice.isnan()
        self.sums.index_add_(0, group[found], dice[found])
        self.counts.index_add_(0, group[found], torch.ones_like(dice[found]))

    def update(self, output) -> None:
        raise NotImplementedError("EpisodeDice needs the batch too: attach it to an engine.")

    def compute(self) -> float:
        means = (idist.all_reduce(self.sums) / idist.all_reduce(self.counts)).tolist()
        logger.info("Dice: %s", ", ".join(f"{name} {mean:.3f}" for name, mean in zip(self.groups, means, strict=True)))
        sides: tuple[list, list] = [], []
        for name, mean in zip(self.groups, means, strict=True):
            if not math.isnan(mean):
                sides[name.split("/")[0] in self.held_out].append(mean)
        result = [float(np.mean(side)) for side in sides if side]
        logger.info("Mean Dice of %s: %s", "sets in training and held-out sets" if sides[1] else "all sets", result)
        return float(np.mean(result))


class QueryEvents(EventEnum):
    """Events of a `QueryEvaluator`: before a run, when the cases to go through may still be chosen; within a case, when
    more of its slices are done, see `QueryEvaluator.share_done`."""

    RUN_PREPARED = "run_prepared"
    SLICES_DONE = "slices_done"


class QueryEvaluator(SupervisedEvaluator):
    """MONAI's evaluator for batches of one case as `QueryDataset` gives them, with a `SupportSetInferer`.

    The support set is encoded again in each run. Before it starts, `QueryEvents.RUN_PREPARED` is fired; where no case
    is left after that, only `COMPLETED` follows. After an iteration `state.output` is a list with one
    dict, or an empty list for a case that failed (`state.batch` then holds the error); both are let go before the next
    case is read and at the end. The dict has the entries of a `CaseResult`, and all those of the case but its images.

    Args:
        exclude_own_patient, probability, uncertainty: see `CaseSegmenter`.
        postprocessing: transform of the one output of an iteration.
    """

    def __init__(
        self,
        *args,
        exclude_own_patient: bool = True,
        probability: bool = False,
        uncertainty: bool = False,
        postprocessing: Callable | None = None,
        **kwargs,
    ) -> None:
        super().__init__(*args, decollate=False, event_names=[QueryEvents], postprocessing=postprocessing, **kwargs)
        self.add_event_handler(Events.GET_BATCH_STARTED | Events.EPOCH_COMPLETED, self._let_go)
        # A report reads volumes again.
        self.add_event_handler(Events.EPOCH_COMPLETED, give_back)
        self.exclude_own_patient = exclude_own_patient
        self.probability = probability
        self.uncertainty = uncertainty
        self.postprocessing = postprocessing
        # How much of the case at work is done, and is to be done, see `CaseSegmenter.work`.
        self._done, self._work = 0, 1

    @property
    def share_done(self) -> float:
        """How much of the case at work is done, from 0 to 1."""
        return self._done / self._work

    def _step(self, slices: int) -> None:
        self._done += slices
        self.fire_event(QueryEvents.SLICES_DONE)

    def _let_go(self) -> None:
        """A long volume and what was found in it are gigabytes: not beside the next one, nor beside a report."""
        self.state.batch = self.state.output = None

    def run(self, global_epoch: int = 1) -> None:
        """Go through the cases; `global_epoch` is that of a training which this is the validation of."""
        self.inferer.reset()
        self.fire_event(QueryEvents.RUN_PREPARED)
        self.state.epoch_length = len(self.data_loader)
        if self.state.epoch_length:
            super().run(global_epoch)
        else:
            self.fire_event(Events.COMPLETED)

    def _iteration(self, engine, batchdata) -> list[dict]:
        engine.state.batch, engine.state.output = [batchdata], []
        if "error" not in batchdata:
            try:
                with engine.mode(engine.network):
                    engine.state.output = [self.segment(batchdata)]
            except DataError as error:
                batchdata["error"] = str(error)
            # Free the image before saving, to cap peak memory.
            for name in IMAGES:
                batchdata.pop(name, None)
        if engine.state.output:
            engine.fire_event(IterationEvents.FORWARD_COMPLETED)
            engine.fire_event(IterationEvents.MODEL_COMPLETED)
        else:
            logger.error("%s", batchdata["error"])
        return engine.state.output

    def segment(self, case: PreparedCase) -> dict:
        """One prepared case -> what an iteration puts out for it; `inferer` and `network` as they are now."""
        segmenter = CaseSegmenter(
            self.network,
            self.inferer,
            exclude_own_patient=self.exclude_own_patient,
            probability=self.probability,
            uncertainty=self.uncertainty,
        )
        self._done, self._work = 0, segmenter.work(case)
        result = segmenter.segment(case, self._step)
        return {key: value for key, value in case.items() if key not in IMAGES} | result.entries()
