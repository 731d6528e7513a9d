"""The support page in a real browser, on a real server."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest
import requests
from playwright.sync_api import expect

from sam2sgp.data import load_datalist
from sam2sgp.data.phantom import make_phantoms
from tests.e2e.browsers import browser, keep, page
from tests.e2e.proxies import PASSWORD, USER, nginx
from tests.e2e.server import serving

# Seconds in which an approved label is encoded, also by a machine with much else to do.
LONGEST_JOINING = 60.0


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Pictures of ultrasound phantoms: three have an approved label, two a prediction."""
    folder = tmp_path_factory.mktemp("page")
    studies = folder / "studies"
    for tag in ("final", "original"):
        (studies / "labels" / tag).mkdir(parents=True)
    make_phantoms(folder / "set", 8, size=(64, 64), num_slices=6, modalities=("us",), progress=False)
    for place, case in enumerate(load_datalist(folder / "set")[:8]):
        shutil.copy(case["image"], studies / f"{case['name']}.png")
        if place < 5:
            tag = "final" if place < 3 else "original"
            shutil.copy(case["label"], studies / "labels" / tag / f"{case['name']}.png")
    with serving(folder, studies, {"image_size": "64", "user_header": "X-Remote-User"}) as found:
        yield found


@pytest.fixture(scope="module")
def chromium():
    with browser() as found:
        yield found


@pytest.fixture
def opened(server, chromium):
    with page(of=chromium) as found:
        found.problems = []
        found.on("console", lambda message: found.problems.append(message.text) if message.type == "error" else None)
        # A page that is left cancels what it still loads.
        found.on(
            "requestfailed",
            lambda request: found.problems.append(request.url) if request.failure != "net::ERR_ABORTED" else None,
        )
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


def join(opened) -> None:
    """Wait until approved labels are in the support set; the page waits half a second, then says that they will be."""
    end = time.monotonic() + LONGEST_JOINING
    while opened.locator("#support").get_by_text("as soon as the image").count() and time.monotonic() < end:
        opened.reload(wait_until="networkidle")


def test_the_loop_of_decisions_in_clicks_and_keys(server, opened):
    assert (count(opened, "waiting"), count(opened, "support")) == (2, 3)
    shown = opened.evaluate("[...document.images].filter(i => i.complete && i.naturalWidth > 1).length")
    assert shown >= 5
    keep(opened, "support_page")

    approved = press(opened, "approve")
    assert approved in ids(server, "final") and approved not in ids(server, "original")
    join(opened)
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
    join(opened)
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


def test_a_prediction_that_changed_since_it_was_shown_is_not_approved(server, opened):
    image, labels = min(ids(server, "final")), Path(server.studies) / "labels"
    other = max({path.stem for path in Path(server.studies).glob("*.png")} - ids(server, "final"))
    shutil.copy(labels / "final" / f"{image}.png", labels / "original" / f"{other}.png")
    opened.reload(wait_until="networkidle")
    button = opened.locator(f"button[data-action=approve][data-image='{other}']")
    # A batch inference puts another prediction in its place.
    with open(labels / "final" / f"{image}.png", "rb") as file:
        query = {"image": other, "tag": "original"}
        assert requests.put(f"{server.url}/datastore/label", params=query, files={"label": file}).ok
    button.click()
    expect(opened.locator("#message.error")).to_contain_text("expected the label that was shown, found a newer one")
    assert other not in ids(server, "final")
    opened.reload(wait_until="networkidle")
    with opened.expect_response(lambda response: response.url.endswith("/sam2sgp/approve")) as answer:
        button.click()
    assert answer.value.status == 200 and other in ids(server, "final")
    assert requests.delete(f"{server.url}/datastore/label", params={"id": other, "tag": "final"}).ok


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


MARKUP = "\"><img src=x onerror=hacked=1><script>hacked=1<script>'&amp;"


