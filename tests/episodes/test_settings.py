"""The settings of training episodes: one default each, and what can't be drawn is refused."""

import json
from dataclasses import MISSING, fields

import pytest

from sam2sgp.episodes import Augmentation, EpisodeSettings, TaskShares
from sam2sgp.errors import ConfigError
from tests.helpers.bundle_runs import CONFIGS


def test_the_defaults_are_those_of_the_shipped_config():
    config = json.loads((CONFIGS / "train.json").read_text())
    defaults = {field.name: field.default for field in fields(EpisodeSettings)}
    assert defaults.pop("group_size") == config["images_per_episode"]
    # What the configs say of it differs, and is nowhere else.
    assert defaults.pop("clip_probability") is MISSING
    assert defaults == {name: config[name] for name in defaults}
    assert Augmentation().variants == config["augmentation_variants"]


def test_clips_that_do_not_fit_into_an_episode_are_refused():
    with pytest.raises(ConfigError, match="clip_length, clip_stride are 3, 1.*4 images"):
        EpisodeSettings(group_size=4, clip_probability=0.5)
    assert EpisodeSettings(group_size=6, clip_probability=0.5).clip_length == 3
    assert EpisodeSettings(group_size=4, clip_probability=0.0).group_size == 4, "without clips none has to fit"


@pytest.mark.parametrize("settings", [{"clip_length": 1}, {"clip_length": 4}, {"clip_stride": 0}])
def test_a_clip_of_one_slice_of_too_many_or_without_a_distance_is_refused(settings):
    with pytest.raises(ConfigError, match="clip_length, clip_stride are"):
        EpisodeSettings(clip_probability=0.1, **settings)


def test_no_variants_at_all_are_refused():
    with pytest.raises(ConfigError, match="augmentation_variants is 0"):
        Augmentation(variants=0)


def test_settings_never_change_and_have_the_names_of_the_options():
    settings = EpisodeSettings(clip_probability=0.5)
    with pytest.raises(AttributeError):
        settings.clip_length = 2
    options = json.loads((CONFIGS / "finetune.json").read_text())
    assert {field.name for field in fields(TaskShares)} <= options.keys()
