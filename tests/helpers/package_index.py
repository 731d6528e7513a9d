"""Two package indexes on this machine, as pip sees PyPI and PyTorch's index for the CPU.

In: the distributions that are installed here. Out: an address; each of its packages is a wheel with nothing in it but
the metadata, so the requirements are the true ones. Only `sam2` is a source archive, as on PyPI: its build needs torch.
"""

import io
import re
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata

# On PyPI torch needs CUDA; this stands for it where the torch that is installed here does not.
CUDA = "nvidia-cublas"
# Refuses to be built beside a torch that brings CUDA.
BACKEND = """
import importlib.metadata
from pathlib import Path

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    assert importlib.metadata.version("torch").endswith("+cpu"), "built with a torch that brings CUDA"
    folder = Path(metadata_directory, "sam2-{version}.dist-info")
    folder.mkdir()
    Path(folder, "METADATA").write_text({about!r})
    Path(folder, "WHEEL").write_text("Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
    return folder.name
"""


def _about(name: str, version: str, requires: list[str]) -> str:
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    extras = {extra for line in requires for extra in re.findall(r"extra == ['\"]([^'\"]+)", line)}
    lines += [f"Provides-Extra: {extra}" for extra in sorted(extras)]
    return "\n".join([*lines, *(f"Requires-Dist: {line}" for line in requires), ""])


def _wheel(name: str, version: str, requires: list[str]) -> bytes:
    file = io.BytesIO()
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{info}/METADATA", _about(name, version, requires))
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return file.getvalue()


def _source(version: str, requires: list[str]) -> bytes:
    file = io.BytesIO()
    about = _about("sam2", version, requires)
    build = '[build-system]\nrequires = ["torch"]\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    files = {"PKG-INFO": about, "pyproject.toml": build, "backend.py": BACKEND.format(version=version, about=about)}
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"sam2-{version}/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return file.getvalue()


def _package(index: str, name: str) -> tuple[str, bytes] | None:
    """File name and content of a package that an index has."""
    is_torch = name in ("torch", "torchvision")
    if index == "cpu" and not is_torch:
        return None
    try:
        version, requires = metadata.version(name).partition("+")[0], metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        if name != CUDA:
            return None
        version, requires = "1.0", []
    if index == "cpu":
        version += "+cpu"
        requires = [line for line in requires if not re.match("nvidia|cuda|triton", line)]
    elif name == "torch" and not any(line.startswith(("nvidia", "cuda")) for line in requires):
        requires = [*requires, CUDA]
    if name == "sam2":
        return f"sam2-{version}.tar.gz", _source(version, requires)
    return f"{name.replace('-', '_')}-{version}-py3-none-any.whl", _wheel(name, version, requires)


class _Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        # /INDEX/simple/NAME/ lists, /INDEX/simple/NAME/FILE is.
        index, _, name, *file = self.path.strip("/").split("/")
        found = _package(index, name)
        if found is None:
            self.send_error(404)
            return
        link = f'<!doctype html><html><body><a href="{found[0]}">{found[0]}</a></body></html>'
        content = found[1] if file else link.encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream" if file else "text/html")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass


@contextmanager
def package_indexes() -> Iterator[str]:
    """An address that has `/pypi/simple` and `/cpu/simple`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
