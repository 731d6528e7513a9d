"""The loop of segmenting, correcting and approving on a real DICOMweb archive: Orthanc and a server process.

The tests run in this order on one archive and one server, as a working day would.
"""

import gzip
import json
import shutil
import urllib.request
from types import SimpleNamespace

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
import requests
from requests_toolbelt import MultipartDecoder

from sam2sgp.data import read_image, read_label, write_dicom_seg
from sam2sgp.data.phantom import CLASS_NAMES
from tests.e2e.hospital import LABEL_INFO, patient, picture, series_uid
from tests.e2e.orthanc import orthanc
from tests.e2e.server import Server

WAIT = 60
# Lists are asked for anew at each request.
CONF = {"image_size": "64", "k": "8", "slices_per_class": "2", "dicomweb_expiry": "0"}


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    root = tmp_path_factory.mktemp("hospital")
    patients = {
        "first": patient(root / "series", "first", "ct", 1),
        "second": patient(root / "series", "second", "ct", 2, orientation=(-1.0, 0.0, 0.0, 0.0, -1.0, 0.0)),
        "query": patient(root / "series", "query", "ct", 3, spacing=(-3.0, 0.8, 0.7), SliceThickness=3.0),
        "next": patient(root / "series", "next", "ct", 4),
        "mr": patient(root / "series", "mr", "mr", 5),
    }
    ultrasound = picture(root / "series", "us")
    folder = root / "orthanc"
    folder.mkdir()
    with orthanc(folder) as archive:
        for entry in patients.values():
            archive.upload(entry.folder)
        archive.upload(ultrasound)
        server = Server(root, archive.dicomweb, CONF)
        try:
            server.start()
            yield SimpleNamespace(
                archive=archive, server=server, patients=patients, ultrasound=series_uid(ultrasound), root=root
            )
        finally:
            server.stop()


def ask(hospital, method, path, **options):
    return requests.request(method, f"{hospital.server.url}{path}", timeout=WAIT, **options)


def approve(hospital, name):
    """Send the truth about a patient."""
    case = hospital.patients[name]
    answer = ask(
        hospital,
        "PUT",
        "/datastore/label",
        params={"image": case.uid, "tag": "final"},
        data={"params": json.dumps({"label_info": LABEL_INFO})},
        files={"label": ("label.nii.gz", case.label.read_bytes())},
    )
    assert answer.status_code == 200, answer.text + hospital.server.output()
    assert not answer.json()["warnings"]


def infer(hospital, name, **params):
    """The result (NIfTI) and its parameters."""
    answer = ask(
        hospital,
        "POST",
        "/infer/sam2sgp",
        params={"image": hospital.patients[name].uid},
        data={"params": json.dumps(params)},
    )
    assert answer.status_code == 200, answer.text + hospital.server.output()
    parts = {}
    for part in MultipartDecoder.from_response(answer).parts:
        name = part.headers[b"Content-Disposition"].split(b'name="')[1].split(b'"')[0].decode()
        parts[name] = part.content
    return volume(parts["image"]), json.loads(parts["params"])


def volume(content: bytes) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(gzip.decompress(content))


def used(params) -> set[str]:
    """The images that guided a result."""
    return {entry["image"] for entries in params["support"].values() for entry in entries}


def label_of(hospital, name) -> np.ndarray | None:
    """The approved label as the server gives it, None if there is none."""
    answer = ask(hospital, "GET", "/datastore/label", params={"label": hospital.patients[name].uid, "tag": "final"})
    assert answer.status_code in (200, 404), answer.text
    return np.asarray(volume(answer.content).dataobj) if answer.status_code == 200 else None


def support(hospital) -> dict:
    return ask(hospital, "GET", "/info/").json()["support"]


def segmentations(hospital, name) -> list[tuple[str, pydicom.Dataset]]:
    """The SEGs of a patient with Orthanc's ids of their series, from the archive itself."""
    found = []
    for entry in hospital.archive.series("SEG"):
        path = hospital.root / "found.dcm"
        path.write_bytes(hospital.archive.file(entry["Instances"][0]))
        segmentation = highdicom.seg.segread(path)
        if segmentation.PatientID == name:
            found.append((entry["ID"], segmentation))
    return found


