"""Files are whole or not there."""

import pytest

from sam2sgp.files import remove_parts, replacing, write_text


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as part:
        part.write_bytes(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_complete_write_replaces_and_makes_folders(tmp_path):
    path = tmp_path / "new" / "report.html"
    write_text(path, "one\r\ntwo")
    write_text(path, "three\r\n")
    assert path.read_bytes() == b"three\r\n"
    assert list(path.parent.iterdir()) == [path]


def test_the_longest_name_of_a_file_can_be_written(tmp_path):
    path = tmp_path / ("é" * 125 + "a.png")
    with replacing(path) as part:
        part.write_bytes(b"whole")
        killed = tmp_path / (part.parent.name[:-8] + "abcd1234")
    assert path.read_bytes() == b"whole"
    killed.mkdir()
    remove_parts(tmp_path, {path.name})
    assert list(tmp_path.iterdir()) == [path]


def test_what_killed_processes_leave_is_removed_and_nothing_else(tmp_path):
    with replacing(tmp_path / "a.png") as part:
        folder = part.parent.name
        part.write_bytes(b"whole")
    for name in (folder, ".b.png.abcd1234", ".a.png.other", "a.png.abcd1234"):
        (tmp_path / name).mkdir()
    remove_parts(tmp_path, {"a.png"})
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", ".b.png.abcd1234", ".a.png.other", "a.png.abcd1234"}
