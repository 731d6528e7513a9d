"""Prepared cases on disk."""

import numpy as np
import pytest
import torch
from monai.transforms import Compose
from PIL import Image

from sam2sgp.episodes import CaseCache
from sam2sgp.errors import DataError
from sam2sgp.transforms import FitToSquared, LoadCased, ScaleIntensityByModalityd, cache_keys


def preprocessing(size: int = 32) -> Compose:
    return Compose([LoadCased(), ScaleIntensityByModalityd(), FitToSquared(size=size)])


@pytest.fixture
def case(tmp_path) -> dict:
    image = np.arange(40 * 20, dtype=np.uint8).reshape(40, 20)
    label = np.zeros((40, 20), dtype=np.uint8)
    label[5:20, 5:15] = 2
    for name, array in (("image", image), ("label", label)):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    return {"image": str(tmp_path / "image.png"), "label": str(tmp_path / "label.png")}


def test_what_comes_back_is_what_preprocessing_made(case, tmp_path):
    prepared = preprocessing()(case)
    for _ in range(2):
        cached = CaseCache(tmp_path / "cache", preprocessing())[case]
        torch.testing.assert_close(torch.tensor(cached.image).float(), prepared["image"], atol=1e-3, rtol=0)
        assert np.array_equal(cached.label, prepared["label"].numpy())
        assert cached.valid == (0, 8, 32, 16)


def test_a_case_is_prepared_once_until_a_file_or_the_preprocessing_changes(case, tmp_path):
    calls = []

    class Counting(LoadCased):
        def __call__(self, data):
            calls.append(data["image"])
            return super().__call__(data)

    def read(size):
        steps = [Counting(), ScaleIntensityByModalityd(), FitToSquared(size=size)]
        return CaseCache(tmp_path / "cache", Compose(steps))[case]

    read(32), read(32)
    assert len(calls) == 1
    assert read(64).image.shape[-1] == 64
    assert len(calls) == 2
    Image.fromarray(np.zeros((40, 20), dtype=np.uint8)).save(case["label"])
    assert read(32).label.max() == 0
    assert len(calls) == 3


def test_what_an_older_reader_prepared_is_prepared_again(case, tmp_path, monkeypatch):
    def read(fill):
        class Filling(LoadCased):
            def __call__(self, data):
                loaded = super().__call__(data)
                loaded["label"] = torch.full_like(loaded["label"], fill)
                return loaded

        return CaseCache(tmp_path / "cache", Compose([Filling(), ScaleIntensityByModalityd(), FitToSquared(size=32)]))

    assert read(3)[case].label.max() == 3
    # By the files and the settings, nothing has changed.
    assert read(4)[case].label.max() == 3
    monkeypatch.setattr(cache_keys, "READERS_VERSION", cache_keys.READERS_VERSION + 1)
    assert read(4)[case].label.max() == 4


def test_a_half_written_entry_is_not_taken_for_whole(case, tmp_path):
    cache = CaseCache(tmp_path / "cache", preprocessing())
    expected = np.array(cache[case].label)
    marker = next((tmp_path / "cache").glob("*.json"))
    marker.unlink()
    next((tmp_path / "cache").glob("*.label.npy")).write_bytes(b"half")
    assert np.array_equal(cache[case].label, expected)


def test_a_folder_that_can_not_be_written_is_one_clear_error(case, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(DataError, match="cache_dir"):
        CaseCache(blocked / "cache", preprocessing())[case]
