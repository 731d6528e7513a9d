"""The example configuration of nginx, started on loopback with a certificate and a password of its own."""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.programs import free_port, listens, program, running

EXAMPLE = Path(__file__).parents[2] / "apps" / "sam2sgp" / "deploy" / "nginx.conf"
USER, PASSWORD = "reader", "correct horse"
# Address and name of one that needs no password.
WORKSTATION = "127.0.0.2", "slicer-7"


@dataclass
class Proxy:
    """An nginx with the example configuration: its HTTPS and HTTP ports, and its certificate."""

    port: int
    plain_port: int
    certificate: Path

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"


def configuration(folder: Path, upstream: int, upload_limit: str) -> tuple[str, Proxy]:
    """The example with this machine's ports and paths in place of its own."""
    proxy = Proxy(free_port(), free_port(), folder / "proxy.crt")
    text = EXAMPLE.read_text()
    replacements = {
        "listen 80;": f"listen 127.0.0.1:{proxy.plain_port};",
        "listen 443 ssl": f"listen 127.0.0.1:{proxy.port} ssl",
        "127.0.0.1:8000;": f"127.0.0.1:{upstream};",
        "client_max_body_size 1g;": f"client_max_body_size {upload_limit};",
        "/etc/nginx/sam2sgp.crt": str(proxy.certificate),
        "/etc/nginx/sam2sgp.key": str(folder / "proxy.key"),
        "/etc/nginx/sam2sgp.htpasswd": str(folder / "passwords"),
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
    return text, proxy


@contextmanager
def nginx(folder: Path, upstream: int, upload_limit: str = "1g") -> Iterator[Proxy]:
    """nginx in front of a port of this machine."""
    binary, openssl = program("nginx", "nginx-light"), program("openssl", "openssl")
    text, proxy = configuration(folder, upstream, upload_limit)
    (folder / "nginx.conf").write_text(text)
    made = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    made += ["-addext", "subjectAltName=DNS:localhost", "-keyout", folder / "proxy.key", "-out", proxy.certificate]
    subprocess.run(made, check=True, capture_output=True)
    hashed = subprocess.run([openssl, "passwd", "-apr1", PASSWORD], check=True, capture_output=True, text=True).stdout
    (folder / "passwords").write_text(f"{USER}:{hashed}")
    command = [binary, "-e", str(folder / "error.log"), "-p", str(folder), "-c", str(folder / "nginx.conf")]
    with running(command, folder / "nginx.log", lambda: listens(proxy.port)):
        yield proxy
