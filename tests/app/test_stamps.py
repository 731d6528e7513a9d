"""A change of a file, or of a series, is noticed without reading it."""

import os

from lib.stamps import image_stamp, stamp


def test_content_time_and_file_count(tmp_path):
    path = tmp_path / "a.nii"
    assert stamp(path) is None
    path.write_bytes(b"12")
    first = stamp(path)
    assert stamp(path) == first
    os.utime(path, ns=(1, 1))
    later = stamp(path)
    assert later != first
    (tmp_path / "b.nii").write_bytes(b"12")
    os.utime(tmp_path / "b.nii", ns=(1, 1))
    (tmp_path / "b.nii").replace(path)
    assert stamp(path) not in (first, later), "another file of the same size and time"


def test_a_series_changes_with_any_of_its_files_and_an_image_with_its_own_only(tmp_path):
    series = tmp_path / "series"
    series.mkdir()
    for name in "ab":
        (series / name).write_bytes(b"1")
    first = image_stamp(series)
    assert [name for name, _ in first] == ["a", "b"] and image_stamp(series) == first
    (series / "b").write_bytes(b"22")
    assert image_stamp(series) != first
    (series / "b").unlink()
    assert [name for name, _ in image_stamp(series)] == ["a"]
    single = image_stamp(series / "a")
    (series / "c").write_bytes(b"3")
    assert image_stamp(series / "a") == single and single[0][0] == "a"
    assert image_stamp(tmp_path / "absent") is None
