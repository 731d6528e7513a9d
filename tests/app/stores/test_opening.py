"""The datastore of a server: a folder by its path, an archive by its address."""

from lib.settings import Settings
from lib.stores import opening
from lib.stores.folder import ConfinedDatastore
from lib.stores.opening import open_datastore
from tests.app.conftest import APP


def test_a_folder_is_opened_with_the_rule_of_the_settings(tmp_path):
    (tmp_path / "studies").mkdir()
    conf = {"state_dir": str(tmp_path / "state")}
    found = open_datastore(Settings.from_conf(APP, str(tmp_path / "studies"), conf))
    assert isinstance(found, ConfinedDatastore) and found.approve_own is True
    found = open_datastore(
        Settings.from_conf(
            APP, str(tmp_path / "studies"), {**conf, "approve_own": "false", "user_header": "X-Remote-User"}
        )
    )
    assert found.approve_own is False


def test_an_address_is_an_archive_that_keeps_its_files_in_the_state(tmp_path, monkeypatch):
    opened = []

    class Archive:
        def __init__(self, *arguments) -> None:
            opened.append(arguments)

    monkeypatch.setattr(opening, "DicomWebDatastore", Archive)
    conf = {"state_dir": str(tmp_path / "state"), "dicomweb_timeout": "7"}
    open_datastore(Settings.from_conf(APP, "http://127.0.0.1:9/dicom-web", conf))
    [(address, folder, *_, timeout)] = opened
    assert (address, folder, timeout) == ("http://127.0.0.1:9/dicom-web", tmp_path / "state" / "archive", 7)
