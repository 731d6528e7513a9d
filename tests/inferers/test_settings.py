"""The settings of an inference: one default each, and variants that share nothing but what they must."""

import json
from dataclasses import asdict, replace

import pytest

from sam2sgp.errors import ConfigError
from sam2sgp.inferers import InferenceSettings, SupportSetInferer, VolumeMemory
from sam2sgp.inferers.query_cache import QueryCache
from sam2sgp.places import DEFAULT_BACKBONE
from sam2sgp.support import ItemRules, SupportBank, SupportSampler
from sam2sgp.transforms import ScaleIntensityByModalityd
from tests.helpers.bundle_runs import CONFIGS


@pytest.mark.parametrize("names", [("inference.json",), ("train.json", "evaluate.json")])
def test_the_defaults_are_those_of_the_shipped_configs(names):
    config: dict = {}
    for name in names:
        config |= json.loads((CONFIGS / name).read_text())
    shipped = InferenceSettings(
        SupportSampler(config["retrieval"], config["k"], config["support_seed"]),
        config["val_batch_size"],
        config["precision"],
        config["region_below"],
        VolumeMemory(config["memory_frames"]) if config["three_d_memory"] else None,
        config["object_gate"],
        config["one_piece"],
        config["mirror"],
    )
    assert shipped == InferenceSettings()
    scaling = ScaleIntensityByModalityd()
    assert (scaling.ct_window, scaling.percentiles) == (tuple(config["ct_window"]), tuple(config["percentiles"]))
    assert config["backbone"] == DEFAULT_BACKBONE


def test_settings_are_plain_values_and_never_change():
    settings = InferenceSettings(SupportSampler(k=3), volume_memory=None)
    assert json.loads(json.dumps(asdict(settings)))["sampler"] == {"mode": "similarity", "k": 3, "seed": 0}
    assert hash(settings) == hash(replace(settings)) and settings != replace(settings, batch_size=1)
    with pytest.raises(AttributeError):
        settings.batch_size = 1


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_second_pass_of_more_than_the_image_is_refused(share):
    with pytest.raises(ConfigError, match="region_below"):
        InferenceSettings(region_below=share)


@pytest.mark.parametrize("mirror", ["always", 1])
def test_a_mirroring_that_is_unknown_is_refused(mirror):
    with pytest.raises(ConfigError, match="expected True, False or auto"):
        InferenceSettings(mirror=mirror)


def test_a_variant_has_its_settings_in_all_passes_and_shares_what_was_learned():
    bank = SupportBank([], lambda case: case, rules=ItemRules(allow_empty=True), progress=False)
    inferer = SupportSetInferer(bank, InferenceSettings(batch_size=8), query_cache=QueryCache(1))
    smaller = replace(inferer, settings=replace(inferer.settings, batch_size=2), query_cache=None)
    assert (smaller.second_pass.settings.batch_size, inferer.second_pass.settings.batch_size) == (2, 8)
    assert smaller.second_pass.query_cache is None and inferer.second_pass.query_cache is not None
    assert smaller.gate is inferer.gate and smaller.bank is bank
    assert replace(inferer, gate=None).gate is not inferer.gate
