"""A label that was put to another image is told, at no cost: what is found in its image is somewhere else."""

import logging
from types import SimpleNamespace

import pytest
import torch

from sam2sgp.inferers import CaseSegmenter, InferenceSettings, SupportSetInferer
from sam2sgp.networks import ImageFeatures, SGPOutput, SupportMemory
from sam2sgp.support import SupportBank, SupportSampler
from sam2sgp.transforms import Letterbox
from tests.helpers.stubs import SIZE, StubNetwork


class Bright(StubNetwork):
    """Finds what is bright."""

    def segment(self, features: ImageFeatures, support: SupportMemory) -> SGPOutput:
        batch, classes = support.tokens.shape[:2]
        logits = (10 * features.embedding.mean(1, keepdim=True) - 5).expand(-1, classes, -1, -1)
        return SGPOutput(
            logits, logits, torch.zeros(batch, classes, 4), torch.ones(batch, classes), torch.ones(batch, classes)
        )


def case(number: int, place: int = 0, labelled: int | None = None, side: int = 2) -> dict:
    """A picture with a bright square at a place, labelled at this or another one with a square of this side."""
    image, label = torch.full((1, 3, SIZE, SIZE), 0.001 * number), torch.zeros(1, SIZE, SIZE, dtype=torch.long)
    image[..., place : place + 2, place : place + 2] = 1.0
    at = place if labelled is None else labelled
    label[:, at : at + side, at : at + side] = 1
    pixels = {"image": image, "image_full": image, "label": label, "label_full": label}
    own = {"name": f"case{number}", "source": f"case{number}", "patient": f"p{number}", "group": "a"}
    return {
        **own,
        **pixels,
        "geometry": SimpleNamespace(spacing=None, slice_axis=2),
        "letterbox": Letterbox.of((SIZE, SIZE), SIZE),
    }


def warnings_after_a_query(cases: list[dict], caplog) -> list[str]:
    network = Bright()
    support = SupportBank(cases, lambda item: item, {1: "square"}, progress=False)
    settings = InferenceSettings(SupportSampler(k=2), object_gate=False, region_below=0.0)
    segmenter = CaseSegmenter(network, SupportSetInferer(support, settings))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            segmenter.segment({**case(99), "label": "not read"})
    assert network.encoded == len(cases) + len(cases) + 2, "nothing is looked at again for it"
    assert [message for message in caplog.messages if "labels of other" in message] == support.warnings
    return support.warnings


def test_a_label_of_another_image_is_told_once(caplog):
    cases = [*(case(number, place=number % 3) for number in range(5)), case(5, place=0, labelled=5)]
    [sentence] = warnings_after_a_query(cases, caplog)
    assert sentence.startswith("case5: what the labels of other patients find of square in it is somewhere else")
    assert "Dice 0.00" in sentence and "see whether the label is of this image" in sentence


@pytest.mark.parametrize("odd", [case(5), case(5, labelled=1), case(5, 6, 0, side=5)])
def test_a_label_that_overlaps_a_little_or_is_of_another_size_is_not(caplog, odd):
    assert warnings_after_a_query([*(case(number) for number in range(5)), odd], caplog) == []


def test_a_label_on_edges_is_of_its_image_though_something_else_is_found(caplog):
    odd = case(5)
    odd["image"][..., 4:6, 4:6] = odd["image_full"][..., 4:6, 4:6] = 0.45
    odd["label"][:], odd["label"][:, 4:6, 4:6] = 0, 1
    assert warnings_after_a_query([*(case(number) for number in range(5)), odd], caplog) == []


def test_of_few_cases_none_is_told(caplog):
    assert warnings_after_a_query([*(case(number) for number in range(3)), case(5, labelled=5)], caplog) == []


def test_after_labels_are_taken_away_those_that_are_left_are_looked_at():
    network = Bright()
    cases = [*(case(number, place=number % 3) for number in range(5)), case(5, place=0, labelled=5)]
    support = SupportBank(cases, lambda item: item, {1: "square"}, progress=False)
    inferer = SupportSetInferer(support, InferenceSettings(SupportSampler(k=2), object_gate=False, region_below=0.0))
    support.encode(network, torch.device("cpu"))
    inferer.least_signs(network)
    support.reconcile(cases)
    assert len(support.warnings) == 1, "nothing has changed, so it stays"
    # Too few patients are left for anything to be judged.
    support.reconcile(cases[:2])
    support.encode(network, torch.device("cpu"))
    assert inferer.least_signs(network).tolist() == [-torch.inf] and support.warnings == []
