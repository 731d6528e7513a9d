"""The file of a backup: whole, of its format, and with files that a backup has; else refused."""

import tarfile

import pytest

from lib.admin import backup_file
from lib.admin.backup_file import checked
from lib.admin.restore import restore
from sam2sgp.errors import DataError
from tests.app.conftest import APP


def test_a_backup_that_was_cut_or_changed_anywhere_is_refused(site, other, tmp_path):
    whole = site.save().read_bytes()
    file = tmp_path / "cut.tar"
    for size in [*range(0, len(whole) - 10240, 512), *range(1, len(whole) - 10240, 4999)]:
        file.write_bytes(whole[:size])
        with pytest.raises(DataError, match="expected a whole backup, found"):
            checked(file)
    for place in range(100, len(whole) - 10240, 1009):
        changed = bytearray(whole)
        changed[place] ^= 1
        file.write_bytes(changed)
        with tarfile.open(site.folder / "backup.tar") as archive:
            members = {member.name: (member.offset_data, member.size) for member in archive}
        inside = any(start <= place < start + size for start, size in members.values())
        if inside:
            with pytest.raises(DataError):
                restore(other.words(file), APP)
    assert not other.studies.exists() and not other.state.exists()


@pytest.mark.parametrize("name", ["state/app/torch.py", "state/archive/labels/x.json", "studies/more/x", "studies/.x"])
def test_a_whole_backup_with_files_that_none_has_is_refused(other, tmp_path, name):
    file = tmp_path / "evil.tar"
    with backup_file.writing(file, "folder") as writer:
        writer.add_bytes(name, b"import os")
    with pytest.raises(DataError, match="which none has; take another one"):
        restore(other.words(file), APP)
    assert not other.studies.exists() and not other.state.exists()


@pytest.mark.parametrize("name", ["../evil", "/evil", "studies/../../evil", "elsewhere/x", "studies"])
def test_a_member_that_leads_elsewhere_is_refused(other, tmp_path, name):
    file = tmp_path / "evil.tar"
    with tarfile.open(file, "w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(DataError, match="which no backup has"):
        restore(other.words(file), APP)
    link = tarfile.TarInfo("studies/link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc"
    with tarfile.open(file, "w") as archive:
        archive.addfile(link)
    with pytest.raises(DataError, match="which no backup has"):
        restore(other.words(file), APP)


def test_a_newer_format_is_refused_with_what_to_do(site, tmp_path, monkeypatch):
    monkeypatch.setattr(backup_file, "FORMAT", 2)
    file = site.save()
    monkeypatch.undo()
    with pytest.raises(DataError, match="format 1 or older, found 2; restore it by the version that made it"):
        checked(file)
