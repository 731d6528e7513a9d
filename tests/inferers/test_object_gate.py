"""Whether a class is in an image at all, by the evidence for it and what the support set teaches about that."""

import math
from types import SimpleNamespace

import pytest
import torch

from sam2sgp.inferers import InferenceSettings, SupportSetInferer, VolumeMemory
from sam2sgp.inferers.object_gate import MAX_JUDGED, among_neighbours, evidence_of, gate_threshold, learn
from sam2sgp.inferers.volume import MAX_WINDOW
from sam2sgp.networks import ImageFeatures, SGPOutput, SupportMemory
from sam2sgp.support import SupportBank, SupportSampler
from tests.helpers.stubs import SIZE, StubNetwork


class Eager(StubNetwork):
    """Finds the class in every image; its predicted IoU rises with the brightness. Counts what it segments."""

    def segment(self, features: ImageFeatures, support: SupportMemory) -> SGPOutput:
        self.most = max(self.most, len(features))
        batch, classes = support.tokens.shape[:2]
        logits = torch.full((batch, classes, SIZE, SIZE), -5.0)
        logits[:, :, 2:6, 2:6] = 5.0
        iou = 0.1 + 0.8 * features.embedding.mean((1, 2, 3))[:, None].expand(-1, classes)
        return SGPOutput(logits, logits, torch.zeros(batch, classes, 4), iou, torch.full((batch, classes), 3.0))


def case(number: int, slices: int, present: range) -> dict:
    """A volume, or a picture, that is bright, and labelled, on some slices."""
    image, label = torch.zeros(slices, 3, SIZE, SIZE), torch.zeros(slices, SIZE, SIZE, dtype=torch.long)
    image[present.start : present.stop] = 1 - 0.001 * number
    label[present.start : present.stop, 2:6, 2:6] = 1
    pixels = {"image": image, "image_full": image, "label": label, "label_full": label}
    own = {"name": f"case{number}", "patient": f"p{number}", "group": "a"}
    return {**own, **pixels, "geometry": SimpleNamespace(spacing=None, slice_axis=2)}


def bank(patients: int, slices: int, present: range) -> SupportBank:
    """A bank of such volumes."""
    cases = [case(number, slices, present) for number in range(patients)]
    return SupportBank(cases, lambda item: item, progress=False)


def pictures(labelled: int, empty: int) -> SupportBank:
    """A bank of bright pictures with the class and dark ones without."""
    cases = [case(number, 1, range(1 if number < labelled else 0)) for number in range(labelled + empty)]
    return SupportBank(cases, lambda item: item, progress=False)


def shown(support: SupportBank, bright: list[bool] | list[float], volume: bool = True, **settings) -> list[bool]:
    """On which slices of a volume of that brightness the class is found."""
    images = torch.tensor(bright, dtype=torch.float32)[:, None, None, None].expand(-1, 3, SIZE, SIZE)
    inferer = SupportSetInferer(support, InferenceSettings(SupportSampler(k=2), **settings))
    chunks = inferer.chunks(images, Eager(), volume=volume)
    return (torch.cat([chunk.output.logits for chunk in chunks]) > 0).flatten(1).any(1).tolist()


def test_evidence_rises_with_size_certainty_iou_and_object_score():
    logits = torch.full((4, 1, SIZE, SIZE), -5.0)
    logits[:, :, :4, :4] = 50.0
    logits[1, :, :2] = -5.0
    iou, score = torch.tensor([[0.8], [0.8], [0.4], [0.8]]), torch.tensor([[2.0], [2.0], [2.0], [0.0]])
    found = evidence_of(SGPOutput(logits, logits, torch.zeros(4, 1, 4), iou, score))[:, 0]
    # A quarter of the image is found, then half of that; half the IoU; odds that are lower by exp(2).
    expected = 0.8 * 0.5 * math.e * torch.tensor([1.0, 0.5**0.5, 0.5, 1 / math.e])
    assert torch.allclose(found, expected)


def test_evidence_is_a_number_whatever_the_object_score():
    logits = torch.full((4, 1, SIZE, SIZE), -5.0)
    logits[1:, :, :4, :4] = 50.0
    score = torch.tensor([[1e4], [1e4], [-1e4], [-torch.inf]])
    found = evidence_of(SGPOutput(logits, logits, torch.zeros(4, 1, 4), torch.ones(4, 1), score))[:, 0]
    assert found[[0, 2, 3]].tolist() == [0.0] * 3 and 1e6 < found[1] < torch.inf


BRIGHT = [False] * 4 + [True] * 5 + [False] * 11


@pytest.mark.parametrize("memory", [None, VolumeMemory()])
def test_slices_without_the_class_stay_empty_by_what_the_support_set_teaches(memory):
    support = bank(3, 12, range(3, 7))
    assert shown(support, BRIGHT, volume_memory=memory) == BRIGHT
    assert all(shown(support, BRIGHT, volume_memory=memory, object_gate=False))


