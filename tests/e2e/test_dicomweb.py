"""The loop of segmenting, correcting and approving on a real DICOMweb archive: Orthanc and a server process.

The tests run in this order on one archive and one server, as a working day would.
"""

import gzip
import io
import json
import shutil
import socket
import time
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
import requests
from requests_toolbelt import MultipartDecoder

from lib.stores import series_cache
from lib.stores.dicomweb import DicomWebDatastore
from sam2sgp.data import read_image, read_label, write_dicom_seg
from sam2sgp.data.phantom_scenes import CLASS_NAMES
from tests.e2e.hospital import LABEL_INFO, patient, picture, series_uid
from tests.e2e.orthanc import orthanc
from tests.e2e.server import Server

WAIT = 60
# Seconds for an answer that waits for nothing, on a machine that is busy with other things.
QUICK = 3.0
# Lists are asked for at each request.
CONF = {
    "image_size": "64",
    "k": "8",
    "slices_per_class": "2",
    "dicomweb_expiry": "0",
    "dicomweb_timeout": "8",
    "max_connections": "40",
}


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
                archive=archive,
                server=server,
                patients=patients,
                ultrasound=series_uid(ultrasound),
                root=root,
                temporary=root / "tmp",
            )
        finally:
            server.stop()


def ask(hospital, method, path, **options):
    return requests.request(method, f"{hospital.server.url}{path}", timeout=WAIT, **options)


def approve(hospital, name, label=None):
    """Send the truth about a patient, or another label."""
    case = hospital.patients[name]
    answer = ask(
        hospital,
        "PUT",
        "/datastore/label",
        params={"image": case.uid, "tag": "final"},
        data={"params": json.dumps({"label_info": LABEL_INFO})},
        files={"label": ("label.nii.gz", label or case.label.read_bytes())},
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


def dice(hospital, name) -> float:
    """Mean Dice over the classes of what is found in a series."""
    truth, found = hospital.patients[name].truth, np.asarray(infer(hospital, name)[0].dataobj)
    pairs = [(truth == value, found == value) for value in CLASS_NAMES]
    return float(np.mean([2 * (a & b).sum() / max((a.sum() + b.sum()), 1) for a, b in pairs]))


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
    approve(hospital, "first")
    hospital.dice_with_one_label = dice(hospital, "next")
    approve(hospital, "second")
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
    # 0.79 and 0.82 when this was written.
    assert dice(hospital, "next") > hospital.dice_with_one_label + 0.01
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
    before = len(segmentations(hospital, "first"))
    changed = np.where(labels == 1, 9, labels)
    # An empty slice among others, and values with a gap.
    changed[3] = 0
    store(hospital, "first", changed, approved=True)
    assert np.array_equal(label_of(hospital, "first"), geometry.to_native(changed))
    eventually(lambda: "gas" in ask(hospital, "GET", "/info/").json()["labels"])
    store(hospital, "first", np.where(labels > 0, 2, 0), approved=False)
    assert np.array_equal(label_of(hospital, "first"), geometry.to_native(changed))
    assert len(segmentations(hospital, "first")) == before + 2


def test_viewers_search_and_read_through_the_server(hospital):
    case = hospital.patients["mr"]
    studies = ask(hospital, "GET", "/proxy/dicom/qido/studies", params={"PatientID": "mr"}).json()
    assert [entry["0020000D"]["Value"] for entry in studies] == [[case.study]]
    # As OHIF asks for its list of studies.
    query = {"limit": 101, "offset": 0, "fuzzymatching": "true", "includefield": "00081030,00080060"}
    found = ask(hospital, "GET", "/proxy/dicom/qido/studies", params=query).json()
    assert {entry["0020000D"]["Value"][0] for entry in found} >= {other.study for other in hospital.patients.values()}
    path = f"/proxy/dicom/wado/studies/{case.study}/series/{case.uid}"
    headers = ask(hospital, "GET", f"{path}/metadata").json()
    assert len(headers) == case.truth.shape[2]
    instance = headers[0]["00080018"]["Value"][0]
    answer = ask(hospital, "GET", f"{path}/instances/{instance}/frames/1")
    pixels = pydicom.dcmread(next(file for file in case.folder.iterdir() if _instance(file) == instance)).PixelData
    assert answer.headers["content-type"].startswith("multipart/related") and pixels in answer.content
    assert ask(hospital, "GET", "/proxy/dicom/wado/studies/1.2.3/metadata").status_code in (200, 404)


def _instance(file) -> str:
    return pydicom.dcmread(file, stop_before_pixels=True).SOPInstanceUID


@pytest.mark.parametrize("name", ["query", "mr"])
def test_a_result_is_given_as_dicom_segmentation_to_the_voxel(hospital, name):
    case = hospital.patients[name]
    image, params = infer(hospital, name)
    answer = ask(hospital, "POST", "/infer/sam2sgp", params={"image": case.uid, "output": "dicom_seg"})
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/dicom"
    same_voxels(answer.content, case, image, params["label_names"])
    # What is not approved does not come to the archive, and nothing is left on the server.
    assert len(segmentations(hospital, name)) == (1 if name == "query" else 0)


def same_voxels(content: bytes, case, image: nib.Nifti1Image, label_names: dict[str, int]) -> None:
    """Compare a SEG with a class map, slice by slice of the source."""
    expected, affine = np.asarray(image.dataobj), image.affine
    seg = highdicom.seg.segread(io.BytesIO(content))
    assert {segment.SegmentAlgorithmType for segment in seg.SegmentSequence} == {"AUTOMATIC"}
    names = {value: name for name, value in label_names.items() if (expected == value).any()}
    assert len(names) >= 3
    assert [segment.SegmentLabel for segment in seg.SegmentSequence] == list(names.values())
    headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in case.folder.iterdir()]
    frames = seg.get_pixels_by_source_instance(
        [header.SOPInstanceUID for header in headers], combine_segments=True, assert_missing_frames_are_empty=True
    )
    for header, frame in zip(headers, frames, strict=True):
        place = np.array([*header.ImagePositionPatient, 1.0], dtype=float) * [-1, -1, 1, 1]
        number = int(np.round(np.linalg.solve(affine, place)[2]))
        assert np.array_equal(np.array([0, *names])[frame], expected[:, :, number].T)


