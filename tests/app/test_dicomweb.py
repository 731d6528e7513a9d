"""An archive that doesn't answer, and ids that lead elsewhere."""

import pytest
import requests

from lib.checks import RequestError
from lib.dicomweb import ArchiveError, DicomWebDatastore
from lib.settings import Settings
from sam2sgp.errors import ConfigError


@pytest.fixture
def datastore(tmp_path, monkeypatch):
    def unreachable(*arguments, **options):
        assert options["timeout"]
        raise requests.ConnectionError("refused")

    monkeypatch.setattr(requests.Session, "request", unreachable)
    return DicomWebDatastore("http://127.0.0.1:9/dicom-web", tmp_path / "archive", 1 << 20)


def test_an_archive_that_does_not_answer_is_told_in_one_sentence(datastore):
    with pytest.raises(ArchiveError, match="archive: expected a list of series, found no answer"):
        datastore.list_images()


def test_old_lists_serve_while_the_archive_does_not_answer(datastore):
    datastore._listed = True
    assert datastore.list_images() == [] and datastore.get_labeled_images() == []


@pytest.mark.parametrize("image_id", ["../1.2", "/etc/passwd", "1.2/3", "", "1.2*", "1" * 70])
def test_ids_are_uids(datastore, tmp_path, image_id):
    for ask in (
        datastore.get_image_uri,
        datastore.get_image_info,
        datastore.get_labels_by_image_id,
        lambda uid: datastore.get_label_uri(uid, "final"),
        lambda uid: datastore.remove_label(uid, "final"),
        lambda uid: datastore.update_image_info(uid, {}),
        lambda uid: datastore.save_label(uid, "label.nii.gz", "final", {}),
    ):
        with pytest.raises(RequestError, match="expected a DICOM UID"):
            ask(image_id)
    assert not (tmp_path / "archive").exists()


def test_settings_of_the_archive_are_checked(tmp_path):
    app = tmp_path / "apps" / "sam2sgp"
    for key, value in (("dicomweb_filter", "CT"), ("dicomweb_expiry", "-1")):
        with pytest.raises(ConfigError, match=key):
            Settings.from_conf(app, "http://127.0.0.1:9", {key: value})
