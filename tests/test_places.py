"""Addresses are told from paths, and a backbone brings its overlay."""

import pytest

from sam2sgp.errors import ConfigError
from sam2sgp.places import APP, BUNDLE, is_address, overlays_of


def test_an_address_is_no_path():
    assert is_address("https://archive.example/dicom-web") and is_address("http://127.0.0.1:8042")
    assert not is_address("/data/http://x") and not is_address("https") and not is_address("studies")


def test_configs_weights_and_app_are_where_they_are_said_to_be():
    for path in (BUNDLE / "configs" / "train.json", BUNDLE / "models" / "model.pt", APP / "main.py"):
        assert path.is_file(), path


def test_the_default_backbone_needs_no_overlay_and_an_unknown_one_is_refused():
    assert overlays_of("lite") == [] and overlays_of("tiny") == ["backbones/tiny.json"]
    assert (BUNDLE / "configs" / overlays_of("small")[0]).is_file()
    with pytest.raises(ConfigError, match="backbone: expected one of base_plus, .*, tiny, found 'huge'"):
        overlays_of("huge")