def test_images_of_a_session_and_sent_along_are_given_as_dicom_segmentation_too(hospital):
    case = hospital.patients["mr"]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for file in case.folder.iterdir():
            archive.write(file, f"mr/{file.name}")
    files = {"files": ("mr.zip", packed.getvalue())}
    session = ask(hospital, "PUT", "/session/", params={"uncompress": "true"}, files=files).json()["session_id"]
    image, params = infer(hospital, "mr")
    answer = ask(hospital, "POST", "/infer/sam2sgp", params={"session_id": session, "output": "dicom_seg"})
    assert answer.status_code == 200, answer.text
    same_voxels(answer.content, case, image, params["label_names"])
    slice_file = sorted(case.folder.iterdir())[4]
    answer = ask(
        hospital,
        "POST",
        "/infer/sam2sgp",
        params={"output": "dicom_seg"},
        files={"file": ("slice.dcm", slice_file.read_bytes())},
    )
    assert answer.status_code == 200, answer.text
    seg = highdicom.seg.segread(io.BytesIO(answer.content))
    assert [uid for *_, uid in seg.get_source_image_uids()] == [_instance(slice_file)]
    volume_file = {"file": ("mr.nii.gz", case.label.read_bytes())}
    answer = ask(hospital, "POST", "/infer/sam2sgp", params={"output": "dicom_seg"}, files=volume_file)
    assert answer.status_code == 400 and "expected an image from DICOM" in answer.json()["detail"]


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


