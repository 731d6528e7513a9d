"""The app's routes in front of parts that note what reached them, for tests."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from prometheus_client.parser import text_string_to_metric_families

from lib.roles import Role
from lib.tasks.background import Busy

TASK_PATHS = ("/train/", "/train/finetune", "/train/adapt", "/scoring/", "/scoring/scores", "/batch/infer/sam2sgp")


class Recorder:
    """Tasks that are never run."""

    def __init__(self):
        self.started = []

    def start(self, method, request, enqueue=False):
        if self.waiting(method) and not enqueue:
            raise Busy("busy")
        self.started.append((method, request))
        return {"id": "1", "status": "SUBMITTED", "request": request}

    def all(self, method):
        return [{"status": "DONE"} for name, _ in self.started if name == method]

    def running(self, method):
        return None

    def waiting(self, method):
        return 0

    def stop(self, method):
        return None


def assert_refused(answer) -> None:
    assert answer.status_code in (400, 404, 413, 422), answer.text
    detail = answer.json()["detail"]
    assert isinstance(detail, str) and "expected" in detail and "\n" not in detail and len(detail) < 400


@dataclass
class Given:
    state_dir: Path
    max_upload_mb: float = 0.5
    cors_origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ("server",)
    user_header: str | None = "X-Forwarded-User"
    folders: tuple[Path, ...] = ()
    users: Mapping[str, Role] | None = None
    default_role: Role | None = None


STATE = SimpleNamespace(items=(1, 2, 3), cases=frozenset("ab"), errors=({},), weights="embedded")


def segmenter():
    return SimpleNamespace(state=lambda: STATE, is_at_work=False)


def datastore():
    return SimpleNamespace(list_images=lambda: list("abcd"), get_labeled_images=lambda: ["a"])


def values(text: str) -> dict[str, float]:
    """{name{labels}: value} of what a server tells."""
    return {
        sample.name + "".join(f"{{{key}={value}}}" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