def store(hospital, name, labels, approved):
    """A segmentation that comes into the archive in another way than through the server."""
    case = hospital.patients[name]
    path = hospital.root / "other" / "label.dcm"
    names = CLASS_NAMES | {9: "gas"}
    assert write_dicom_seg(path, labels, read_image(case.folder).geometry, case.folder, names, approved=approved)
    hospital.archive.upload(path.parent)


def test_series_of_all_modalities_are_listed(hospital):
    found = ask(hospital, "GET", "/datastore/?output=all").json()["objects"]
    expected = {case.uid for case in hospital.patients.values()} | {hospital.ultrasound}
    assert set(found) == expected
    assert {entry["image"]["info"]["Modality"] for entry in found.values()} == {"CT", "MR", "US"}
    assert ask(hospital, "GET", "/datastore/").json() == {"total": len(expected), "completed": 0, "label_tags": {}}


def test_clients_that_do_not_speak_dicom_get_a_series_as_a_file(hospital):
    case = hospital.patients["query"]
    answer = ask(hospital, "GET", "/datastore/image", params={"image": case.uid})
    found, source = volume(answer.content), read_image(case.folder)
    assert np.allclose(found.affine, source.geometry.affine, atol=1e-4)
    assert np.array_equal(source.geometry.from_native(np.asarray(found.dataobj)), source.slices[:, 0])
    assert ask(hospital, "HEAD", "/datastore/image", params={"image": case.uid}).ok
    assert ask(hospital, "GET", "/datastore/image", params={"image": "1.2.3"}).status_code == 404
    assert ask(hospital, "GET", "/datastore/image", params={"image": "../1.2"}).status_code == 400


def test_without_approved_labels_the_request_is_refused(hospital):
    answer = ask(hospital, "POST", "/infer/sam2sgp", params={"image": hospital.patients["query"].uid})
    assert answer.status_code == 409


def test_approved_labels_arrive_as_segmentations_of_the_source_slices(hospital):
    for name in ("first", "second"):
        approve(hospital, name)
    for name in ("first", "second"):
        case = hospital.patients[name]
        [(_, seg)] = segmentations(hospital, name)
        values = sorted(set(np.unique(case.truth)) - {0})
        assert [segment.SegmentLabel for segment in seg.SegmentSequence] == [CLASS_NAMES[value] for value in values]
        for segment in seg.SegmentSequence:
            assert segment.SegmentAlgorithmType == "SEMIAUTOMATIC"
            assert segment.SegmentedPropertyCategoryCodeSequence[0].CodingSchemeDesignator == "SCT"
            assert segment.SegmentedPropertyTypeCodeSequence[0].CodeValue
        headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in case.folder.iterdir()]
        [series] = seg.ReferencedSeriesSequence
        assert series.SeriesInstanceUID == case.uid and seg.StudyInstanceUID == case.study
        referenced = {entry.ReferencedSOPInstanceUID for entry in series.ReferencedInstanceSequence}
        assert referenced == {header.SOPInstanceUID for header in headers}
        frames = seg.get_pixels_by_source_instance(
            [header.SOPInstanceUID for header in headers], combine_segments=True, assert_missing_frames_are_empty=True
        )
        affine = nib.load(case.label).affine
        for header, frame in zip(headers, frames, strict=True):
            place = np.array([*header.ImagePositionPatient, 1.0], dtype=float) * [-1, -1, 1, 1]
            number = int(np.round(np.linalg.solve(affine, place)[2]))
            assert np.array_equal(np.array([0, *values])[frame], case.truth[:, :, number].T)
    assert support(hospital)["cases"] == 2


def test_results_lie_on_the_series_grid(hospital):
    for name in ("query", "mr"):
        case = hospital.patients[name]
        image, params = infer(hospital, name)
        geometry = read_image(case.folder).geometry
        assert image.shape == geometry.native_shape
        assert np.allclose(image.affine, geometry.affine, atol=1e-4)
        assert used(params) == {hospital.patients[other].uid for other in ("first", "second")}
    # What is not approved does not come to the archive.
    assert len(hospital.archive.series("SEG")) == 2