def test_an_image_without_any_class_is_approved_as_an_empty_segmentation(hospital):
    case = hospital.patients["mr"]
    empty = nib.Nifti1Image(np.zeros_like(case.truth), nib.load(case.label).affine).to_bytes()
    approve(hospital, "mr", gzip.compress(empty))
    [(_, seg)] = segmentations(hospital, "mr")
    assert [segment.SegmentLabel for segment in seg.SegmentSequence] == list(CLASS_NAMES.values())
    assert {segment.SegmentAlgorithmType for segment in seg.SegmentSequence} == {"SEMIAUTOMATIC"}
    assert seg.NumberOfFrames == len(CLASS_NAMES) and not seg.pixel_array.any()
    [series] = seg.ReferencedSeriesSequence
    assert {entry.ReferencedSOPInstanceUID for entry in series.ReferencedInstanceSequence} == {
        _instance(file) for file in case.folder.iterdir()
    }
    # A negative example is one of the support set, here and on a server that knows nothing but the archive.
    assert not label_of(hospital, "mr").any()
    _, params = infer(hospital, "next")
    assert support(hospital)["cases"] == 3 and support(hospital)["errors"] == []
    fresh = DicomWebDatastore(hospital.archive.dicomweb, hospital.root / "fresh", 1 << 30, patience=WAIT)
    assert not np.asarray(nib.load(fresh.get_label_uri(case.uid, "final")).dataobj).any()
    assert {entry["name"] for entry in fresh.get_label_info(case.uid, "final")["label_info"]} == set(
        CLASS_NAMES.values()
    )


def test_copies_of_series_go_when_the_disk_is_needed_unless_they_have_a_label(hospital, monkeypatch):
    datastore = DicomWebDatastore(
        hospital.archive.dicomweb, hospital.root / "small", 1 << 30, cache_gb=0.0, patience=WAIT
    )
    labelled, first, second, third = (hospital.patients[name].uid for name in ("query", "first", "next", "mr"))
    paths = {uid: Path(datastore.get_image_uri(uid)) for uid in (labelled, first, second)}
    # In use until now.
    assert all(path.is_dir() for path in paths.values())
    monkeypatch.setattr(series_cache, "IN_USE", -1.0)
    datastore.remove_label(third, "final")
    datastore.get_image_uri(third)
    assert [path.is_dir() for path in paths.values()] == [True, False, False]
    assert [datastore.is_at_hand(uid) for uid in paths] == [True, False, False]
    monkeypatch.undo()
    assert {_instance(file) for file in Path(datastore.get_image_uri(first)).iterdir()} == {
        _instance(file) for file in hospital.patients["first"].folder.iterdir()
    }


def test_requests_that_would_harm_the_archive_are_refused(hospital):
    case, count = hospital.patients["mr"], len(hospital.archive.series("SEG"))
    query = {"image": case.uid, "tag": "final"}
    wrong = {"label": ("label.nii.gz", gzip.compress(nib.Nifti1Image(case.truth[:9], np.eye(4)).to_bytes()))}
    assert ask(hospital, "PUT", "/datastore/label", params=query, files=wrong).status_code == 422
    for uid in ("1.2.3", "../../1.2", "1.2*", ""):
        files = {"label": ("label.nii.gz", case.label.read_bytes())}
        answer = ask(hospital, "PUT", "/datastore/label", params={"image": uid, "tag": "final"}, files=files)
        assert answer.status_code in (400, 404), (uid, answer.text)
    assert ask(hospital, "DELETE", "/datastore/image", params={"id": case.uid}).status_code == 403
    assert ask(hospital, "PUT", "/datastore/image", files={"file": ("a.nii.gz", b"x")}).status_code in (403, 415)
    assert ask(hospital, "GET", "/proxy/dicom/qido/studies").ok
    # What else the archive has addresses for, such as its list of other archives.
    for path in ("servers", "qido/servers", "wado/../system", "", "instancesx"):
        assert ask(hospital, "GET", f"/proxy/dicom/{path}").status_code in (400, 404)
    for path in ("/proxy/dicom/stow/studies", "/proxy/dicom/wado/studies", "/proxy/dicom/studies"):
        for content in (b"x", b"{}"):
            assert ask(hospital, "POST", path, data=content).status_code in (400, 405)
    assert len(hospital.archive.series("SEG")) == count and len(hospital.archive.series("MR")) == 1


