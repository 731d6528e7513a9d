"""Training on cached features of a frozen encoder."""

import pytest
import torch
from ignite.engine import Engine
from monai.transforms import Compose, RandFlipd, RandGaussianNoised

from sam2sgp.data import load_datalist
from sam2sgp.data.phantom import make_phantoms
from sam2sgp.engines import CachedFeatures, PrepareEpisodes, SGPLoss
from sam2sgp.episodes import Augmentation, EpisodeDataset, EpisodeSettings
from sam2sgp.errors import ConfigError
from sam2sgp.networks import SAM2SGP
from sam2sgp.support import EpisodeSupportSampler
from sam2sgp.transforms import FitToSquared, LoadCased, ScaleIntensityByModalityd

SIZE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_phantoms(tmp_path_factory.mktemp("data") / "set", 4, (64, 64), 6, modalities=["us"], progress=False)


def dataset(folder, cache, augmentation: Augmentation | None = None) -> EpisodeDataset:
    keys = ["image", "label"]
    prepare = Compose([LoadCased(keys), ScaleIntensityByModalityd("image"), FitToSquared(keys, size=SIZE)])
    data = load_datalist(folder)
    settings = EpisodeSettings(group_size=4, clip_probability=0.0)
    return EpisodeDataset(data, prepare, str(cache), 8, settings, augmentation or Augmentation(), progress=False)


def augmentation(variants: int | None = None) -> Augmentation:
    flip, noise = RandFlipd(["image", "label"], 0.5, 1), RandGaussianNoised("image", 0.5, std=0.1)
    return Augmentation(Compose([flip]), Compose([noise]), variants)


def network(**settings) -> SAM2SGP:
    torch.manual_seed(0)
    return SAM2SGP("nano", SIZE, **{"freeze_encoder": True, **settings})


def train(net: SAM2SGP, data: EpisodeDataset, handler: CachedFeatures | None) -> list[float]:
    """Losses of two passes over two episodes, with a step after each."""
    prepare, loss = PrepareEpisodes(EpisodeSupportSampler(1, 2)), SGPLoss()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.01)
    losses = []

    def step(_, index):
        batch = {key: value[None] for key, value in data[index].items()}
        image, label, _, arguments = prepare(batch, "cpu")
        value = loss(net.train()(image, **arguments), label)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())

    engine = Engine(step)
    if handler is not None:
        handler.attach(engine)
    engine.run([0, 1], max_epochs=2)
    return losses


def test_losses_are_those_without_the_cache_and_an_image_is_encoded_once(folder, tmp_path):
    data = dataset(folder, tmp_path / "cases")
    plain = train(network(), data, None)
    net = network()
    cached = CachedFeatures(net, data, tmp_path / "features", 64)
    encoded = []
    net.image_encoder.trunk.register_forward_hook(lambda _, inputs, __: encoded.append(len(inputs[0])))
    assert train(net, data, cached) == pytest.approx(plain, abs=1e-5)
    images = {image.numpy().tobytes() for index in (0, 1) for image in data[index]["image"]}
    assert sum(encoded) == len(images) < 16
    assert net.trunk_cache is None
    # Another process finds them on disk.
    again = network()
    again.image_encoder.trunk.register_forward_hook(lambda *_: pytest.fail("encoded again"))
    assert train(again, data, CachedFeatures(again, data, tmp_path / "features", 0)) == pytest.approx(plain, abs=1e-5)


def test_other_weights_of_the_encoder_find_nothing(folder, tmp_path):
    data = dataset(folder, tmp_path / "cases")
    nets = [network(), network()]
    torch.nn.init.normal_(nets[1].image_encoder.trunk.pos_embed)
    caches = [CachedFeatures(net, data, tmp_path / "features", 64) for net in nets]
    for net, cache in zip(nets, caches, strict=True):
        train(net, data, cache)
    assert caches[0].cache.computed == caches[1].cache.computed > 0


def test_a_trained_encoder_or_images_that_never_repeat_are_errors(folder, tmp_path):
    data = dataset(folder, tmp_path / "cases")
    for settings in ({"freeze_encoder": False}, {"lora": {"r": 2, "alpha": 4}}):
        with pytest.raises(ConfigError, match="freeze_encoder"):
            CachedFeatures(network(**settings), data, tmp_path, 64)
    with pytest.raises(ConfigError, match="augmentation_variants"):
        CachedFeatures(network(), dataset(folder, tmp_path / "cases", augmentation()), tmp_path, 64)


def test_a_slice_comes_in_as_many_forms_as_there_are_variants(folder, tmp_path):
    def forms(variants: int | None = None) -> dict:
        data = dataset(folder, tmp_path / "cases", augmentation(variants))
        seen: dict = {}
        for index in range(40):
            drawn = data._pairs
            places: list = []
            data._draw, draw = lambda *a, draw=data._draw, places=places: places.extend(draw(*a)) or places, data._draw
            item = data[index]
            data._draw, data._pairs = draw, drawn
            for place, image in zip(places, item["image"], strict=True):
                seen.setdefault((place.case, place.slice), set()).add(image.numpy().tobytes())
        return {place: len(images) for place, images in seen.items()}

    limited, free = forms(variants=2), forms()
    assert max(limited.values()) == 2
    assert max(free.values()) > 4
