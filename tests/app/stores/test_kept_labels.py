"""What is kept here of an archive's series: labels with their notes, removals, and one value for each class name."""

from pathlib import Path

import numpy as np
import pytest

from lib.stores.kept_labels import KeptLabels
from sam2sgp.data import read_image, read_label
from tests.helpers.store_files import volume


@pytest.fixture
def kept(tmp_path) -> KeptLabels:
    return KeptLabels(tmp_path / "archive")


@pytest.fixture
def write(kept, tmp_path):
    geometry = read_image(volume(tmp_path / "image.nii.gz")).geometry

    def written(series: str, tag: str, value: int = 1, **info) -> Path:
        path = kept.path(series, tag)
        kept.write(path, np.full(geometry.shape, value, np.uint8), geometry, info)
        return path

    written.geometry = geometry
    return written


def test_labels_are_by_tag_and_the_archive_decides_of_final_ones(kept, write):
    path = write("1.2", "draft", user="ann")
    write("1.2", "final")
    write("1.3", "original")
    assert kept.tags("1.2") == ["draft"] and kept.tags("1.3") == ["original"] and kept.tags("1.4") == []
    assert kept.record(path)["user"] == "ann" and (read_label(path, write.geometry) == 1).all()
    kept.delete(path)
    assert kept.tags("1.2") == [] and kept.record(path) == {}


def test_the_segmentation_of_a_label_is_known_as_long_as_the_label_is_here(kept, write):
    path = write("1.2", "final", segmentation="2.25.7")
    assert kept.segmentation(path) == "2.25.7"
    path.unlink()
    assert kept.segmentation(path) is None


def test_files_come_back_as_they_were(kept, write):
    path = write("1.2", "draft", value=1, user="ann")
    before = kept.files(path)
    write("1.2", "draft", value=2, user="ben")
    kept.restore(path, before)
    assert kept.files(path) == before and kept.record(path)["user"] == "ann"
    kept.restore(path, {})
    assert not path.exists() and kept.files(path) == {}


def test_removals_add_up_and_are_of_their_series(kept):
    assert kept.removed("1.2") == set()
    kept.remove("1.2", {"a"})
    kept.remove("1.2", {"b"})
    assert kept.removed("1.2") == {"a", "b"} and kept.removed("1.3") == set()


def test_each_class_name_has_one_value_and_keeps_it(kept, write, tmp_path):
    write("1.2", "draft", label_info=[{"idx": 3, "name": "liver"}])
    assert kept.value_of("liver") == 3 and kept.value_of("cyst") == 4 and kept.value_of("cyst") == 4
    again = KeptLabels(tmp_path / "archive")
    assert again.value_of("cyst") == 4 and again.value_of("vessel") == 5
    assert again.value_of("Cyst") == 4 and again.value_of("LIVER") == 3, "whatever the case of its letters"


def test_a_damaged_note_costs_itself_only(kept, write, caplog):
    path = write("1.2", "draft", user="ann")
    path.with_name("1.2.json").write_text("{")
    assert kept.record(path) == {} and "expected JSON, found it damaged" in caplog.text
    assert kept.tags("1.2") == ["draft"]
    kept.note_series("1.2", {"Modality": "CT"})
    assert kept.series_record("1.2")["Modality"] == "CT"
