"""Where there is less sign of a class than in any support image, the result says so."""

from types import SimpleNamespace

import pytest
import torch

from sam2sgp.inferers import CaseSegmenter, InferenceSettings, SupportSetInferer
from sam2sgp.inferers.signs import MARGIN, MAX_JUDGED
from sam2sgp.networks import ImageFeatures, SGPOutput, SupportMemory
from sam2sgp.support import SupportBank, SupportSampler
from sam2sgp.transforms import Letterbox
from tests.helpers.stubs import SIZE, StubNetwork

NOTHING = -torch.inf


class Scoring(StubNetwork):
    """Finds every class in an image that is not black; the object score is ten times the brightness."""

    def segment(self, features: ImageFeatures, support: SupportMemory) -> SGPOutput:
        batch, classes = support.tokens.shape[:2]
        brightness = features.embedding.mean((1, 2, 3))[:, None].expand(-1, classes)
        logits = torch.full((batch, classes, SIZE, SIZE), -5.0)
        for column in range(classes):
            logits[:, column, 2 * column : 2 * column + 2] = torch.where(brightness[:1, :1] > 0, 5.0, -5.0)
        return SGPOutput(logits, logits, torch.zeros(batch, classes, 4), torch.ones(batch, classes), 10 * brightness)


def case(number: int, brightness: float, values: tuple[int, ...] = (1,), patient: str = "", group: str = "a") -> dict:
    """A picture of one brightness, labelled with the given classes."""
    image, label = torch.full((1, 3, SIZE, SIZE), brightness), torch.zeros(1, SIZE, SIZE, dtype=torch.long)
    for value in values:
        label[:, 2 * value : 2 * value + 2] = value
    pixels = {"image": image, "image_full": image, "label": label, "label_full": label}
    own = {"name": f"case{number}", "source": f"case{number}", "patient": patient or f"p{number}", "group": group}
    return {
        **own,
        **pixels,
        "geometry": SimpleNamespace(spacing=None, slice_axis=2),
        "letterbox": Letterbox.of((SIZE, SIZE), SIZE),
    }


def inferer_of(cases: list[dict], network: Scoring) -> SupportSetInferer:
    support = SupportBank(cases, lambda item: item, progress=False)
    support.encode(network, torch.device("cpu"))
    return SupportSetInferer(support, InferenceSettings(SupportSampler(k=2), object_gate=False, region_below=0.0))


def test_pictures_with_an_empty_label_take_no_place_among_those_that_tell_the_signs():
    network = Scoring()
    labelled = [case(number, 0.7 + 0.1 * number) for number in range(3)]
    empty = [case(number, 0.2, ()) for number in range(3, 40)]
    assert inferer_of(labelled + empty, network).least_signs(network).tolist() == pytest.approx([7 - MARGIN], abs=0.01)


def test_an_image_with_less_sign_than_every_support_image_is_marked():
    network = Scoring()
    inferer = inferer_of([case(number, 0.7 + 0.1 * number) for number in range(3)], network)
    assert inferer.least_signs(network).tolist() == pytest.approx([7.0 - MARGIN], abs=0.01)
    segmenter = CaseSegmenter(network, inferer)
    for brightness, marked in ((0.62, [1]), (0.63, []), (1.0, []), (0.0, [])):
        query = {**case(9, brightness), "label": "not read"}
        result = segmenter.segment(query)
        assert (result.pred == 1).any() == (brightness > 0)
        assert result.maybe_absent == marked, brightness


def test_a_volume_is_marked_by_its_clearest_slice():
    network = Scoring()
    segmenter = CaseSegmenter(network, inferer_of([case(number, 0.8) for number in range(3)], network))
    for brightness, marked in (([0.2, 0.3, 0.5], [1]), ([0.2, 0.8, 0.3], [])):
        image = torch.tensor(brightness)[:, None, None, None].expand(-1, 3, SIZE, SIZE).contiguous()
        result = segmenter.segment({**case(9, 0.0), "image": image, "image_full": image, "label": "not read"})
        assert result.maybe_absent == marked


def test_fewer_than_three_patients_teach_nothing():
    network = Scoring()
    two = [case(0, 0.9), case(1, 0.9), case(2, 0.9, patient="p1")]
    assert inferer_of(two, network).least_signs(network).tolist() == [NOTHING]
    rare = [case(0, 0.9, (1, 2)), case(1, 0.9, (1, 2)), case(2, 0.8)]
    assert inferer_of(rare, network).least_signs(network).tolist() == pytest.approx([8.0 - MARGIN, NOTHING], abs=0.01)


def test_of_many_patients_eight_are_segmented_and_none_of_them_again():
    network = Scoring()
    cases = [case(number, 0.9 + 0.002 * number) for number in range(MAX_JUDGED + 12)]
    inferer = inferer_of(cases, network)
    for expected in (MAX_JUDGED, 0):
        before = network.encoded
        inferer.least_signs(network)
        assert network.encoded - before == expected


def test_what_is_learned_follows_the_support_set_and_the_network():
    network = Scoring()
    cases = [case(number, 0.9 + 0.002 * number) for number in range(3)]
    inferer = inferer_of(cases, network)
    assert inferer.least_signs(network).tolist() == pytest.approx([9.0 - MARGIN], abs=0.01)
    inferer.bank.reconcile([*cases, case(3, 0.5)])
    inferer.bank.encode(network, torch.device("cpu"))
    before = network.encoded
    assert inferer.least_signs(network).tolist() == pytest.approx([5.0 - MARGIN], abs=0.01)
    # The others are guided as before.
    assert network.encoded - before == 1
    inferer.reset()
    inferer.encode(network)
    before = network.encoded
    inferer.least_signs(network)
    assert network.encoded - before == 4


def test_each_group_has_its_own():
    network = Scoring()
    cases = [case(number, 0.9) for number in range(3)] + [case(3 + number, 0.4, group="b") for number in range(3)]
    inferer = inferer_of(cases, network)
    found = {group: inferer.least_signs(network, group).item() for group in ("a", "b", None, "unknown")}
    low, high = 4.0 - MARGIN, 9.0 - MARGIN
    assert found == pytest.approx({"a": high, "b": low, None: low, "unknown": low}, abs=0.01)
