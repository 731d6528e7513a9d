"""The embedded network does what its support set asks for.

In every phantom several structures are present and any of them may be the target, so only the support pairs tell which.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from sam2sgp.data import load_datalist
from sam2sgp.data.phantom import CLASS_NAMES, make_phantoms
from sam2sgp.inferers import InferenceSettings, SupportSetInferer
from sam2sgp.networks import SAM2SGP, load_weights
from sam2sgp.support import SupportBank, SupportSampler
from sam2sgp.support.encodings import Encodings
from sam2sgp.transforms import FitToSquared, LoadCased, ScaleIntensityByModalityd
from tests.helpers.bundle_runs import BUNDLE

pytestmark = pytest.mark.slow

K = 8
LOOKS = ("ct", "mr", "us", "rgb")


def prepare(case: dict) -> dict:
    for step in (LoadCased(), ScaleIntensityByModalityd(), FitToSquared(size=128)):
        case = step(case)
    return case


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_phantoms(tmp_path_factory.mktemp("tasks") / "set", patients_per_modality=12, progress=False)


@pytest.fixture(scope="module")
def network():
    net = SAM2SGP("lite", 128).eval()
    load_weights(net, BUNDLE / "models" / "model.pt")
    return net


class Task:
    """Slices of unseen phantoms of one look that hold all classes, and support pairs of training phantoms."""

    def __init__(self, folder, look: str) -> None:
        test = [prepare(case) for case in load_datalist(folder, "test") if case["group"] == look]
        self.images = torch.cat([case["image"] for case in test])
        self.labels = torch.cat([case["label"] for case in test])
        complete = torch.stack([(self.labels == value).flatten(1).sum(1) > 60 for value in CLASS_NAMES]).all(0)
        self.images, self.labels = self.images[complete][:4], self.labels[complete][:4]
        training = [case for case in load_datalist(folder, "train") if case["group"] == look]
        self.bank = SupportBank(training[:4], prepare, progress=False)
        self.plain: torch.Tensor | None = None

    def predict(self, net) -> torch.Tensor:
        """Foreground (Z, C, S, S) of every class, computed once."""
        if self.plain is None:
            self.plain = SupportSetInferer(self.bank, InferenceSettings(SupportSampler(k=K)))(self.images, net) > 0
        return self.plain

    @contextmanager
    def told(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator["Task"]:
        """The same with other masks (B, C, S, S) than the items' own."""
        other, masks = copy(self), Encodings.masks
        other.plain = None
        other.bank.forget()
        Encodings.masks = lambda encodings, items: change(masks(encodings, items))
        try:
            yield other
        finally:
            Encodings.masks = masks
            self.bank.forget()

    def truth(self) -> torch.Tensor:
        return torch.stack([self.labels == value for value in self.bank.class_values], 1)


def dice(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.flatten(2).float(), b.flatten(2).float()
    return float((2 * (a * b).sum(2) / (a.sum(2) + b.sum(2)).clamp(min=1)).mean())


@pytest.fixture(scope="module")
def tasks(folder) -> list[Task]:
    return [Task(folder, look) for look in LOOKS]


def test_unseen_phantoms_are_segmented(network, tasks):
    scores = [dice(task.predict(network), task.truth()) for task in tasks]
    assert all(len(task.images) == 4 for task in tasks)
    assert np.mean(scores) >= 0.80, dict(zip(LOOKS, scores, strict=True))


def test_another_support_set_makes_the_same_query_yield_another_target(network, tasks):
    """The prediction fits the structure that its own support set shows, and no other in the same image."""
    for task in tasks:
        predicted, truth = task.predict(network), task.truth()
        classes = truth.shape[1]
        table = np.array([[dice(predicted[:, [p]], truth[:, [t]]) for t in range(classes)] for p in range(classes)])
        own, other = table.diagonal(), table[~np.eye(classes, dtype=bool)]
        assert own.min() > 0.5 and other.max() < 0.25, table


def test_inverted_support_masks_invert_the_prediction(network, tasks):
    for task in (tasks[0], tasks[-1]):
        plain = task.predict(network)
        with task.told(lambda masks: 1 - masks) as other:
            inverted = other.predict(network)
        flipped = (plain != inverted).float().mean()
        complement = dice(~inverted, task.truth())
        assert flipped > 0.8 and complement > 0.5, (float(flipped), complement)


def test_a_network_that_can_not_read_its_support_fails(network, tasks):
    """Masks of other classes, upside down, in place of each item's own: what is left is guessing."""
    task = tasks[-1]
    good = dice(task.predict(network), task.truth())
    with task.told(lambda masks: masks.roll(1, 1).flip(-2)) as other:
        bad = dice(other.predict(network), task.truth())
    assert bad < good - 0.3, (good, bad)


@torch.no_grad()
def test_both_decoders_have_a_say_beside_the_prior(network, tasks):
    """Decoders that fall silent early in training leave only the prior, which looks like success for a while."""
    said = {}
    for name in ("pmg_decoder", "pma_decoder"):
        getattr(network, name).register_forward_hook(lambda _, __, out, name=name: said.update({name: out[0].std()}))
    SupportSetInferer(tasks[-1].bank, InferenceSettings(SupportSampler(k=K)))(tasks[-1].images[:2], network)
    assert said["pmg_decoder"] > 0.5 and said["pma_decoder"] > 0.03, said


@pytest.mark.parametrize("switch", ["box", "attention"])
def test_box_and_attention_change_the_trained_networks_result(network, tasks, switch):
    task = tasks[0]
    on = SupportSetInferer(task.bank, InferenceSettings(SupportSampler(k=K)))(task.images[:4], network)
    strength = network.pma_decoder.strength.detach().clone()
    try:
        if switch == "box":
            network.uses_box = False
        else:
            network.pma_decoder.strength.data.zero_()
        off = SupportSetInferer(task.bank, InferenceSettings(SupportSampler(k=K)))(task.images[:4], network)
    finally:
        network.uses_box = True
        network.pma_decoder.strength.data.copy_(strength)
    assert (on - off).abs().max() > 1e-4


@torch.no_grad()
def test_blanking_the_pseudo_mask_changes_the_trained_networks_correction(network, tasks):
    features = network.encode(tasks[-1].images[:2])
    conditioned = features.embedding
    dense = torch.zeros_like(conditioned)
    truth = tasks[-1].truth()[:2, :1].float()
    pseudo = interpolate(truth, size=4 * conditioned.shape[-1]) * 10 - 5
    blank = torch.full_like(pseudo, -5.0)
    corrections = [
        network.guide(conditioned, dense, features.high_res, p, network.box(p))[0] - p for p in (pseudo, blank)
    ]
    assert (corrections[0] - corrections[1]).abs().max() > 0.1
