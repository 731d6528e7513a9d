"""Evaluation and inference over whole cases, on the case's own grid.

One iteration is one case: its slices go through the inferer in batches, the logits come back to the case's grid, and
the result is a class map. A case that can't be read is recorded and passed over.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, EventEnum, Events
from ignite.metrics import Metric
from monai.engines import SupervisedEvaluator
from monai.engines.utils import IterationEvents
from monai.metrics import compute_dice
from torch.utils.data import Dataset

from sam2sgp.data.folders import check_label_values
from sam2sgp.errors import DataError, cause_of
from sam2sgp.heap import give_back
from sam2sgp.support.bank import SupportBank
from sam2sgp.support.familiarity import case_distance
from sam2sgp.transforms import class_probabilities, label_map, uncertainty

logger = logging.getLogger(__name__)

# Entries of a case that nobody needs after it is segmented; of a long volume they are gigabytes.
IMAGES = ("image", "image_full")


class QueryDataset(Dataset):
    """Cases, prepared one at a time; a case that can't be prepared becomes {"name", "source", "number", "error"}.

    Args:
        data: the cases.
        transform: preprocessing of a case.
        bank: the support bank that guides the cases. Where nothing is stated of a case, it is scaled like that.

    Attributes:
        chosen: numbers in `data` of the cases to go through; None: all.
        stamp: what it makes of a case before the case is read is put at `stamp`.
    """

    def __init__(self, data: list[dict], transform: Callable, bank: SupportBank | None = None) -> None:
        self.data = data
        self.transform = transform
        self.bank = bank
        self.chosen: Sequence[int] | None = None
        self.stamp: Callable[[dict], object] | None = None

    def __len__(self) -> int:
        return len(self.data if self.chosen is None else self.chosen)

    def __getitem__(self, index: int) -> dict:
        number = index if self.chosen is None else self.chosen[index]
        case = self.data[number]
        try:
            stamp = self.stamp(case) if self.stamp else None
            if self.bank is not None:
                case = case | {"support_scaling": self.bank.scaling(case.get("group"))}
            return {**self.transform(case), "number": number, "stamp": stamp}
        except Exception as error:  # whatever a reader raises for one file must not end the run
            failed = {"name": case["name"], "source": str(case["image"]), "number": number}
            return {**failed, "error": str(cause_of(error))}


def first(batch: list) -> dict:
    """Collate function of a loader whose batch is one case."""
    return batch[0]


def class_maps(output: list[dict]) -> tuple[list, list]:
    """Output transform for MONAI's metric handlers: predicted and true class indices (1, Z, H, W) of scored cases."""
    scored = [case for case in output if "truth_index" in case]
    return [case["pred_index"][None] for case in scored], [case["truth_index"][None] for case in scored]


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
    case is read and at the end:

        pred (Z, H, W) class values, uint8 or int32;
        pred_index and truth_index, if labelled, (Z, H, W) class numbers 0..C;
        main, the slice with the most of all classes, labelled ones too; pseudo (S, S) class numbers of the pseudo-masks
        there; box (Z, C, 4); confidence {value: mean probability};
        support {value: (item numbers (Z, K), similarities (Z, K))}; support_distance, see
        `sam2sgp.support.familiarity`; seconds; and all entries of the case but its images;
        where asked for, probability (Z, C + 1, H, W) and uncertainty (Z, H, W), float16 in [0, 1].

    Args:
        exclude_own_patient: never guide a case by support of its own patient.
        probability: keep the probabilities of background and classes, see `class_probabilities`.
        uncertainty: keep their normalised entropy, see `sam2sgp.transforms.uncertainty`.
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
        # Of the case at work.
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

    def _iteration(self, engine, batchdata: dict) -> list[dict]:
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

    def segment(self, case: dict) -> dict:
        """One prepared case -> what an iteration puts out for it; `inferer` and `network` as they are now."""
        started = time.perf_counter()
        bank = self.inferer.bank
        values = torch.tensor([0, *bank.class_values])
        slices = len(case["image"])
        # As small as the values allow: of a long volume these arrays are gigabytes.
        small = values.to(torch.uint8 if values.max() <= 255 else torch.int32)
        pred = torch.zeros(slices, *case["fit"].original, dtype=small.dtype)
        box = torch.zeros(slices, len(bank.class_values), 4)
        support: dict[int, list] = {}
        # In half precision: of a long volume these are the largest arrays by far.
        maps = {}
        if self.probability:
            maps["probability"] = torch.zeros(slices, len(values), *case["fit"].original, dtype=torch.float16)
        if self.uncertainty:
            maps["uncertainty"] = torch.zeros(slices, *case["fit"].original, dtype=torch.float16)
        sums, counts = np.zeros(len(values)), np.zeros(len(values))
        patient = case.get("patient") if self.exclude_own_patient else None
        source = patient, case.get("group")
        self._done, self._work = 0, slices * (self.inferer.looks(slices, slices > 1) + 1)
        truth = case["label"] if isinstance(case.get("label"), torch.Tensor) else None
        main, most = 0, -1
        distances, sizes = [], []
        for part, logits, chunk in self.inferer.segment_case(case, self.network, *source, step=self._step):
            index = label_map(logits).cpu()
            pred[part] = small[index.int()]
            for name, values_of in (("probability", class_probabilities), ("uncertainty", uncertainty)):
                if name in maps:
                    maps[name][part] = values_of(logits).cpu()
            shown = (index > 0).flatten(1).sum(1)
            distances.append(chunk.distance)
            sizes.append(shown.clone())
            if truth is not None:
                shown += (truth[part] > 0).flatten(1).sum(1)
            if shown.max() > most:
                row = int(shown.argmax())
                main, most = part.start + row, int(shown[row])
                pseudo = label_map(chunk.output.pseudo_logits[row, None])[0].cpu()
            box[part] = chunk.output.box.cpu()
            winner = logits.max(1).values.sigmoid()
            sums += np.bincount(index.flatten(), winner.flatten().cpu().double(), minlength=len(values))
            counts += np.bincount(index.flatten(), minlength=len(values))
            for entry in chunk.retrieved:
                support.setdefault(entry.value, []).append((entry.index.cpu(), entry.similarity.cpu()))
        result = {
            **{key: value for key, value in case.items() if key not in IMAGES},
            "pred": pred,
            "main": main,
            "pseudo": pseudo,
            "box": box,
            **maps,
            "confidence": {
                value: float(sums[i] / counts[i]) if counts[i] else float("nan")
                for i, value in enumerate(bank.class_values, 1)
            },
            "support_distance": case_distance(torch.cat(distances), torch.cat(sizes)),
            "support": {
                value: tuple(torch.cat(part) for part in zip(*parts, strict=True)) for value, parts in support.items()
            },
        }
        if truth is not None:
            found = torch.unique(truth).tolist()
            check_label_values(case["source"], found, bank.class_names)
            for name, found in (("pred_index", pred), ("truth_index", truth)):
                result[name] = torch.searchsorted(values, found.to(values.dtype).contiguous()).to(torch.uint8)
        result["seconds"] = time.perf_counter() - started
        return result