def test_pictures_with_an_empty_label_teach_which_pictures_stay_empty():
    assert shown(pictures(6, 5), [0.9, 0.0], volume=False) == [True, False]
    assert shown(pictures(6, 5), [0.9, 0.0], volume=False, object_gate=False) == [True, True]
    # Too few of either kind say nothing, and none of those without guides.
    assert shown(pictures(6, 4), [0.9, 0.0], volume=False) == [True, True]
    assert shown(pictures(2, 9), [0.9, 0.0], volume=False) == [True, True]
    assert pictures(6, 4).holds.sum() == 6


def test_a_support_set_without_empty_slices_or_of_one_patient_teaches_nothing():
    assert all(shown(bank(3, 4, range(4)), BRIGHT))
    assert all(shown(bank(1, 40, range(3, 7)), BRIGHT))


def test_a_faint_volume_keeps_what_stands_out_in_it():
    support, faint = bank(3, 12, range(3, 7)), [0.45 * value for value in BRIGHT]
    # Its best slices have less evidence than would separate the support set's own.
    assert shown(support, faint, volume_memory=VolumeMemory()) == BRIGHT
    assert shown(support, [0.45, 0.0], volume=False) == [True, False]


def test_evidence_is_compared_with_the_most_in_the_volume_so_far():
    support, before, after = bank(3, 12, range(3, 7)), [0.45] * 70, [0.45] * 80
    found = shown(support, [*before, 1.0, 1.0, *after], volume_memory=VolumeMemory())
    first = MAX_WINDOW
    assert all(found[:first]) and found[first:] == [False] * (70 - first) + [True, True] + [False] * 80


def test_a_gap_of_one_slice_counts_as_its_neighbours():
    evidence = torch.tensor([[0.1, 0.9, 0.2, 0.8, 0.1, 0.1, 0.7]]).T
    assert among_neighbours(evidence).flatten().tolist() == pytest.approx([0.1, 0.9, 0.8, 0.8, 0.1, 0.1, 0.7])
    for count in (1, 2):
        assert torch.equal(among_neighbours(evidence[:count]), evidence[:count])


def test_slices_are_compared_within_their_volume_and_images_with_all():
    """A bright patient's slices beyond the object have as much evidence as a faint patient's slices of it."""
    evidence = torch.tensor([[0.8, 0.7, 0.2, 0.2, 0.2], [0.2, 0.15, 0.04, 0.04, 0.04], [0.3, 0.3, 0.3, 0.3, 0.3]])
    absent = torch.tensor([[False, False, True, True, True]] * 2 + [[True] * 5])
    size, pixels = 50 * ~absent, torch.full((3, 5), 50)
    volume = torch.arange(3)[:, None].expand(-1, 5)
    found = learn(*(values.flatten()[:, None] for values in (evidence, size, pixels)), volume.flatten())
    assert found.in_image.tolist() == [-torch.inf]
    assert found.in_volume.tolist() == pytest.approx([(0.25 + 0.75) / 2])
    one, most = torch.tensor([[0.1], [0.03], [0.0]]), torch.tensor([0.15])
    assert found.absent(one).flatten().tolist() == [False] * 3
    assert found.absent(one, most).flatten().tolist() == [False, True, True]


def test_the_ends_of_an_object_may_look_like_what_lies_beyond():
    """Of a volume's six slices with the class the two at its ends have a few pixels, and less evidence than beyond."""
    evidence = torch.tensor([0.1, 0.1, 0.7, 1.0, 0.9, 0.8, 0.3, 0.3, 0.3, 0.3, 0.3])
    size = torch.tensor([2, 2, 40, 50, 50, 40, 0, 0, 0, 0, 0])
    pixels = torch.full((11,), 30)
    assert gate_threshold(evidence, size, pixels) == -torch.inf
    assert gate_threshold(evidence, size, pixels, by_pixel=True) == pytest.approx((0.3 + 0.7) / 2)
    found = learn(evidence[:, None], size[:, None], pixels[:, None], torch.zeros(11, dtype=torch.long))
    assert found.in_image.item() == -torch.inf and found.in_volume.item() == pytest.approx(0.5)


def test_what_is_learned_follows_the_support_set():
    support = bank(3, 12, range(3, 7))
    inferer = SupportSetInferer(support, InferenceSettings(SupportSampler(k=2)))
    images, network = torch.zeros(2, 3, SIZE, SIZE), Eager()
    assert not (inferer(images, network) > 0).any()
    support.reconcile(support.data[:1])
    assert (inferer(images, network) > 0).flatten(1).any(1).all()


