"""Whether a label is of the image that is there: told by content, which is read once."""

import os

from lib.stores import image_identity
from lib.stores.audit import content_hash


def test_each_of_many_touched_images_is_read_once(tmp_path, monkeypatch):
    images = [tmp_path / f"{number}.png" for number in range(5000)]
    records = []
    for image in images:
        image.write_bytes(b"image")
        records.append(image_identity.claim(image))
        os.utime(image, ns=(0, 10**9))
    read = []
    monkeypatch.setattr(image_identity, "content_hash", lambda path: read.append(path) or content_hash(path))
    for _ in range(2):
        assert not any(image_identity.is_of_another(*entry, "") for entry in zip(records, images, strict=True))
    assert len(read) == len(images)


def test_a_series_is_told_by_the_names_of_its_files(tmp_path):
    series = tmp_path / "series"
    series.mkdir()
    (series / "1.dcm").write_bytes(b"slice")
    made_of = image_identity.claim(series)
    os.utime(series / "1.dcm", ns=(0, 10**9))
    assert not image_identity.is_of_another(made_of, series, "")
    (series / "1.dcm").rename(series / "2.dcm")
    assert image_identity.is_of_another(made_of, series, "")
