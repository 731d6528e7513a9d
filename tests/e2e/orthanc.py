"""An Orthanc with DICOMweb on loopback, filled with series of phantoms."""

import json
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.programs import free_port, listens, program, running

PLUGIN = "libOrthancDicomWeb.so"
PLUGINS = "/usr/share/orthanc/plugins"


@dataclass
class Orthanc:
    """A running Orthanc: its HTTP port and its process."""

    port: int
    process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def dicomweb(self) -> str:
        """What `--studies` gets."""
        return f"{self.url}/dicom-web"

    def upload(self, folder: Path) -> None:
        """Store all files of a folder."""
        for path in sorted(folder.iterdir()):
            request = urllib.request.Request(f"{self.url}/instances", path.read_bytes(), method="POST")
            with urllib.request.urlopen(request, timeout=20) as answer:
                assert answer.status == 200

    def series(self, modality: str) -> list[dict]:
        """The series of a modality, as Orthanc knows them."""
        query = json.dumps({"Level": "Series", "Expand": True, "Query": {"Modality": modality}}).encode()
        request = urllib.request.Request(f"{self.url}/tools/find", query, method="POST")
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.loads(answer.read())

    @contextmanager
    def silent(self) -> Iterator[None]:
        """For the length of the block it takes connections and requests, and answers none."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def file(self, instance: str) -> bytes:
        """An instance as a DICOM file."""
        with urllib.request.urlopen(f"{self.url}/instances/{instance}/file", timeout=20) as answer:
            return answer.read()


@contextmanager
def orthanc(folder: Path) -> Iterator[Orthanc]:
    """Orthanc with an empty storage in a folder."""
    binary = program("Orthanc", "orthanc orthanc-dicomweb")
    server = Orthanc(free_port())
    configuration = {
        "Name": "test",
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "Plugins": [str(Path(PLUGINS) / PLUGIN)],
        "HttpPort": server.port,
        "DicomServerEnabled": False,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(configuration))
    log = folder / "orthanc.log"
    with running([binary, str(folder / "orthanc.json")], log, lambda: listens(server.port)) as server.process:
        yield server
