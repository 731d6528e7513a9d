"""Files of folders that others may write to, and folders that answers must not tell."""

import html
import json
import os

import pytest

from lib.server_paths import Folders, open_plain, read_plain
from tests.helpers.uploads import nifti
from tests.helpers.waiting import in_time


@pytest.fixture
def studies(tmp_path):
    folder = tmp_path / "studies"
    folder.mkdir()
    (folder / "A.nii").write_bytes(nifti())
    (tmp_path / "secret.nii").write_bytes(nifti())
    return folder


def test_what_became_a_link_or_a_pipe_meanwhile_is_not_opened(studies):
    path = studies / "A.nii"
    with open_plain(path, studies) as file:
        # It is the file that was opened, whatever is there now.
        path.unlink()
        path.symlink_to(studies.parent / "secret.nii")
        assert file.read() == nifti()
    with pytest.raises(OSError):
        open_plain(path, studies)
    # After the link was followed for its real path.
    with pytest.raises(OSError, match="no plain file"):
        open_plain(studies.parent / "secret.nii", studies)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="no plain file"):
        in_time(lambda: open_plain(path, studies))
    # A folder on the way.
    (studies / "way").symlink_to(studies.parent)
    with pytest.raises(OSError, match="no plain file"):
        open_plain(studies / "way" / "secret.nii", studies)


def test_no_more_is_read_than_asked_for(studies):
    (studies / "a.json").write_bytes(b"12345")
    assert read_plain(studies / "a.json", 5) == b"12345"
    with pytest.raises(ValueError, match="more than 4 bytes"):
        read_plain(studies / "a.json", 4)


def test_folders_are_left_out_of_texts_in_every_way_of_writing_them(tmp_path):
    studies = tmp_path / "Röntgen & more"
    folders = Folders([studies, studies / "inner"])
    for write in (str, html.escape, lambda text: json.dumps(text)[1:-1], lambda text: ascii(text)[1:-1]):
        text = write(f"{studies}/labels/a.png, {studies}: {studies}2/x and {studies}/inner/b").encode()
        told = folders.left_out(text).decode()
        name = write("Röntgen & more")
        # A folder that only begins like one of them is below one of temporary files.
        assert (
            told.startswith(f"labels/a.png, {name}: ")
            and told.endswith(f"{name}2/x and b")
            and write(str(studies)) not in told
        )
