"""3D memory: where it starts, which way it goes, what it carries, and what it costs."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sam2sgp.errors import ConfigError
from sam2sgp.inferers import InferenceSettings, SupportSetInferer, VolumeMemory
from sam2sgp.inferers import volume as volume_module
from sam2sgp.networks import SAM2SGP, ImageFeatures, SGPOutput, SupportMemory
from sam2sgp.support import SupportBank, SupportSampler
from tests.helpers.stubs import SIZE, StubNetwork

# What the stub below needs to see an object by itself, and with a neighbour that shows it.
CLEAR, FAINT = 0.8, 0.3


class Stub(StubNetwork):
    """Finds a class where its channel is clear, or faint while a neighbouring slice has it there. Counts its encodings.

    Its features are the image; the memory of a mask is the mask.
    """

    def __init__(self) -> None:
        super().__init__()
        self.distances: list[list[int]] = []

    def segment(self, features: ImageFeatures, support: SupportMemory) -> SGPOutput:
        self.most = max(self.most, len(features))
        batch, classes = support.tokens.shape[:2]
        near = torch.zeros(batch, classes, SIZE, SIZE)
        if support.distance is not None:
            frames = support.distance > 0
            self.distances.append(support.distance[0, 0][frames[0, 0]].tolist())
            tokens = support.tokens * frames[..., None, None]
            near = tokens.amax(2).reshape(batch, classes, SIZE, SIZE)
        # A support item of class c has it in row c + 1, see `support`; the class is looked for in channel c.
        rows = support.tokens[0, :, 0, 0].unflatten(-1, (SIZE, SIZE)).any(-1)
        image = features.embedding[:, rows.int().argmax(1) - 1]
        found = (image > CLEAR) | ((image > FAINT) & (near > 0))
        logits = found.float() * 10 - 3
        rest = torch.zeros(batch, classes)
        return SGPOutput(logits, logits, torch.zeros(batch, classes, 4), rest, rest)


def support(classes: int = 1, slices: tuple[int, ...] = (1, 1, 1)) -> SupportBank:
    """A bank of cases of so many slices, class c in row c."""

    def case(number: int) -> dict:
        label = torch.zeros(slices[number], SIZE, SIZE, dtype=torch.long)
        for value in range(1, classes + 1):
            label[:, value] = value
        image = torch.rand(slices[number], 3, SIZE, SIZE)
        return {
            "name": f"case{number}",
            "image": image,
            "image_full": image,
            "label": label,
            "label_full": label,
            "geometry": SimpleNamespace(spacing=None, slice_axis=2),
            "patient": f"p{number}",
            "group": "a",
        }

    return SupportBank([case(number) for number in range(len(slices))], lambda item: item, progress=False)


def volume(strength: list[float], channel: int = 0) -> Tensor:
    """(Z, 3, S, S): a block whose brightness changes from slice to slice."""
    images = torch.zeros(len(strength), 3, SIZE, SIZE)
    for index, value in enumerate(strength):
        images[index, channel, 2:6, 2:6] = value
    return images


def found(images: Tensor, network: Stub, memory: VolumeMemory | None = None, classes: int = 1) -> Tensor:
    """Which slices (Z, C) show each class."""
    inferer = SupportSetInferer(support(classes), InferenceSettings(SupportSampler(k=2), volume_memory=memory))
    chunks = list(inferer.chunks(images, network, volume=True))
    assert [chunk.start for chunk in chunks] == [8 * number for number in range(len(chunks))]
    assert sum(len(chunk.retrieved[0].index) for chunk in chunks) == len(images)
    return (torch.cat([chunk.output.logits for chunk in chunks]) > 0).flatten(2).any(2)


FAINT_AT_BOTH_ENDS = [0, 0, 0.5, 0.5, 0.5, 0.5, 0.9, 0.9, 0.5, 0.5, 0.5, 0, 0]


def test_it_goes_both_ways_from_where_the_support_explains_the_volume():
    images = volume(FAINT_AT_BOTH_ENDS)
    alone = found(images, Stub())[:, 0]
    assert alone.tolist() == [value > CLEAR for value in FAINT_AT_BOTH_ENDS]
    both = found(images, Stub(), VolumeMemory())[:, 0]
    assert both.tolist() == [value > 0 for value in FAINT_AT_BOTH_ENDS]


def test_a_slice_is_the_mean_of_what_it_is_alone_and_with_memory():
    inferer = SupportSetInferer(support(), InferenceSettings(SupportSampler(k=2), volume_memory=VolumeMemory()))
    logits = inferer(volume([0.5, 0.9, 0]), Stub(), volume=True)[:, 0, 3, 3]
    assert logits.tolist() == [(-3 + 7) / 2, 7, -3]


def test_forward_from_the_first_slice_alone_would_miss_what_lies_before(monkeypatch):
    sweep = volume_module._Window.sweep

    def forward_only(self, up, trails):
        return sweep(self, up, trails) if up else {}

    monkeypatch.setattr(volume_module._Window, "_explained_best", lambda *rest: [])
    monkeypatch.setattr(volume_module._Window, "sweep", forward_only)
    forward = found(volume(FAINT_AT_BOTH_ENDS), Stub(), VolumeMemory())[:, 0]
    assert forward.tolist() == [False] * 6 + [True] * 5 + [False] * 2


def test_each_extent_of_a_class_has_its_own_start():
    strength = [0.5, 0.9, 0.5, 0, 0, 0, 0, 0.5, 0.5, 0.9, 0.5, 0]
    assert found(volume(strength), Stub(), VolumeMemory())[:, 0].tolist() == [value > 0 for value in strength]


def test_classes_start_at_slices_of_their_own():
    first, second = [0.5, 0.9, 0.5, 0.5, 0.5, 0, 0, 0], [0, 0, 0.5, 0.5, 0.5, 0.5, 0.9, 0.5]
    images = volume(first)
    images[:, 1] = 0
    for index, value in enumerate(second):
        images[index, 1, :2, :2] = value
    seen = found(images, Stub(), VolumeMemory(), classes=2)
    assert seen[:, 0].tolist() == [value > 0 for value in first]
    assert seen[:, 1].tolist() == [value > 0 for value in second]


def test_nothing_grows_past_the_end_of_an_object():
    strength = [0, 0, 0, 0.9, 0.9, 0, 0.5, 0.5]
    assert found(volume(strength), Stub(), VolumeMemory(1))[:, 0].tolist() == [value > CLEAR for value in strength]


def test_each_slice_is_encoded_once_and_few_are_held(monkeypatch):
    monkeypatch.setattr(volume_module, "MAX_WINDOW", 16)
    for count in (40, 200):
        network = Stub()
        found(volume([0.9] * count), network, VolumeMemory())
        assert network.encoded == count + 3 and network.most <= 16


def test_fewer_slices_are_held_where_there_is_more_to_hold_of_each():
    features = Stub().encode(volume([0.9]))
    held = [VolumeMemory.window(features, classes, size) for classes, size in ((1, 128), (3, 512), (200, 1024))]
    assert held == [volume_module.MAX_WINDOW, 21, volume_module.MIN_WINDOW]


def test_what_was_found_is_carried_into_the_next_window(monkeypatch):
    monkeypatch.setattr(volume_module, "MAX_WINDOW", 8)
    strength = [0, 0, 0, 0.9, 0.9, 0.5, 0.5, 0.5] + [0.5] * 6 + [0, 0]
    assert found(volume(strength), Stub(), VolumeMemory())[:, 0].tolist() == [value > 0 for value in strength]


@pytest.mark.parametrize("frames", [1, 3])
def test_the_last_slices_on_the_way_are_the_memory(frames):
    network = Stub()
    found(volume([0.9] * 9), network, VolumeMemory(frames))
    seen = [sorted(distances) for distances in network.distances]
    assert max(map(len, seen)) == frames
    assert all(distances == list(range(1, len(distances) + 1)) for distances in seen)


def test_without_3d_memory_or_for_single_pictures_nothing_guides_a_slice():
    network = Stub()
    found(volume(FAINT_AT_BOTH_ENDS), network)
    assert network.distances == []
    inferer = SupportSetInferer(support(), InferenceSettings(SupportSampler(k=2), volume_memory=VolumeMemory()))
    pictures = inferer(volume(FAINT_AT_BOTH_ENDS), network)
    assert network.distances == [] and (pictures > 0).flatten(1).any(1).sum() == 2


def test_pictures_and_volumes_guide_a_volume_together():
    bank = support(slices=(1, 6))
    inferer = SupportSetInferer(bank, InferenceSettings(SupportSampler(k=6), volume_memory=VolumeMemory()))
    chunks = list(inferer.chunks(volume(FAINT_AT_BOTH_ENDS), Stub(), volume=True))
    used = {bank.items[item].id for chunk in chunks for item in chunk.retrieved[0].index.flatten().tolist()}
    assert "case0" in used and {name.split("#")[0] for name in used} == {"case0", "case1"}
    seen = (torch.cat([chunk.output.logits for chunk in chunks]) > 0).flatten(1).any(1)
    assert seen.tolist() == [value > 0 for value in FAINT_AT_BOTH_ENDS]


@pytest.mark.parametrize("frames", [0, True, 1.5, "2"])
def test_a_number_of_frames_that_can_not_be_is_refused(frames):
    with pytest.raises(ConfigError, match="memory_frames"):
        VolumeMemory(frames)


@pytest.fixture(scope="module")
def network() -> SAM2SGP:
    torch.manual_seed(0)
    return SAM2SGP("nano", 64).eval()


def test_the_distance_of_a_slice_is_its_temporal_encoding(network):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, 3, 64, 64, generator=generator)
    masks = (torch.rand(3, 1, 64, 64, generator=generator) > 0.5).float()
    with torch.no_grad():
        network.frame_tpos.copy_(torch.randn(network.frame_tpos.shape, generator=generator))
        features = network.encode(image)
        pool = network.encode_support(features, masks)
        near, far = (pool.select(torch.tensor([[[number]]])) for number in (0, 1))
        query = features[torch.tensor([2])]

        def logits(distance: int | None) -> Tensor:
            far.distance = None if distance is None else torch.full((1, 1, 1), distance)
            return network.segment(query, near.beside(far)).logits

        as_support = network.segment(query, pool.select(torch.tensor([[[0, 1]]]))).logits
        torch.testing.assert_close(logits(None), as_support)
        torch.testing.assert_close(logits(0), as_support)
        assert (logits(1) - as_support).abs().max() > 1e-4
        assert (logits(2) - logits(1)).abs().max() > 1e-4
        torch.testing.assert_close(logits(60), logits(6))
