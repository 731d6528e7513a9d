"""What phantoms show: sizes, scales, looks, and places that tell nothing."""

import numpy as np
import pytest
from scipy.ndimage import binary_fill_holes
from scipy.ndimage import label as components

from sam2sgp.data.phantom_scenes import (
    CLASS_NAMES,
    LOOKS,
    PICTURE_LOOKS,
    VOLUME_LOOKS,
    phantom_picture,
    phantom_volume,
)
from sam2sgp.errors import ConfigError

COUNT = 40


@pytest.fixture(scope="module")
def slices():
    """look -> list of (image (H, W, channels), label (H, W)): pictures, and the slice of a volume that shows most."""
    made = {}
    for look in LOOKS:
        rng = np.random.default_rng(5)
        made[look] = []
        for _ in range(COUNT):
            if look in VOLUME_LOOKS:
                image, label, _ = phantom_volume(look, rng)
                z = np.count_nonzero(label, axis=(0, 1)).argmax()
                image, label = image[:, :, z], label[:, :, z]
            else:
                image, label = phantom_picture(look, rng)
            made[look].append((image.reshape(*label.shape, -1).astype(float), label))
    return made


def test_ct_is_in_hu(slices):
    image, label, _ = phantom_volume("ct", np.random.default_rng(0))
    assert image.dtype == np.int16 and label.dtype == np.uint8 and image.shape == (128, 128, 12)
    assert -1024 <= image.min() and image.max() <= 1500
    assert abs(np.median(image[:6, :6]) + 1000) < 10
    for image, label in slices["ct"]:
        for number in np.unique(label[label > 0]):
            assert -150 < np.median(image[label == number]) < 250


def test_mr_scale_differs_between_patients_and_air_is_rician():
    rng = np.random.default_rng(0)
    volumes = [phantom_volume("mr", rng)[0] for _ in range(6)]
    assert all(volume.dtype == np.float32 for volume in volumes)
    tops = [np.percentile(volume, 99) for volume in volumes]
    assert max(tops) > 3 * min(tops)
    for volume in volumes:
        air = volume[:8, :8] - volume.min()
        assert np.std(air) > 0
        # Of zero signal, Rician noise is Rayleigh noise: mean / std = 1.91.
        assert 1.6 < air.mean() / air.std() < 2.2


def test_pictures_have_the_stated_shapes():
    image, label = phantom_picture("us", np.random.default_rng(0))
    assert image.shape == label.shape == (128, 160) and image.dtype == label.dtype == np.uint8
    assert not image[-1, 0] and not image[0, 0]
    image, label = phantom_picture("rgb", np.random.default_rng(0), (96, 128))
    assert image.shape == (96, 128, 3) and label.shape == (96, 128) and image.dtype == np.uint8


def test_volumes_have_no_target_in_the_end_slices_and_several_in_the_middle():
    rng = np.random.default_rng(0)
    for look in VOLUME_LOOKS:
        for _ in range(5):
            label = phantom_volume(look, rng)[1]
            assert not label[:, :, 0].any() and not label[:, :, -1].any()
            extents = [np.count_nonzero((label == number).any((0, 1))) for number in np.unique(label[label > 0])]
            assert len(extents) >= 2 and all(4 <= extent <= 10 for extent in extents)


@pytest.mark.parametrize("look", LOOKS)
def test_targets_are_of_the_stated_size_whole_and_apart(slices, look):
    for _, label in slices[look]:
        filled = np.zeros(label.shape, int)
        for number in np.unique(label[label > 0]):
            mask = label == number
            # Of a volume, the slice that shows most isn't each target's largest one.
            assert (0.01 if look in VOLUME_LOOKS else 0.03) < mask.mean() < 0.08
            assert components(mask)[1] == 1
            filled += binary_fill_holes(mask)
            hole = binary_fill_holes(mask).sum() - mask.sum()
            assert (hole > 0) == (CLASS_NAMES[number] == "ring")
        assert filled.max() == 1
        assert components(filled)[1] == len(np.unique(label[label > 0]))


@pytest.mark.parametrize("look", LOOKS)
def test_every_class_is_in_most_images_and_lacking_in_some(slices, look):
    present = np.array([[(label == number).any() for number in CLASS_NAMES] for _, label in slices[look]])
    assert (present.mean(0) > 0.75).all()
    assert (present.sum(1) >= 2).all()
    assert 0.1 < (present.sum(1) == 2).mean() < 0.5
    assert (~present).any(0).sum() >= 2


@pytest.mark.parametrize("look", LOOKS)
def test_place_does_not_give_a_class_away(slices, look):
    for number in CLASS_NAMES:
        masks = np.array([label == number for _, label in slices[look] if (label == number).any()])
        mean = masks.mean(0)
        best = 0.0
        for threshold in np.unique(mean)[:-1]:
            guess = mean > threshold
            best = max(best, np.mean([2 * (guess & mask).sum() / (guess.sum() + mask.sum()) for mask in masks]))
        assert 0.1 < best < 0.35


@pytest.mark.parametrize("look", LOOKS)
def test_appearance_tells_the_classes_apart_in_other_patients(slices, look):
    def features(image, mask):
        """Colour and texture of a target against its surroundings, and how dark its inside is."""
        body = image[(image > np.percentile(image, 40)).all(-1)]
        scale = body.std(0) + 1e-6
        inside = image[binary_fill_holes(mask)].mean(0)
        return np.hstack([(image[mask].mean(0) - body.mean(0)), inside - image[mask].mean(0), image[mask].std(0)]) / (
            np.tile(scale, 3)
        )

    cases = [
        (number, features(image, label == number))
        for image, label in slices[look]
        for number in np.unique(label[label > 0])
    ]
    numbers = np.array([number for number, _ in cases])
    values = np.array([value for _, value in cases])
    train = np.arange(len(cases)) < len(cases) // 2
    values = (values - values[train].mean(0)) / values[train].std(0)
    centres = np.array([values[train & (numbers == number)].mean(0) for number in CLASS_NAMES])
    nearest = np.linalg.norm(values[~train, None] - centres, axis=-1).argmin(1) + 1
    assert (nearest == numbers[~train]).mean() > 0.95


def test_volumes_and_pictures_have_looks_of_their_own():
    rng = np.random.default_rng(0)
    for look in VOLUME_LOOKS:
        with pytest.raises(ConfigError, match="us, rgb"):
            phantom_picture(look, rng)
    for look in PICTURE_LOOKS:
        with pytest.raises(ConfigError, match="ct, mr"):
            phantom_volume(look, rng)
