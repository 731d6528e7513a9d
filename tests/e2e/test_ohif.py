"""OHIF, as MONAI Label brings it, in Chromium: a study is segmented from the panel, and the next one is told."""

import gzip
import json
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import requests

from sam2sgp.data import read_image
from sam2sgp.data.phantom_scenes import CLASS_NAMES
from tests.e2e import browsers
from tests.e2e.hospital import LABEL_INFO, patient
from tests.e2e.orthanc import orthanc
from tests.e2e.proxies import PASSWORD, USER, nginx
from tests.e2e.server import Server

WAIT = 60
# Of a browser's requests; OHIF's own page also looks for a font elsewhere.
DATA = ("xhr", "fetch")
CONF = {"image_size": "96", "k": "8", "slices_per_class": "2"}
# What OHIF holds: values of its segments and their names, and the voxels of overlay and image, columns first.
OVERLAY = """() => {
    const [segmentation] = services.segmentationService.getSegmentations();
    const volume = services.segmentationService.getLabelmapVolume('1');
    const names = {};
    for (const segment of Object.values(segmentation.segments || segmentation.config.segments)) {
        names[segment.label] = segment.segmentIndex;
    }
    return {names, shape: volume.dimensions, voxels: Array.from(volume.voxelManager.getCompleteScalarDataArray())};
}"""
IMAGE = """() => {
    const volume = cornerstone.cache.getVolumes().find(volume => volume.volumeId !== '1');
    return Array.from(volume.voxelManager.getCompleteScalarDataArray());
}"""


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    root = tmp_path_factory.mktemp("ohif")
    patients = {name: patient(root / "series", name, "ct", seed) for seed, name in enumerate(("a", "b"), 1)}
    # Stored from the highest slice to the lowest, of a patient who lies on the belly.
    turned = {"orientation": (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0), "spacing": (-3.0, 0.8, 0.8), "SliceThickness": 3.0}
    patients["query"] = patient(root / "series", "query", "ct", 3, **turned)
    folder = root / "orthanc"
    folder.mkdir()
    with orthanc(folder) as archive:
        for entry in patients.values():
            archive.upload(entry.folder)
        server = Server(root, archive.dicomweb, CONF)
        try:
            server.start()
            for name in ("a", "b"):
                answer = requests.put(
                    f"{server.url}/datastore/label",
                    params={"image": patients[name].uid, "tag": "final"},
                    data={"params": json.dumps({"label_info": LABEL_INFO})},
                    files={"label": ("label.nii.gz", patients[name].label.read_bytes())},
                    timeout=WAIT,
                )
                assert answer.ok, answer.text
            yield SimpleNamespace(server=server, patients=patients, archive=archive)
        finally:
            server.stop()


def open_study(page, url: str, study: str) -> None:
    """A study in OHIF's MONAI Label mode, connected to the server at an address."""
    page.goto(f"{url}/ohif/monai-label?StudyInstanceUIDs={study}")
    page.get_by_text("Confirm and Hide").click()
    page.locator("#monailabelServerURL").fill(f"{url}/")
    page.locator(".settingsTable .actionButton").click()
    page.get_by_text("Auto-Segmentation").wait_for()
    # The overlay comes a little later, and its own volume after that; until then OHIF throws an error.
    page.wait_for_function(
        "() => { try { return services.segmentationService.getLabelmapVolume('1'); } catch { return null; } }"
    )


def run_segmentation(page):
    """The server's answer to a run from the panel, when its overlay is there."""
    with page.expect_response(lambda answer: "/infer/sam2sgp" in answer.url) as waited:
        page.get_by_title("Run Segmentation", exact=True).click()
    page.wait_for_function(f"() => ({OVERLAY})().voxels.some(value => value > 0)")
    return waited.value


@pytest.fixture(scope="module")
def viewer(hospital):
    """The query's study in OHIF's MONAI Label mode, connected to the server."""
    server, query = hospital.server, hospital.patients["query"]
    with browsers.page(1600, 1000) as page:
        refused = []

        def look(answer):
            # Which is how MONAI Label says that no training runs.
            if answer.status >= 400 and not (answer.status == 404 and "check_if_running" in answer.url):
                refused.append((answer.status, answer.url))

        page.on("response", look)
        open_study(page, server.url, query.study)
        yield page
        assert not refused, refused


# Comes before the tests with a viewer, which keep one browser open: Playwright drives one at a time.
def test_through_the_proxy_the_model_is_run_with_a_password_and_its_overlay_is_seen(hospital, tmp_path):
    server, query = hospital.server, hospital.patients["query"]
    login = {"username": USER, "password": PASSWORD}
    with (
        nginx(tmp_path, int(server.url.rpartition(":")[2])) as proxy,
        browsers.page(1600, 1000, ignore_https_errors=True, http_credentials=login) as page,
    ):
        asked = []
        page.on("request", lambda request: asked.append(request.url) if request.resource_type in DATA else None)
        open_study(page, proxy.url, query.study)
        answer = run_segmentation(page)
        assert answer.status == 200 and answer.url.startswith(proxy.url)
        browsers.keep(page, "ohif-proxy")
        overlay = page.evaluate(OVERLAY)
        # No data goes past the proxy.
        assert asked and [url for url in asked if not url.startswith((proxy.url, "blob:", "data:"))] == []
    result = requests.post(f"{server.url}/infer/sam2sgp?image={query.uid}&output=image", timeout=WAIT)
    expected = np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(result.content)).dataobj)
    found = np.reshape(overlay["voxels"], overlay["shape"], order="F")
    for value, name in CLASS_NAMES.items():
        assert np.array_equal(found == overlay["names"][name], expected == value), name


def test_the_model_is_run_from_the_panel_and_its_overlay_lies_on_the_image(hospital, viewer):
    server, query = hospital.server, hospital.patients["query"]
    answer = run_segmentation(viewer)
    assert answer.status == 200 and f"image={query.uid}" in answer.url
    # The message about the success goes away, and the views are drawn.
    viewer.wait_for_timeout(1500)
    browsers.keep(viewer, "ohif-overlay")
    overlay = viewer.evaluate(OVERLAY)
    assert set(overlay["names"]) == set(CLASS_NAMES.values())
    found = np.reshape(overlay["voxels"], overlay["shape"], order="F")
    answer = requests.post(f"{server.url}/infer/sam2sgp?image={query.uid}&output=image", timeout=WAIT)
    expected = np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(answer.content)).dataobj)
    assert set(np.unique(expected)) == {0, *CLASS_NAMES}
    for value, name in CLASS_NAMES.items():
        assert np.array_equal(found == overlay["names"][name], expected == value), name
    # The image's voxels have the same order in OHIF as in the result.
    image = read_image(query.folder)
    native = image.geometry.to_native(image.slices[:, 0])
    assert np.array_equal(np.reshape(viewer.evaluate(IMAGE), native.shape, order="F"), native)


def test_the_next_sample_is_told(hospital, viewer):
    viewer.get_by_text("Active Learning").click()
    with viewer.expect_response(lambda answer: "/activelearning/" in answer.url) as waited:
        viewer.get_by_text("Next Sample", exact=True).click()
    assert waited.value.json()["id"] == hospital.patients["query"].uid
    viewer.get_by_text(hospital.patients["query"].uid).first.wait_for()
    browsers.keep(viewer, "ohif-next-sample")
