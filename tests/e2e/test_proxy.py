"""The example configuration of nginx, in front of a server that tells what reached it."""

import http.client
import json
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests

from tests.e2e.proxies import DEPLOY, PASSWORD, USER, WORKSTATION, nginx


class Echo(BaseHTTPRequestHandler):
    """Answers with the headers and the length of what it got."""

    def do_GET(self) -> None:
        length = len(self.rfile.read(int(self.headers.get("content-length", 0))))
        answer = json.dumps({"headers": {k.lower(): v for k, v in self.headers.items()}, "length": length}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_PUT = do_POST = do_GET

    def log_message(self, *arguments) -> None:
        pass


class Upstream(ThreadingHTTPServer):
    # As the app's: more connections at once than this class takes by itself.
    request_queue_size = 128


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    server = Upstream(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with nginx(tmp_path_factory.mktemp("nginx"), server.server_port, upload_limit="1m") as found:
        yield found
    server.shutdown()
    server.server_close()


def send(proxy, path="/info/", password=PASSWORD, data=None, headers=None):
    """Status and parsed answer."""
    context = ssl.create_default_context(cafile=str(proxy.certificate))
    token = b64encode(f"{USER}:{password}".encode()).decode()
    headers = {"Authorization": f"Basic {token}", **(headers or {})} if password else headers or {}
    request = urllib.request.Request(proxy.url + path, data, headers, method="PUT" if data else "GET")
    try:
        with urllib.request.urlopen(request, context=context, timeout=20) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, None


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """With another OHIF beside the app, whose page is a few words."""
    folder = tmp_path_factory.mktemp("ohif")
    (folder / "index.html").write_text("a newer OHIF")
    (folder / "app-config.js").write_bytes((DEPLOY / "ohif-config.js").read_bytes())
    server = Upstream(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with nginx(tmp_path_factory.mktemp("nginx"), server.server_port, ohif=folder) as found:
        yield found
    server.shutdown()
    server.server_close()


def ask(proxy, path, method="GET", password=PASSWORD, headers=None):
    """An answer of the site that has OHIF's name."""
    return requests.request(
        method,
        proxy.url + path,
        auth=(USER, password),
        headers={"Host": f"{proxy.ohif}:{proxy.port}", **(headers or {})},
        verify=str(proxy.certificate),
        timeout=20,
    )


def test_a_newer_ohif_beside_the_app_only_reads_the_archive_and_is_known_by_its_user(beside):
    for path in ("/", "/viewer?StudyInstanceUIDs=1.2", "/info/", "/datastore/label"):
        page = ask(beside, path)
        assert page.text == "a newer OHIF" and "default-src 'none'" in page.headers["content-security-policy"]
    assert ask(beside, "/", password="wrong").status_code == 401
    assert ask(beside, "/proxy/dicom/qido/studies", password="wrong").status_code == 401
    told = ask(beside, "/proxy/dicom/qido/studies", headers={"X-Remote-User": "somebody else"}).json()["headers"]
    assert told["x-remote-user"] == USER and told["host"] == f"{beside.ohif}:{beside.port}"
    assert "authorization" not in told
    for method in ("POST", "PUT", "DELETE"):
        assert ask(beside, "/proxy/dicom/wado/studies", method).status_code == 403
        assert ask(beside, "/train/adapt", method).status_code == 405
    # The app is where it was.
    assert send(beside)[0] == 200


def test_a_newer_ohif_asks_the_app_for_all_that_it_reads(beside):
    text = ask(beside, "/app-config.js").text
    roots = re.findall(r'(?:Root): "([^"]+)"', text)
    assert len(roots) == 3 and all(root.startswith("/proxy/dicom/") for root in roots)
    assert "http" not in text and "dicomUploadEnabled: false" in text


def test_nobody_gets_in_without_the_password(proxy):
    assert send(proxy, password=None)[0] == 401
    assert send(proxy, password="wrong")[0] == 401
    assert send(proxy)[0] == 200


def test_the_app_learns_who_it_was_from_the_proxy_alone(proxy):
    for name in ("X-Remote-User", "x-remote-user", "X_Remote_User"):
        _, answer = send(proxy, headers={name: "somebody else"})
        assert answer["headers"]["x-remote-user"] == USER and "somebody else" not in str(answer)
        assert "authorization" not in answer["headers"]


def test_a_token_reaches_the_app_in_place_of_a_password_and_names_nobody_else(proxy):
    """What lets in whoever has it is the app's to say."""
    for scheme in ("Bearer", "bearer"):
        sent = {"Authorization": f"{scheme} sam2sgp_x", "X-Remote-User": "somebody else"}
        status, answer = send(proxy, password=None, headers=sent)
        assert status == 200 and answer["headers"]["authorization"] == f"{scheme} sam2sgp_x"
        assert "x-remote-user" not in answer["headers"]
    for sent in ("Bearer", "Basic Bearer x", "BearerX y", "Digest Bearer x", "x Bearer y", "Bearer\tx"):
        assert send(proxy, password=None, headers={"Authorization": sent})[0] == 401, sent


def test_a_workstation_is_known_by_its_address_and_by_nothing_that_it_sends(proxy):
    address, name = WORKSTATION
    context = ssl.create_default_context(cafile=str(proxy.certificate))
    token = b64encode(b"somebody else:x").decode()
    for headers in ({}, {"Authorization": f"Basic {token}", "X-Remote-User": "somebody else"}):
        connection = http.client.HTTPSConnection(
            "localhost", proxy.port, context=context, timeout=20, source_address=(address, 0)
        )
        with closing(connection):
            connection.request("GET", "/info/", headers=headers)
            answer = connection.getresponse()
            told = json.loads(answer.read())["headers"]
        assert answer.status == 200 and told["x-remote-user"] == name and "authorization" not in told


def test_uploads_above_the_limit_are_refused(proxy):
    assert send(proxy, "/datastore/", data=b"0" * (1 << 19))[1]["length"] == 1 << 19
    assert send(proxy, "/datastore/", data=b"0" * (2 << 20))[0] == 413


def test_plain_http_leads_to_https(proxy):
    class NoRedirect(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *arguments):
            return None

    opener = urllib.request.build_opener(NoRedirect)
    with pytest.raises(urllib.error.HTTPError) as refused:
        opener.open(f"http://127.0.0.1:{proxy.plain_port}/info/", timeout=20)
    assert refused.value.code == 301
    assert refused.value.headers["location"].startswith("https://")
    refused.value.close()


def test_a_viewer_gets_all_slices_of_a_large_series(proxy):
    """As OHIF: a thousand requests, as many at once as a browser and its neighbours send."""
    context = ssl.create_default_context(cafile=str(proxy.certificate))
    token = b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    numbers = iter(range(1200))
    lock, statuses = threading.Lock(), Counter()

    def read() -> None:
        connection = http.client.HTTPSConnection("localhost", proxy.port, context=context, timeout=60)
        with closing(connection):
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                path = f"/proxy/dicom/wado/studies/1.2/series/1.3/instances/1.{number}/frames/1"
                connection.request("GET", path, headers={"Authorization": f"Basic {token}"})
                answer = connection.getresponse()
                answer.read()
                with lock:
                    statuses[answer.status] += 1

    with ThreadPoolExecutor(64) as threads:
        for future in [threads.submit(read) for _ in range(64)]:
            future.result()
    assert statuses == {200: 1200}


def test_changes_beyond_measure_are_told_to_try_again(proxy):
    statuses = Counter(send(proxy, "/datastore/label", data=b"x")[0] for _ in range(200))
    assert statuses[200] >= 100 and set(statuses) <= {200, 429}
    assert send(proxy)[0] == 200


def test_guessing_passwords_takes_time(proxy):
    started = time.monotonic()
    assert send(proxy, password="guess")[0] == 401
    assert time.monotonic() - started > 1
