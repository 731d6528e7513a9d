"""The example configuration of nginx, in front of a server that tells what reached it."""

import json
import ssl
import threading
import urllib.error
import urllib.request
from base64 import b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.e2e.proxies import PASSWORD, USER, nginx


class Echo(BaseHTTPRequestHandler):
    """Answers with the headers and the length of what it got."""

    def do_GET(self) -> None:
        length = len(self.rfile.read(int(self.headers.get("content-length", 0))))
        answer = json.dumps({"headers": {k.lower(): v for k, v in self.headers.items()}, "length": length}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_PUT = do_GET

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
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


def test_nobody_gets_in_without_the_password(proxy):
    assert send(proxy, password=None)[0] == 401
    assert send(proxy, password="wrong")[0] == 401
    assert send(proxy)[0] == 200


def test_the_app_learns_who_it_was_from_the_proxy_alone(proxy):
    _, answer = send(proxy, headers={"X-Remote-User": "somebody else"})
    assert answer["headers"]["x-remote-user"] == USER
    assert "authorization" not in answer["headers"]


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
