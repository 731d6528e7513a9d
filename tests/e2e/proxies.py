"""The example configuration of nginx, started on loopback with a certificate and a password of its own."""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.programs import free_port, listens, program, running

DEPLOY = Path(__file__).parents[2] / "apps" / "sam2sgp" / "deploy"
USER, PASSWORD = "reader", "correct horse"
# Address and name of one that needs no password.
WORKSTATION = "127.0.0.2", "slicer-7"


@dataclass
class Proxy:
    """An nginx with the example configuration: its HTTPS and HTTP ports, its certificate, and OHIF's name."""

    port: int
    plain_port: int
    certificate: Path
    ohif: str = "ohif.localhost"

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"


def configuration(folder: Path, upstream: int, upload_limit: str) -> tuple[str, str, Proxy]:
    """The examples, of nginx and of OHIF beside it, with this machine's ports and paths in place of their own."""
    proxy = Proxy(free_port(), free_port(), folder / "proxy.crt")
    text, ohif = ((DEPLOY / name).read_text() for name in ("nginx.conf", "ohif.conf"))
    replacements = {
        "listen 80;": f"listen 127.0.0.1:{proxy.plain_port};",
        "listen 443 ssl": f"listen 127.0.0.1:{proxy.port} ssl",
        "127.0.0.1:8000;": f"127.0.0.1:{upstream};",
        "client_max_body_size 1g;": f"client_max_body_size {upload_limit};",
        "/etc/nginx/sam2sgp.crt": str(proxy.certificate),
        "/etc/nginx/sam2sgp.key": str(folder / "proxy.key"),
        "/etc/nginx/sam2sgp.htpasswd": str(folder / "passwords"),
        "/etc/nginx/sam2sgp.d": str(folder / "sites"),
        "pid /run/nginx.pid;": f"pid {folder}/nginx.pid; daemon off;",
        "/var/log/nginx/error.log": f"{folder}/error.log",
        "/var/log/nginx/access.log;": f"{folder}/access.log;",
        "worker_processes auto;": "worker_processes 1;",
        # Started by root, its workers would be another user, who can't read a test's folder.
        "user www-data;": "user root;" if os.geteuid() == 0 else "",
    }
    # What stands in comments is for people, but for the workstation.
    assert "# 10.1.2.7 slicer-7;" in text
    text = text.replace("# 10.1.2.7 slicer-7;", f"{WORKSTATION[0]} {WORKSTATION[1]};")
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)
    for old, new in replacements.items():
        assert old in text, f"the example has no {old!r} any more"
        text = text.replace(old, new)
    # Folders that the distribution's build writes to as root.
    for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"):
        text = text.replace("http {", f"http {{\n    {kind}_temp_path {folder}/{kind};", 1)
    for old in (
        "listen 443 ssl",
        "127.0.0.1:8000;",
        *(f"/etc/nginx/sam2sgp.{kind}" for kind in ("crt", "key", "htpasswd")),
    ):
        assert old in ohif, f"the example of OHIF has no {old!r} any more"
        ohif = ohif.replace(old, replacements[old])
    ohif = ohif.replace("server_name ohif.example.org;", f"server_name {proxy.ohif};").replace(
        "root /srv/ohif;", f"root {folder / 'ohif'};"
    )
    return text, ohif, proxy


@contextmanager
def nginx(folder: Path, upstream: int, upload_limit: str = "1g", ohif: Path | None = None) -> Iterator[Proxy]:
    """nginx in front of a port of this machine, and beside it an OHIF whose files are in a folder."""
    binary, openssl = program("nginx", "nginx-light"), program("openssl", "openssl")
    text, site, proxy = configuration(folder, upstream, upload_limit)
    (folder / "nginx.conf").write_text(text)
    if ohif:
        (folder / "sites").mkdir()
        (folder / "sites" / "ohif.conf").write_text(site)
        (folder / "ohif").symlink_to(ohif)
    made = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    made += ["-addext", "subjectAltName=DNS:localhost", "-keyout", folder / "proxy.key", "-out", proxy.certificate]
    subprocess.run(made, check=True, capture_output=True)
    hashed = subprocess.run([openssl, "passwd", "-apr1", PASSWORD], check=True, capture_output=True, text=True).stdout
    (folder / "passwords").write_text(f"{USER}:{hashed}")
    command = [binary, "-e", str(folder / "error.log"), "-p", str(folder), "-c", str(folder / "nginx.conf")]
    with running(command, folder / "nginx.log", lambda: listens(proxy.port)):
        yield proxy