def test_names_that_are_markup_are_shown_as_they_are_and_run_nothing(server, opened):
    studies = Path(server.studies)
    image, label = next((studies / "labels" / "final").glob("*.png")), "</span><script>hacked=1</script>"
    shutil.copy(studies / image.name, studies / f"{MARKUP}.png")
    query = {"image": MARKUP, "tag": "final"}
    with open(image, "rb") as file:
        names = {"label_info": [{"idx": value, "name": f"{value}{label}"} for value in range(1, 10)]}
        data = {"params": json.dumps(names)}
        answer = requests.put(f"{server.url}/datastore/label", params=query, data=data, files={"label": file})
    assert answer.ok, answer.text
    try:
        opened.reload(wait_until="networkidle")
        entry = opened.locator(f"#support li:has(b:text-is({json.dumps(MARKUP)}))")
        expect(entry).to_have_count(1)
        expect(opened.locator("#support .class").first).to_contain_text(label)
        entry.get_by_role("button", name="Remove").click()
        waiting = opened.locator(f"#support li:has(b:text-is({json.dumps(MARKUP)}))")
        expect(waiting.get_by_role("button", name="Restore")).to_be_visible()
        opened.wait_for_load_state("networkidle")
        broken = "[...document.images].filter(image => image.complete && !image.naturalWidth).length"
        assert opened.evaluate(broken) == 0 and opened.evaluate("typeof hacked") == "undefined"
        assert opened.locator("main script, main img[onerror]").count() == 0 and opened.problems == []
    finally:
        assert requests.delete(f"{server.url}/datastore/image", params={"id": MARKUP}).ok


def test_long_lists_are_turned_over_page_by_page_with_the_keys_alone(server, opened):
    studies = Path(server.studies)
    source = next(studies.glob("*.png"))
    names = [f"zz_{number:03d}" for number in range(60)]
    for name in names:
        (studies / f"{name}.png").hardlink_to(source)
    try:
        opened.reload(wait_until="networkidle")
        total = count(opened, "next")
        seen = []
        for page_number in range(1, -(-total // 24) + 1):
            expect(opened.locator("#next .pages")).to_contain_text(f"Page {page_number} of {-(-total // 24)}")
            seen += opened.locator("#next li b").all_inner_texts()
            following = opened.locator("#next .pages a[rel=next]")
            if not following.count():
                break
            # From the last picture's section the next stop of the Tab key.
            opened.locator("#next h2").evaluate("heading => { heading.tabIndex = -1; heading.focus(); }")
            for _ in range(3):
                opened.keyboard.press("Tab")
                if following.evaluate("link => link === document.activeElement"):
                    break
            with opened.expect_navigation(wait_until="networkidle"):
                opened.keyboard.press("Enter")
        assert len(seen) == total == len(set(seen)) and set(names) <= set(seen)
        assert opened.problems == []
    finally:
        for name in names:
            (studies / f"{name}.png").unlink()


def test_an_adaptation_is_started_by_its_button_and_what_is_in_its_way_is_said(opened):
    asked = []

    def busy(route):
        asked.append(route.request.post_data)
        route.fulfill(status=429, json={"detail": "train: expected none that runs, found one; wait."})

    opened.route("**/train/adapt", busy)
    button = opened.get_by_role("button", name="Adapt for a minute")
    button.click()
    expect(opened.locator("#message.error")).to_have_text("train: expected none that runs, found one; wait.")
    expect(button).to_be_focused()
    opened.unroute("**/train/adapt")
    opened.route("**/train/adapt", lambda route: route.fulfill(json={"id": "1", "status": "SUBMITTED"}))
    button.click()
    expect(opened.locator("#message")).to_contain_text("It has begun, and takes a minute.")
    expect(button).to_be_disabled()
    assert asked == ["{}"]
    # The browser notes the refusal, too.
    assert all("429" in problem for problem in opened.problems)


def test_every_button_is_reached_by_the_tab_key_and_shows_where_it_is(opened):
    reached, order = [], opened.locator("a[href], button:visible").count()
    for _ in range(order):
        opened.keyboard.press("Tab")
        reached.append(
            opened.evaluate(
                "[document.activeElement.outerHTML, getComputedStyle(document.activeElement).outlineStyle,"
                " document.activeElement.getAttribute('aria-label') || document.activeElement.innerText]"
            )
        )
    assert len({html for html, *_ in reached}) == order
    assert all(outline != "none" and name.strip() for _, outline, name in reached)
    assert {name.split()[0] for *_, name in reached} >= {"Waiting", "Support", "Training", "Remove"}


def test_through_the_proxy_decisions_are_made_and_the_audit_log_says_who_made_them(server, tmp_path):
    image = min(ids(server, "final"))
    log = server.state / "audit.jsonl"
    before = len(log.read_text().splitlines())
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
    lines = [json.loads(line) for line in log.read_text().splitlines()[before:]]
    assert {line["image"] for line in lines} == {image} and {line["user"] for line in lines} == {USER}
    assert [line["action"] for line in lines].count("approve") == 1
