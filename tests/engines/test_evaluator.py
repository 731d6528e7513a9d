"""What validation measures, and what an evaluator gives out."""

import pytest
import torch
from ignite.engine import Engine

from sam2sgp.engines import CaseDice, EpisodeDice, class_maps


def evaluate(batches: list[dict], **settings) -> float:
    outputs = {id(batch): batch.pop("output") for batch in batches}
    engine = Engine(lambda _, batch: outputs[id(batch)])
    EpisodeDice(**settings).attach(engine, "dice")
    engine.run(batches)
    return engine.state.metrics["dice"]


def episode(group: int, dice: list[float]) -> dict:
    """Two images whose prediction has this Dice; NaN for an image without the target."""
    label = torch.zeros(len(dice), 1, 1, 100)
    pred = torch.full_like(label, -1.0)
    for row, value in enumerate(dice):
        if value == value:
            label[row, ..., :50] = 1
            pred[row, ..., round(50 - 50 * value) : round(100 - 50 * value)] = 1
    return {"group": torch.tensor([group]), "output": {"label": label, "pred": pred}}


@pytest.mark.parametrize(("failed", "expected"), [([False, True], 0.5), ([True, True], 0.0)])
def test_cases_that_failed_do_not_count_and_where_all_failed_nothing_was_found(failed, expected):
    truth = torch.zeros(1, 4, 4, dtype=torch.uint8)
    truth[:, :2] = 1
    scored = {"truth_index": truth, "pred_index": truth.transpose(1, 2)}
    engine = Engine(lambda _, fails: [] if fails else [scored])
    CaseDice(include_background=False, num_classes=2, output_transform=class_maps).attach(engine, "dice")
    engine.run(failed)
    assert engine.state.metrics["dice"] == expected


def test_groups_count_equally_and_held_out_sets_as_much_as_the_others():
    batches = [episode(0, [1.0, 0.5]), episode(0, [1.0, float("nan")]), episode(1, [0.4, 0.4]), episode(2, [0.2, 0.2])]
    names = ["a", "b", "c/part"]
    assert evaluate([dict(b) for b in batches], groups=names) == pytest.approx((2.5 / 3 + 0.4 + 0.2) / 3)
    held_out = evaluate([dict(b) for b in batches], groups=names, held_out=["c"])
    assert held_out == pytest.approx(((2.5 / 3 + 0.4) / 2 + 0.2) / 2)
