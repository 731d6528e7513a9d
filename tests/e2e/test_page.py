"""The support page in a real browser, on a real server."""

import json
import re
import shutil
from base64 import b64encode
from pathlib import Path

import pytest
import requests
from monailabel.client import MONAILabelClient
from playwright.sync_api import expect

from sam2sgp.data import load_datalist
from tests.e2e.browsers import keep, page
from tests.e2e.proxies import PASSWORD, USER, nginx
from tests.e2e.server import serving


@pytest.fixture(scope="module")
def server(phantoms, tmp_path_factory):
    """Pictures of ultrasound phantoms: three have an approved label, two a prediction."""
    folder = tmp_path_factory.mktemp("page")
    studies = folder / "studies"
    for tag in ("final", "original"):
        (studies / "labels" / tag).mkdir(parents=True)
    cases = [case for case in load_datalist(phantoms) if str(case["image"]).endswith(".png")][:8]
    for place, case in enumerate(cases):
        shutil.copy(case["image"], studies / f"{case['name']}.png")
        if place < 5:
            tag = "final" if place < 3 else "original"
            shutil.copy(case["label"], studies / "labels" / tag / f"{case['name']}.png")
    with serving(folder, studies, {"user_header": "X-Remote-User"}) as found:
        yield found


@pytest.fixture
def opened(server):
    with page() as found:
        found.problems = []
        found.on("console", lambda message: found.problems.append(message.text) if message.type == "error" else None)
        found.on("requestfailed", lambda request: found.problems.append(request.url))
        found.goto(f"{server.url}/sam2sgp/", wait_until="networkidle")
        yield found


def count(opened, section: str) -> int:
    text = opened.locator(f"header a[href='#{section}']").inner_text()
    return int(re.search(r"\d+", text)[0])


def ids(server, tag: str) -> set[str]:
    return {path.stem for path in (Path(server.studies) / "labels" / tag).glob("*.png")}


def segment(server) -> dict[str, list[dict]]:
    """The support items used for an unlabelled image, by class."""
    labelled = ids(server, "final") | ids(server, "original") | ids(server, "removed")
    image = max({path.stem for path in Path(server.studies).glob("*.png")} - labelled)
    answer = requests.post(f"{server.url}/infer/sam2sgp?image={image}&output=json")
    assert answer.status_code == 200, answer.text
    return answer.json()["support"]


def press(opened, action: str, key: str | None = None) -> str:
    """Press the first button of an action, by mouse or by key, and wait for the new page; the image's id."""
    button = opened.locator(f"button[data-action={action}]").first
    image = button.get_attribute("data-image")
    with opened.expect_response(lambda response: response.url.endswith(f"/sam2sgp/{action}")) as answer:
        if key:
            button.focus()
            opened.keyboard.press(key)
        else:
            button.click()
    assert answer.value.status == 200
    expect(opened.locator(f"button[data-action={action}][data-image='{image}']")).to_have_count(0)
    opened.wait_for_load_state("networkidle")
    return image


def test_the_loop_of_decisions_in_clicks_and_keys(server, opened):
    assert (count(opened, "waiting"), count(opened, "support")) == (2, 3)
    shown = opened.evaluate("[...document.images].filter(i => i.complete && i.naturalWidth > 1).length")
    assert shown >= 5
    keep(opened, "support_page")

    approved = press(opened, "approve")
    assert approved in ids(server, "final") and approved not in ids(server, "original")
    assert (count(opened, "waiting"), count(opened, "support")) == (1, 4)

    rejected = press(opened, "reject", key="Enter")
    assert rejected not in ids(server, "final") | ids(server, "original")
    assert (count(opened, "waiting"), count(opened, "support")) == (0, 4)

    removed = press(opened, "remove", key="Space")
    assert removed in ids(server, "removed") and removed not in ids(server, "final")
    assert count(opened, "support") == 3
    used = {item["image"] for items in segment(server).values() for item in items}
    assert used == ids(server, "final")

    restored = press(opened, "restore")
    assert restored == removed and restored in ids(server, "final")
    assert count(opened, "support") == 4
    assert opened.problems == []


def test_use_is_counted(server, opened):
    name = next(iter(segment(server).values()))[0]["image"]
    opened.reload(wait_until="networkidle")
    entry = opened.locator("#support li", has=opened.locator("b", has_text=re.compile(f"^{re.escape(name)}$")))
    assert int(re.search(r"used (\d+) time", entry.inner_text())[1]) >= 1


def test_a_decision_that_was_made_elsewhere_is_said_and_nothing_is_lost(server, opened):
    button = opened.locator("button[data-action=remove]").first
    button.evaluate("button => button.dataset.labelTag = 'nowhere'")
    before = ids(server, "final")
    button.click()
    expect(opened.locator("#message.error")).to_contain_text("expected a label with the tag 'nowhere'")
    assert ids(server, "final") == before


def test_other_sites_can_not_decide(server):
    image = next(iter(ids(server, "final")))
    decision = {"image": image, "label_tag": "final"}
    foreign = requests.post(f"{server.url}/sam2sgp/remove", json=decision, headers={"Origin": "https://evil.example"})
    form = requests.post(f"{server.url}/sam2sgp/remove", data=decision)
    outside = requests.get(f"{server.url}/sam2sgp/picture?image=../../etc/passwd")
    assert [answer.status_code // 100 for answer in (foreign, form, outside)] == [4, 4, 4]
    assert image in ids(server, "final")
    policy = requests.get(f"{server.url}/sam2sgp/").headers["content-security-policy"]
    assert "default-src 'none'" in policy


def test_an_approved_label_is_not_deleted_by_rejecting(server):
    image = next(iter(ids(server, "final")))
    answer = requests.post(f"{server.url}/sam2sgp/reject", json={"image": image, "label_tag": "final"})
    assert answer.status_code == 422 and "only a prediction" in answer.json()["detail"]
    assert image in ids(server, "final")


def test_through_the_proxy_everything_works_and_the_audit_log_says_who_it_was(server, tmp_path):
    image = next(iter(ids(server, "final")))
    with nginx(tmp_path, int(server.url.rpartition(":")[2])) as proxy, requests.Session() as session:
        session.trust_env, session.verify = False, str(proxy.certificate)
        assert session.get(f"{proxy.url}/sam2sgp/").status_code == 401
        session.auth = USER, PASSWORD
        assert "Support set" in session.get(f"{proxy.url}/sam2sgp/").text
        assert "OHIF" in session.get(f"{proxy.url}/ohif/").text
        for action, tag in (("remove", "final"), ("restore", "removed")):
            decision = {"image": image, "label_tag": tag}
            headers = {"Origin": proxy.url, "X-Remote-User": "somebody else"}
            assert session.post(f"{proxy.url}/sam2sgp/{action}", json=decision, headers=headers).status_code == 200
        client = MONAILabelClient(proxy.url)
        token = b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        client.update_auth({"token_type": "Basic", "access_token": token})
        assert client.info()["name"] == "SAM2-SGP"
    lines = [json.loads(line) for line in (server.state / "audit.jsonl").read_text().splitlines()]
    assert {line["user"] for line in lines if line["image"] == image and line["tag"] == "removed"} == {USER}