def test_a_start_needs_no_archive_and_a_silent_one_stops_only_who_needs_it(hospital):
    case, before = hospital.patients["mr"], support(hospital)["cases"]
    known = ask(hospital, "GET", "/datastore/").json()["total"]
    hospital.server.stop()
    hospital.temporary.mkdir()
    hospital.server.conf["dicomweb_expiry"] = "1"
    with hospital.archive.silent():
        hospital.server.start({"TMPDIR": str(hospital.temporary)})
        eventually(lambda: not archive_state(hospital)["reachable"])
        assert ask(hospital, "GET", "/datastore/").json()["total"] == support(hospital)["cases"] == 0
        assert ask(hospital, "POST", "/infer/sam2sgp", params={"image": case.uid}).status_code in (502, 503)
    eventually(lambda: support(hospital)["cases"] == before)
    assert archive_state(hospital) == {"reachable": True, "since": None, "problem": None, "labels_to_fetch": 0}
    assert ask(hospital, "GET", "/datastore/").json()["total"] == known
    infer(hospital, "mr")

    with hospital.archive.silent(), ThreadPoolExecutor(1) as threads:
        viewer = threads.submit(ask, hospital, "GET", "/proxy/dicom/qido/studies")
        for path in ("/info/", "/datastore/", "/datastore/?output=all", "/sam2sgp/") * 3:
            started = time.monotonic()
            answer = ask(hospital, "GET", path)
            assert answer.status_code == 200 and time.monotonic() - started < QUICK, path
        assert ask(hospital, "GET", "/datastore/").json()["total"] == known and support(hospital)["cases"] == before
        # What is here needs no archive.
        infer(hospital, "mr")
        eventually(lambda: not archive_state(hospital)["reachable"])
        assert "found no answer" in archive_state(hospital)["problem"]
        assert "The archive gives no lists" in ask(hospital, "GET", "/sam2sgp/").text
        assert viewer.result().status_code == 502 and "archive: expected" in viewer.result().json()["detail"]
    eventually(lambda: archive_state(hospital)["reachable"])


def test_half_open_connections_lock_nobody_out(hospital):
    address = "127.0.0.1", int(hospital.server.url.rpartition(":")[2])
    with ExitStack() as stack:
        for number in range(200):
            connection = stack.enter_context(socket.create_connection(address))
            connection.sendall(b"GET /info/ HTTP/1.1\r\n" if number % 2 else b"")
        started = time.monotonic()
        assert ask(hospital, "GET", "/info/").ok and time.monotonic() - started < QUICK
    log = hospital.server.state / "logs" / "server.log"
    assert log.stat().st_mode & 0o777 == 0o600
    assert log.read_text().count("Too many connections") == 10
    assert ask(hospital, "GET", "/logs/", params={"lines": 5}).text.count("\n") == 5
    shared = hospital.server.app / "logs" / "app.log"
    assert not shared.exists() or shared.stat().st_mode & 0o077 == 0


def test_nothing_is_left_of_refused_uploads(hospital):
    case = hospital.patients["mr"]
    [temporary] = hospital.temporary.glob("sam2sgp.*")
    wrong = {"label": ("label.nii.gz", gzip.compress(nib.Nifti1Image(case.truth[:9], np.eye(4)).to_bytes()))}
    for uid in (case.uid, "1.2.3", "../1.2"):
        query = {"image": uid, "tag": "final"}
        assert ask(hospital, "PUT", "/datastore/label", params=query, files=wrong).status_code in (400, 404, 422)
    image = {"file": ("a.nii.gz", case.label.read_bytes())}
    assert ask(hospital, "PUT", "/datastore/image", params={"image": "a"}, files=image).status_code == 403
    assert [path.name for path in temporary.iterdir()] == [".lock"]


def archive_state(hospital) -> dict:
    return ask(hospital, "GET", "/info/").json()["archive"]


def eventually(condition) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)
