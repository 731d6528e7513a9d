"""Whether a class is in an image at all, by the object score and what the support set teaches about it."""

from types import SimpleNamespace

import pytest
import torch

from sam2sgp.inferers import SupportSetInferer, VolumeMemory
from sam2sgp.inferers.presence import presence_threshold
from sam2sgp.networks import ImageFeatures, SGPOutput, SupportMemory
from sam2sgp.support import SupportBank, SupportSampler
from tests.inferers.stubs import SIZE, StubNetwork


class Eager(StubNetwork):
    """Finds the class in every image; its object score is the brightness, far above 0. Counts what it segments."""

    def segment(self, features: ImageFeatures, support: SupportMemory) -> SGPOutput:
        self.most = max(self.most, len(features))
        batch, classes = support.tokens.shape[:2]
        logits = torch.full((batch, classes, SIZE, SIZE), -5.0)
        logits[:, :, 2:6, 2:6] = 5.0
        score = 3 + features.embedding.mean((1, 2, 3))[:, None].expand(-1, classes)
        return SGPOutput(logits, logits, torch.zeros(batch, classes, 4), torch.zeros(batch, classes), score)


def bank(patients: int, slices: int, present: range) -> SupportBank:
    """Volumes that are bright, and labelled, on some slices."""

    def case(number: int) -> dict:
        image, label = torch.zeros(slices, 3, SIZE, SIZE), torch.zeros(slices, SIZE, SIZE, dtype=torch.long)
        image[present.start : present.stop] = 1
        label[present.start : present.stop, 2:6, 2:6] = 1
        pixels = {"image": image, "image_full": image, "label": label, "label_full": label}
        own = {"name": f"case{number}", "patient": f"p{number}", "group": "a"}
        return {**own, **pixels, "geometry": SimpleNamespace(spacing=None)}

    return SupportBank([case(number) for number in range(patients)], lambda item: item, progress=False)


def shown(support: SupportBank, bright: list[bool], **settings) -> list[bool]:
    images = torch.zeros(len(bright), 3, SIZE, SIZE)
    images[torch.tensor(bright)] = 1
    inferer = SupportSetInferer(support, SupportSampler(k=2), **settings)
    chunks = inferer.chunks(images, Eager(), volume=True)
    return (torch.cat([chunk.output.logits for chunk in chunks]) > 0).flatten(1).any(1).tolist()


BRIGHT = [False] * 4 + [True] * 5 + [False] * 11


@pytest.mark.parametrize("memory", [None, VolumeMemory()])
def test_slices_without_the_class_stay_empty_by_what_the_support_set_teaches(memory):
    support = bank(3, 12, range(3, 7))
    assert shown(support, BRIGHT, volume_memory=memory) == BRIGHT
    assert all(shown(support, BRIGHT, volume_memory=memory, object_gate=False))


def test_a_support_set_without_empty_slices_or_of_one_patient_teaches_nothing():
    assert all(shown(bank(3, 4, range(4)), BRIGHT))
    assert all(shown(bank(1, 40, range(3, 7)), BRIGHT))


def test_what_is_learned_follows_the_support_set():
    support = bank(3, 12, range(3, 7))
    inferer = SupportSetInferer(support, SupportSampler(k=2))
    images, network = torch.zeros(2, 3, SIZE, SIZE), Eager()
    assert not (inferer(images, network) > 0).any()
    support.reconcile(support.data[:1])
    assert (inferer(images, network) > 0).flatten(1).any(1).all()


def test_long_volumes_are_looked_at_in_batches():
    network = Eager()
    inferer = SupportSetInferer(bank(3, 12, range(3, 7)), SupportSampler(k=2), volume_memory=VolumeMemory())
    list(inferer.chunks(torch.zeros(150, 3, SIZE, SIZE), network, volume=True))
    assert network.most <= 16


@pytest.mark.parametrize(
    ("absent", "present", "expected"),
    [
        ([1.0] * 12, [3.0] * 12, 2.0),
        ([1.0] * 9, [3.0] * 12, -torch.inf),
        ([1.0] * 12, [1.0] * 12, -torch.inf),
        ([3.0] * 12, [1.0] * 12, -torch.inf),
        # One image with the class is lost for twelve without it.
        ([1.0] * 12, [0.5] + [3.0] * 11, 2.0),
        ([1.0] * 12, [0.5] * 5 + [3.0] * 7, -torch.inf),
        # It pays here, but the score hardly tells the two apart.
        ([1.0] * 18 + [3.0] * 2, [0.5] * 2 + [2.0] * 10, -torch.inf),
    ],
)
def test_a_threshold_is_kept_where_it_takes_away_more_than_it_costs(absent, present, expected):
    score = torch.tensor([*absent, *present])
    gone = torch.arange(len(score)) < len(absent)
    pixels = torch.full((len(score),), 50)
    assert presence_threshold(score, pixels * ~gone, pixels * gone, gone) == expected
