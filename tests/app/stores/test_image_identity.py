"""A label is told from those of another image that came under its image's name."""

import os

import pytest

from lib.stores import image_identity
from lib.stores.audit import content_hash
from lib.stores.image_identity import claim, claim_in, is_of_another


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.nii.gz"
    path.write_bytes(b"pixels")
    return path


@pytest.fixture
def label(tmp_path):
    path = tmp_path / "label.nii.gz"
    path.write_bytes(b"classes")
    return path


def test_another_content_is_another_image_and_another_time_is_not(image, label):
    record = claim(image)
    assert not is_of_another(record, image, label)
    os.utime(image, ns=(1, 1))
    assert not is_of_another(record, image, label)
    image.write_bytes(b"others")
    assert is_of_another(record, image, label)
    image.write_bytes(b"pixels")
    assert not is_of_another(record, image, label), "the image came back"


def test_an_image_as_it_was_is_not_read(image, label, monkeypatch):
    record = claim(image)
    monkeypatch.setattr(image_identity, "_content", None)
    assert not is_of_another(record, image, label)


def test_a_series_is_told_by_the_names_of_its_files(tmp_path, label):
    series = tmp_path / "series"
    series.mkdir()
    (series / "1.2.3.dcm").write_bytes(b"a")
    record = claim(series)
    (series / "1.2.3.dcm").write_bytes(b"b")
    assert not is_of_another(record, series, label)
    (series / "1.2.3.dcm").rename(series / "1.2.4.dcm")
    assert is_of_another(record, series, label)


def test_a_label_that_people_put_in_its_place_says_nothing(image, label):
    record = claim(image, content_hash(label))
    image.write_bytes(b"others")
    assert is_of_another(record, image, label)
    label.write_bytes(b"put there by somebody")
    assert not is_of_another(record, image, label)


@pytest.mark.parametrize("record", [{}, {"made_of": None}, {"made_of": [1]}, {"made_of": {"content": ""}}])
def test_without_a_claim_nothing_is_known(image, label, record):
    image.write_bytes(b"others")
    assert not is_of_another(record, image, label)
    assert isinstance(claim_in(record), dict)


def test_an_image_that_is_gone_is_no_other(image, label):
    record = claim(image)
    image.unlink()
    assert not is_of_another(record, image, label)


def test_each_of_many_touched_images_is_read_once(tmp_path, label, monkeypatch):
    images = [tmp_path / f"{number}.png" for number in range(5000)]
    records = []
    for image in images:
        image.write_bytes(b"image")
        records.append(claim(image))
        os.utime(image, ns=(0, 10**9))
    read = []
    monkeypatch.setattr(image_identity, "content_hash", lambda path: read.append(path) or content_hash(path))
    for _ in range(2):
        assert not any(is_of_another(record, image, label) for record, image in zip(records, images, strict=True))
    assert len(read) == len(images)