def test_of_many_cases_some_teach_as_much_as_all_do():
    network, device = Eager(), torch.device("cpu")
    thresholds = []
    for patients in (6, MAX_JUDGED + 16):
        support = bank(patients, 2, range(1))
        support.encode(network, device)
        thresholds.append(
            SupportSetInferer(support, InferenceSettings(SupportSampler(k=2)))
            .thresholds(network, device)
            .in_volume.item()
        )
    assert 0 < thresholds[0] == pytest.approx(thresholds[1], abs=0.01)


def test_items_that_are_guided_as_before_are_not_judged_again():
    support, network = bank(4, 12, range(3, 7)), Eager()
    cases = list(support.data)
    support.reconcile(cases[:3])
    inferer = SupportSetInferer(support, InferenceSettings(SupportSampler(k=2)))
    inferer(torch.zeros(1, 3, SIZE, SIZE), network)
    support.reconcile(cases)
    before = network.encoded
    again = inferer.thresholds(network, torch.device("cpu"))
    # The first two items of other patients guide each item, so the new patient's guide none but its own are new. These
    # are encoded for the bank, and as queries.
    assert network.encoded - before == 2 * len([item for item in support.items if item.patient == "p3"])
    fresh = SupportSetInferer(support, InferenceSettings(SupportSampler(k=2))).thresholds(network, torch.device("cpu"))
    assert torch.equal(again.in_image, fresh.in_image) and torch.equal(again.in_volume, fresh.in_volume)
    assert again.in_volume.isfinite().all()


def test_each_group_teaches_its_own_thresholds():
    support = bank(3, 12, range(3, 7))
    everywhere = [
        {**case, "name": f"b{case['name']}", "patient": f"b{case['patient']}", "group": "b"}
        for case in bank(3, 4, range(4)).data
    ]
    support.reconcile([*support.data, *everywhere])
    inferer, network, device = (
        SupportSetInferer(support, InferenceSettings(SupportSampler(k=2))),
        Eager(),
        torch.device("cpu"),
    )
    support.encode(network, device)
    found = {group: inferer.thresholds(network, device, group).in_volume.item() for group in ("a", "b", "unknown")}
    assert found["a"] == pytest.approx(found["unknown"]) and found["b"] == -torch.inf


def test_long_volumes_are_looked_at_in_batches():
    network = Eager()
    inferer = SupportSetInferer(
        bank(3, 12, range(3, 7)), InferenceSettings(SupportSampler(k=2), volume_memory=VolumeMemory())
    )
    list(inferer.chunks(torch.zeros(150, 3, SIZE, SIZE), network, volume=True))
    assert network.most <= 16


@pytest.mark.parametrize(
    ("absent", "present", "expected"),
    [
        ([1.0] * 12, [3.0] * 12, 2.0),
        ([1.0] * 4, [3.0] * 12, -torch.inf),
        ([1.0] * 12, [1.0] * 12, -torch.inf),
        ([3.0] * 12, [1.0] * 12, -torch.inf),
        # One image with the class is lost for twelve without it.
        ([1.0] * 12, [0.5] + [3.0] * 11, 2.0),
        ([1.0] * 12, [0.5] * 5 + [3.0] * 7, -torch.inf),
        # It pays here, but evidence hardly tells the two apart.
        ([1.0] * 15 + [3.0] * 5, [0.5] * 2 + [2.0] * 10, -torch.inf),
    ],
)
def test_a_threshold_is_kept_where_it_takes_away_more_than_it_costs(absent, present, expected):
    evidence = torch.tensor([*absent, *present])
    gone = torch.arange(len(evidence)) < len(absent)
    assert gate_threshold(evidence, 50 * ~gone, torch.full((len(evidence),), 50)) == expected


def test_items_that_taught_the_gate_are_not_segmented_again_for_the_least_signs():
    inferer, network = SupportSetInferer(bank(3, 12, range(3, 7)), InferenceSettings(SupportSampler(k=2))), Eager()
    inferer.encode(network)
    inferer.thresholds(network, torch.device("cpu"))
    before = network.encoded
    assert before >= 3 * 2 and inferer.least_signs(network).isfinite().all() and network.encoded == before


def test_learning_that_is_interrupted_goes_on_from_there():
    inferer, network = SupportSetInferer(bank(3, 12, range(3, 7)), InferenceSettings(SupportSampler(k=2))), Eager()
    inferer.encode(network)
    encoded, told = network.encoded, []

    def step(slices):
        told.append(slices)
        if len(told) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inferer.thresholds(network, torch.device("cpu"), step=step)
    assert network.encoded - encoded == 3
    found = inferer.thresholds(network, torch.device("cpu"), step=step)
    # Each item once, and progress isn't counted in slices.
    assert set(told) == {0} and network.encoded - encoded == len(told) - 1
    fresh = SupportSetInferer(inferer.bank, inferer.settings).thresholds(network, torch.device("cpu"))
    assert torch.equal(found.in_volume, fresh.in_volume)
