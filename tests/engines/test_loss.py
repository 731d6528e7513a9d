"""The training loss."""

import pytest
import torch

from sam2sgp.engines import SGPLoss
from sam2sgp.errors import ConfigError

LABEL = torch.zeros(2, 1, 16, 16)
LABEL[0, :, 4:12, 4:12] = 1


def prediction(final: torch.Tensor, pseudo: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "logits": final,
        "pseudo_logits": pseudo,
        "object_score": torch.tensor([[8.0], [-8.0]]),
        "iou": torch.ones(2, 1),
    }


def logits(mask: torch.Tensor) -> torch.Tensor:
    return (mask * 2 - 1) * 12


@pytest.mark.parametrize("kind", ["dice_ce", "dice_focal"])
def test_perfect_masks_cost_nothing_and_inverted_ones_much(kind):
    loss = SGPLoss(kind, score_weight=0.0)
    assert loss(prediction(logits(LABEL), logits(LABEL)), LABEL) < 1e-2
    assert loss(prediction(logits(1 - LABEL), logits(1 - LABEL)), LABEL) > 1.0


def test_pseudo_mask_counts_half_and_less_from_epoch_to_epoch():
    loss = SGPLoss(pseudo_weight=0.5, pseudo_decay=0.9, score_weight=0.0)
    right, wrong = logits(LABEL), logits(1 - LABEL)
    of_final, of_pseudo = loss(prediction(wrong, right), LABEL), loss(prediction(right, wrong), LABEL)
    assert of_pseudo / of_final == pytest.approx(0.5, rel=0.02)
    loss.set_epoch(10)
    assert loss(prediction(right, wrong), LABEL) / of_pseudo == pytest.approx(0.9**10, rel=0.02)


def test_scores_are_trained_on_presence_and_on_the_real_iou():
    loss = SGPLoss(score_weight=1.0)
    good = prediction(logits(LABEL), logits(LABEL))
    good["iou"] = torch.tensor([[1.0], [0.0]])
    absent = {**good, "object_score": -good["object_score"]}
    overrated = {**good, "iou": torch.tensor([[0.0], [1.0]])}
    assert loss(good, LABEL) < 0.05
    assert loss(absent, LABEL) > loss(good, LABEL) + 5
    assert loss(overrated, LABEL) > loss(good, LABEL) + 0.5


def test_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="dice_ce"):
        SGPLoss("hinge")
