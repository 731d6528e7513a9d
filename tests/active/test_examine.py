"""Scores of an image: each part of the uncertainty answers to its own cause."""

from types import SimpleNamespace

import pytest
import torch

from sam2sgp.active import embed, examine
from sam2sgp.inferers import InferenceSettings, SupportSetInferer, VolumeMemory
from sam2sgp.networks import SAM2SGP, SGPOutput
from sam2sgp.support import ItemRules, SupportBank, SupportSampler
from tests.helpers.stubs import SIZE, StubNetwork


def case(number: int, rows: int = 4) -> dict:
    """An image whose mask is its first rows."""
    label = torch.zeros(1, SIZE, SIZE, dtype=torch.long)
    label[:, :rows] = 1
    image = torch.full((1, 1, SIZE, SIZE), number / 10)
    own = {"name": f"case{number}", "patient": f"p{number}", "group": "", "label": label, "label_full": label}
    return {**own, "image": image, "image_full": image, "geometry": SimpleNamespace(spacing=None, slice_axis=2)}


class Copying(StubNetwork):
    """Final masks are the mean of the support masks, at the given logit; pseudo-masks are those, shifted down."""

    def __init__(self, logit: float = 20.0, shift: int = 0) -> None:
        super().__init__()
        self.logit, self.shift = logit, shift

    def segment(self, features, support) -> SGPOutput:
        masks = support.tokens.mean((2, 3)).unflatten(2, (SIZE, SIZE))
        logits = self.logit * (2 * masks - 1)
        batch, classes = logits.shape[:2]
        pseudo = logits.roll(self.shift, 2)
        ones = torch.ones(batch, classes)
        return SGPOutput(logits, pseudo, torch.zeros(batch, classes, 4), ones, ones)


def inferer(cases: list[dict], k: int = 4, **settings) -> SupportSetInferer:
    bank = SupportBank(cases, lambda item: item, {1: "top"}, rules=ItemRules(allow_empty=True), progress=False)
    return SupportSetInferer(bank, InferenceSettings(SupportSampler(k=k), **settings))


ALIKE = [case(number) for number in range(4)]
UNLIKE = [case(number, rows=2 if number % 2 else 6) for number in range(4)]


def query(slices: int = 1) -> dict:
    return {"image": torch.linspace(0, 1, slices)[:, None, None, None].expand(-1, 1, SIZE, SIZE), "patient": None}


def test_a_certain_segmentation_has_no_uncertainty():
    score = examine(inferer(ALIKE), Copying(), query())
    assert score.parts == pytest.approx({"pseudo": 0.0, "entropy": 0.0, "support": 0.0}, abs=1e-4)
    assert score.uncertainty == pytest.approx(0.0, abs=1e-4)


def test_a_pseudo_mask_elsewhere_is_disagreement():
    """Rows 0..3 against rows 1..4: one minus a Dice of 3/4."""
    score = examine(inferer(ALIKE), Copying(shift=1), query())
    assert score.parts == pytest.approx({"pseudo": 0.25, "entropy": 0.0, "support": 0.0}, abs=1e-4)
    assert score.uncertainty == pytest.approx(0.25 / 3, abs=1e-4)


def test_doubtful_pixels_are_entropy():
    p = torch.tensor(1.0).sigmoid()
    score = examine(inferer(ALIKE), Copying(logit=1.0), query())
    bits = float(-(p * p.log2() + (1 - p) * (1 - p).log2()))
    assert score.parts["entropy"] == pytest.approx(bits, abs=1e-4)
    assert score.parts["support"] == pytest.approx(0.0, abs=1e-6)


def test_halves_of_the_support_set_that_disagree_are_uncertainty():
    """All similarities are equal, so items are dealt out in order: 6 rows to one half, 2 to the other."""
    score = examine(inferer(UNLIKE), Copying(), query())
    assert score.parts["support"] == pytest.approx(1 - 2 * 2 / 8, abs=1e-4)
    assert examine(inferer(UNLIKE, k=1), Copying(), query()).parts.keys() == {"pseudo", "entropy"}


def test_each_image_is_encoded_once():
    network = Copying()
    guided = inferer(ALIKE, batch_size=2)
    examine(guided, network, query())
    network.encoded = 0
    examine(guided, network, query(5))
    assert network.encoded == 5


def test_of_a_long_volume_a_few_slices_are_looked_at():
    network = Copying()
    guided = inferer(ALIKE, volume_memory=VolumeMemory())
    examine(guided, network, query())
    network.encoded = 0
    examine(guided, network, query(1000), max_slices=3)
    assert network.encoded == 3


def test_nothing_found_is_undecided():
    class Empty(Copying):
        def segment(self, features, support) -> SGPOutput:
            return super().segment(features, SimpleNamespace(tokens=torch.zeros_like(support.tokens)))

    score = examine(inferer(ALIKE), Empty(), query())
    assert (score.uncertainty, score.parts) == (0.5, {})


def test_without_a_support_set_there_is_an_embedding_alone():
    network = Copying()
    score = examine(inferer([]), network, query())
    assert score.uncertainty is None and score.parts == {}
    torch.testing.assert_close(score.embedding, torch.ones(1))


def test_the_embedding_depends_on_image_and_network_alone():
    torch.manual_seed(0)
    network = SAM2SGP("nano", 64).eval()
    image = torch.rand(3, 1, 64, 64)

    def prepared(number: int) -> dict:
        label = torch.zeros(1, 64, 64, dtype=torch.long)
        label[:, 8:40, 8 : 20 + 8 * number] = 1
        picture = torch.rand(1, 1, 64, 64)
        return {**case(number), "image": picture, "image_full": picture, "label": label, "label_full": label}

    scores = [examine(inferer([prepared(n) for n in numbers]), network, {"image": image}) for numbers in ((1, 2), (3,))]
    for score in scores:
        torch.testing.assert_close(score.embedding, embed(network, image))
        assert float(score.embedding.norm()) == pytest.approx(1.0, abs=1e-5)
        assert 0 <= score.uncertainty <= 1
    assert scores[0].uncertainty != scores[1].uncertainty
