"""The support page: its pictures and decisions."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from html import escape
from types import SimpleNamespace

import numpy as np
from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient

from lib.http import page
from lib.http.guard import install, serve_only
from lib.http.page import SupportPage
from lib.serving.adapted import Standing
from lib.serving.segmenter import SupportState
from lib.serving.usage import Usage
from tests.helpers.parts import Given, assert_refused


def test_decisions_on_the_support_page_are_declared_too(app, tmp_path):
    server = FastAPI()
    install(server, Given(tmp_path))
    serve_only(server, [SupportPage(app.datastore(), None, None, sorted, dict).router()])
    client = TestClient(server, base_url="http://server:8000")
    whole = {"image": "a", "label_tag": "original"}
    for action in ("approve", "reject", "remove", "restore"):
        for body in (
            {**whole, "path": "/etc/passwd"},
            {**whole, "label_tag": "../x"},
            {**whole, "image": ["a"]},
            {**whole, "image": "../a"},
            [["image", "a"], ["label_tag", "original"]],
            [whole],
            {"label_tag": "original"},
        ):
            assert_refused(client.post(f"/sam2sgp/{action}", json=body))
    for query in ("?next=0", "?next=x", "?other=1", f"?next={10**30}"):
        assert_refused(client.get(f"/sam2sgp/{query}"))
    assert_refused(client.get("/sam2sgp/picture?image=a&path=/etc/passwd"))
    answer = client.get("/sam2sgp/assets/%1b%5b2J%e2%80%ae")
    assert answer.status_code == 404 and answer.json()["detail"].isprintable()


def test_a_label_leaves_the_support_set_and_joins_it_again_by_its_image_alone(app, tmp_path):
    datastore, label = app.datastore(), tmp_path / "label.png"
    Image.fromarray(np.eye(8, dtype=np.uint8)).save(label)
    datastore.save_label("a", str(label), "final", {"label_info": [{"idx": 1, "name": "disc"}]})
    server = FastAPI()
    install(server, Given(tmp_path))
    serve_only(server, [SupportPage(datastore, None, None, sorted, dict).router()])
    client = TestClient(server, base_url="http://server:8000")
    for action, tag in (("remove", "removed"), ("restore", "final")):
        answer = client.post(f"/sam2sgp/{action}", json={"image": "a"})
        assert answer.json() == {"image": "a", "label_tag": tag} and datastore.tags() == {"a": [tag]}
    for action in ("approve", "reject"):
        assert client.post(f"/sam2sgp/{action}", json={"image": "a"}).status_code == 422


def test_the_page_says_what_became_of_the_labels_of_the_adaptation(app, tmp_path):
    standing = None
    empty = SupportState((), {}, {}, frozenset(), {}, (), "1")
    segmenter = SimpleNamespace(keep_up=lambda: True, state=lambda: replace(empty, adaptation=standing))
    server = FastAPI()
    install(server, Given(tmp_path))
    usage = SimpleNamespace(counts=dict)
    serve_only(server, [SupportPage(app.datastore(), segmenter, usage, list, dict).router()])
    client = TestClient(server, base_url="http://server:8000")
    assert 'id="adaptation"' not in client.get("/sam2sgp/").text
    standing = Standing(3, (), 0, None)
    assert '<p id="adaptation">Adapted to 3 labels.</p>' in client.get("/sam2sgp/").text
    standing = Standing(3, ("a",), 0, None)
    assert f'<p id="adaptation" class="error">{standing.outdated}</p>' in client.get("/sam2sgp/").text


def test_what_may_be_wrong_with_the_support_set_is_on_the_page(app, tmp_path):
    sentence = "labels/final: the outlines of the labels fit the images clearly better <turned>"
    state = SupportState((), {}, {}, frozenset(), {}, (), "embedded", warnings=(sentence,))
    segmenter = SimpleNamespace(state=lambda: state, keep_up=lambda: True)
    server = FastAPI()
    install(server, Given(tmp_path))
    serve_only(server, [SupportPage(app.datastore(), segmenter, Usage(tmp_path / "usage"), sorted, dict).router()])
    text = TestClient(server, base_url="http://server:8000").get("/sam2sgp/").text
    assert "Labels that may be wrong" in text and f"<li>{escape(sentence)}</li>" in text


def test_few_images_are_held_at_once_for_pictures_and_approvals(app, tmp_path, monkeypatch):
    """Each may be a volume of gigabytes, and the page of one client asks for dozens."""
    limits = {"picture": page.DRAWING, "decision": page.DECIDING}
    # As many as may be at work go on together.
    together = {what: threading.Barrier(limit) for what, limit in limits.items()}
    at_work, most, lock = 0, dict.fromkeys(limits, 0), threading.Lock()

    def hold(what):
        nonlocal at_work
        with lock:
            at_work += 1
            most[what] = max(most[what], at_work)
        together[what].wait(60)
        # In which one too many would come.
        time.sleep(0.02)
        with lock:
            at_work -= 1

    def drawn(source, label, stamps):
        hold("picture")
        return np.zeros((2, 2, 3), np.uint8)

    monkeypatch.setattr(page, "_drawn", drawn)
    for decision in ("approve", "reject", "remove"):
        monkeypatch.setattr(app.datastore(), decision, lambda *label: hold("decision"))
    server = FastAPI()
    install(server, Given(tmp_path))
    serve_only(server, [SupportPage(app.datastore(), None, None, sorted, dict).router()])
    label = {"image": "a", "label_tag": "original"}
    decisions = ("approve", "reject", "remove", "restore")
    asked = {
        "picture": lambda _: client.get("/sam2sgp/picture?image=a"),
        # All kinds of decisions together.
        "decision": lambda turn: client.post(f"/sam2sgp/{decisions[turn % 4]}", json=label),
    }
    with TestClient(server, base_url="http://server:8000") as client, ThreadPoolExecutor(12) as pool:
        for ask in asked.values():
            assert all(answer.status_code == 200 for answer in pool.map(ask, range(12)))
    assert most == limits
