"""What a preprocessing is made of decides what is found again."""

import json

from monai.transforms import Compose

from sam2sgp.transforms import FitToSquared, LoadCased, ScaleIntensityByModalityd, cache_keys
from sam2sgp.transforms.cache_keys import transform_fingerprint


def preprocessing(size: int = 32, **scaling) -> Compose:
    return Compose([LoadCased(("image", "label")), ScaleIntensityByModalityd(**scaling), FitToSquared(size=size)])


def test_equal_settings_are_equal_and_each_setting_counts():
    same = transform_fingerprint(preprocessing())
    assert same == transform_fingerprint(preprocessing()) == json.loads(json.dumps(same))
    others = [preprocessing(64), preprocessing(percentiles=(1.0, 99.0)), Compose(preprocessing().transforms[:2])]
    assert all(transform_fingerprint(other) != same for other in others)


def test_a_single_transform_counts_like_one_that_is_composed_and_the_order_counts():
    load, scale, fit = preprocessing().transforms
    assert transform_fingerprint(load) == transform_fingerprint(Compose([load]))
    assert transform_fingerprint(Compose([load, scale, fit])) != transform_fingerprint(Compose([load, fit, scale]))


def test_what_older_readers_made_has_another_key(monkeypatch):
    before = transform_fingerprint(preprocessing())
    monkeypatch.setattr(cache_keys, "READERS_VERSION", cache_keys.READERS_VERSION + 1)
    assert transform_fingerprint(preprocessing()) != before
