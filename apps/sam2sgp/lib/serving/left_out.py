"""A labelled image segmented as if it had no label, guided by those of the other patients, and measured.

In: a case of the support set. Out: Dice by class, which tells what the support set is worth as it is now. It is what
`sam2sgp check` does, with the network that serves.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lib.serving.segmenter import ServerSegmenter
from sam2sgp.data import read_label
from sam2sgp.evaluation import dice_of_values
from sam2sgp.inferers import CaseSegmenter
from sam2sgp.inferers.support_set import Step


def dice_left_out(segmenter: ServerSegmenter, case: Mapping[str, Any], step: Step) -> dict[int, float]:
    """Dice of a case by class value; to be called while the segmenter's lock is held.

    Classes that are neither in the label nor found, or of which no other patient has a label, are left out.

    Args:
        segmenter: network and support set.
        case: of the segmenter's bank: `name`, `image`, `label`, `patient`.
        step: is called every few slices, and ends the work by what it raises.

    Raises:
        Sam2SgpError: image or label can't be used.
    """
    prepared = segmenter.prepare(case["image"], case["name"])
    step(0)
    # What is kept for requests stays as it is.
    inferer = replace(segmenter.inferer, query_cache=None)
    found = CaseSegmenter(segmenter.network, inferer).segment(
        {**prepared, "patient": case["patient"], "group": None}, step
    )
    truth = read_label(case["label"], prepared["geometry"])
    return dice_of_values(found.pred.numpy(), truth, found.support)