def test_a_corrected_label_guides_the_next_image(hospital):
    approve(hospital, "query")
    _, params = infer(hospital, "next")
    assert hospital.patients["query"].uid in used(params)
    assert np.array_equal(label_of(hospital, "query"), hospital.patients["query"].truth)
    lines = (hospital.server.state / "audit.jsonl").read_text().splitlines()
    assert [json.loads(line)["action"] for line in lines] == ["approve"] * 3


def test_approved_labels_come_back_from_the_archive_after_the_state_is_lost(hospital):
    hospital.server.stop()
    shutil.rmtree(hospital.server.state)
    hospital.server.start()
    assert support(hospital)["cases"] == 3
    for name in ("first", "second", "query"):
        assert np.array_equal(label_of(hospital, name), hospital.patients[name].truth)
    _, params = infer(hospital, "next")
    assert used(params) == {hospital.patients[name].uid for name in ("first", "second", "query")}
    assert set(params["label_names"].items()) == {(name, value) for value, name in CLASS_NAMES.items()}


def test_the_latest_segmentation_wins_unless_no_person_made_it(hospital):
    case = hospital.patients["first"]
    geometry = read_image(case.folder).geometry
    labels = read_label(case.label, geometry)
    changed = np.where(labels == 1, 9, labels)
    # An empty slice among others, and values with a gap.
    changed[3] = 0
    store(hospital, "first", changed, approved=True)
    assert np.array_equal(label_of(hospital, "first"), geometry.to_native(changed))
    assert "gas" in ask(hospital, "GET", "/info/").json()["labels"]
    store(hospital, "first", np.where(labels > 0, 2, 0), approved=False)
    assert np.array_equal(label_of(hospital, "first"), geometry.to_native(changed))
    assert len(segmentations(hospital, "first")) == 3


def test_what_is_deleted_in_the_archive_leaves_the_support_set(hospital):
    for identifier, _ in segmentations(hospital, "first"):
        request = urllib.request.Request(f"{hospital.archive.url}/series/{identifier}", method="DELETE")
        urllib.request.urlopen(request, timeout=WAIT).close()
    assert label_of(hospital, "first") is None
    _, params = infer(hospital, "next")
    assert used(params) == {hospital.patients[name].uid for name in ("second", "query")}


def test_what_is_removed_here_stays_in_the_archive(hospital):
    case = hospital.patients["second"]
    assert ask(hospital, "DELETE", "/datastore/label", params={"id": case.uid, "tag": "final"}).ok
    assert label_of(hospital, "second") is None and len(segmentations(hospital, "second")) == 1
    assert support(hospital)["cases"] == 1
    approve(hospital, "second")
    assert np.array_equal(label_of(hospital, "second"), case.truth) and support(hospital)["cases"] == 2


def test_requests_that_would_harm_the_archive_are_refused(hospital):
    case, count = hospital.patients["mr"], len(hospital.archive.series("SEG"))
    empty = nib.Nifti1Image(np.zeros_like(case.truth), nib.load(case.label).affine).to_bytes()
    files = {"label": ("label.nii.gz", gzip.compress(empty))}
    query = {"image": case.uid, "tag": "final"}
    assert ask(hospital, "PUT", "/datastore/label", params=query, files=files).status_code == 422
    wrong = {"label": ("label.nii.gz", gzip.compress(nib.Nifti1Image(case.truth[:9], np.eye(4)).to_bytes()))}
    assert ask(hospital, "PUT", "/datastore/label", params=query, files=wrong).status_code == 422
    for uid in ("1.2.3", "../../1.2", "1.2*", ""):
        files = {"label": ("label.nii.gz", case.label.read_bytes())}
        answer = ask(hospital, "PUT", "/datastore/label", params={"image": uid, "tag": "final"}, files=files)
        assert answer.status_code in (400, 404), (uid, answer.text)
    assert ask(hospital, "DELETE", "/datastore/image", params={"id": case.uid}).status_code == 403
    assert ask(hospital, "PUT", "/datastore/image", files={"file": ("a.nii.gz", empty)}).status_code in (403, 415)
    assert ask(hospital, "GET", "/proxy/dicom/qido/studies").ok
    for path in ("/proxy/dicom/stow/studies", "/proxy/dicom/wado/studies", "/proxy/dicom/studies"):
        assert ask(hospital, "POST", path, data=b"x").status_code == 403
    assert len(hospital.archive.series("SEG")) == count and len(hospital.archive.series("MR")) == 1
