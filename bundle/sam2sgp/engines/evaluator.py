"""Evaluation and inference over whole cases, on the case's own grid.

One iteration is one case: its slices go through the inferer in batches, the logits come back to the case's grid, and
the result is a class map. A case that can't be read is recorded and passed over.
"""

import logging
import time
from collections.abc import Callable

import numpy as np
import torch
from ignite.engine import Events
from monai.engines import SupervisedEvaluator
from monai.engines.utils import IterationEvents
from torch.utils.data import Dataset

from sam2sgp.data.folders import check_label_values
from sam2sgp.errors import DataError, cause_of
from sam2sgp.transforms.array import label_map

logger = logging.getLogger(__name__)


class QueryDataset(Dataset):
    """Cases, prepared one at a time; a case that can't be prepared becomes {"name", "source", "error"}."""

    def __init__(self, data: list[dict], transform: Callable) -> None:
        self.data = data
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict:
        case = self.data[index]
        try:
            return self.transform(case)
        except Exception as error:  # whatever a reader raises for one file must not end the run
            return {"name": case["name"], "source": str(case["image"]), "error": str(cause_of(error))}


def first(batch: list) -> dict:
    """Collate function of a loader whose batch is one case."""
    return batch[0]


def class_maps(output: list[dict]) -> tuple[list, list]:
    """Output transform for MONAI's metric handlers: predicted and true class indices (1, Z, H, W) of scored cases."""
    scored = [case for case in output if "truth_index" in case]
    return [case["pred_index"][None] for case in scored], [case["truth_index"][None] for case in scored]


class QueryEvaluator(SupervisedEvaluator):
    """MONAI's evaluator for batches of one case as `QueryDataset` gives them, with a `SupportSetInferer`.

    The support set is encoded anew at the start of each run. After an iteration `state.output` is a list with one
    dict, or an empty list for a case that failed (`state.batch` then holds the error):

        pred (Z, H, W) class values; pred_index, and truth_index if labelled, (Z, H, W) class numbers 0..C;
        pseudo (Z, S, S) class numbers of the pseudo-masks; box (Z, C, 4); confidence {value: mean probability};
        support {value: (item numbers (Z, K), similarities (Z, K))}; seconds; and all entries of the case.

    Args:
        exclude_own_patient: never guide a case by support of its own patient.
    """

    def __init__(self, *args, exclude_own_patient: bool = True, **kwargs) -> None:
        super().__init__(*args, decollate=False, **kwargs)
        self.exclude_own_patient = exclude_own_patient
        self.add_event_handler(Events.STARTED, lambda engine: engine.inferer.reset())

    def _iteration(self, engine, batchdata: dict) -> list[dict]:
        engine.state.batch, engine.state.output = [batchdata], []
        if "error" not in batchdata:
            try:
                with engine.mode(engine.network):
                    engine.state.output = [self._segment(batchdata)]
            except DataError as error:
                batchdata["error"] = str(error)
        if engine.state.output:
            engine.fire_event(IterationEvents.FORWARD_COMPLETED)
            engine.fire_event(IterationEvents.MODEL_COMPLETED)
        else:
            logger.error("%s", batchdata["error"])
        return engine.state.output

    def _segment(self, case: dict) -> dict:
        started = time.perf_counter()
        bank = self.inferer.bank
        values = torch.tensor([0, *bank.class_values])
        slices = len(case["image"])
        pred_index = torch.zeros(slices, *case["fit"].original, dtype=torch.uint8)
        pseudo = torch.zeros(slices, *case["image"].shape[-2:], dtype=torch.uint8)
        box = torch.zeros(slices, len(bank.class_values), 4)
        support: dict[int, list] = {}
        sums, counts = np.zeros(len(values)), np.zeros(len(values))
        patient = case.get("patient") if self.exclude_own_patient else None
        for chunk in self.inferer.chunks(case["image"], self.network, patient, case.get("group")):
            part = slice(chunk.start, chunk.start + len(chunk.output.logits))
            logits = case["fit"].restore(chunk.output.logits)
            index = label_map(logits)
            pred_index[part] = index.cpu()
            pseudo[part] = label_map(chunk.output.pseudo_logits).cpu()
            box[part] = chunk.output.box.cpu()
            winner = logits.max(1).values.sigmoid()
            sums += np.bincount(index.flatten().cpu(), winner.flatten().cpu().double(), minlength=len(values))
            counts += np.bincount(index.flatten().cpu(), minlength=len(values))
            for entry in chunk.retrieved:
                support.setdefault(entry.value, []).append((entry.index.cpu(), entry.similarity.cpu()))
        result = {
            **case,
            "pred": values[pred_index.long()],
            "pred_index": pred_index,
            "pseudo": pseudo,
            "box": box,
            "confidence": {
                value: float(sums[i] / counts[i]) if counts[i] else float("nan")
                for i, value in enumerate(bank.class_values, 1)
            },
            "support": {
                value: tuple(torch.cat(part) for part in zip(*parts, strict=True)) for value, parts in support.items()
            },
        }
        truth = case.get("label")
        if isinstance(truth, torch.Tensor):
            found = torch.unique(truth).tolist()
            check_label_values(case["source"], found, bank.class_names)
            result["truth_index"] = torch.searchsorted(values, truth.contiguous()).to(torch.uint8)
        result["seconds"] = time.perf_counter() - started
        return result
