"""Sites to back up and to restore to, for tests."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from lib.admin.backup import backup
from lib.serving.published_weights import Weights
from lib.settings import Settings
from lib.state_folder import RESTORE
from lib.stores.audit import Audit
from lib.stores.opening import open_datastore
from tests.app.conftest import APP

IMAGES = ("a", "b", "c")


def label(path: Path, value: int) -> Path:
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(path)
    return path


class Site:
    """A studies folder with labels and the state folder of its server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.studies, self.state = folder / "my studies", folder / "state"
        self.studies.mkdir(parents=True)
        self.settings = Settings.from_conf(APP, str(self.studies), {"state_dir": str(self.state)})

    def fill(self) -> "Site":
        for number, name in enumerate(IMAGES):
            Image.fromarray(np.full((8, 8, 3), 40 * number, np.uint8)).save(self.studies / f"{name}.png")
        (self.studies / "labels.json").write_text('{"1": "disc", "2": "ring"}')
        store = open_datastore(self.settings)
        store.save_label("a", str(label(self.folder / "x.png", 1)), "final", {"user": "Ünal"})
        store.save_label("b", str(label(self.folder / "x.png", 2)), "original", {"model": "sam2sgp"})
        store.update_image_info("c", {"note": "ä"})
        weights = Weights(self.state / "weights", self.settings.start_weights)
        weights.publish(label(self.folder / "model.pt.png", 9), {"dice": 0.5})
        Audit(self.settings.progress_file).write("shown", image="a", dice=0.9)
        return self

    def words(self, *more: object) -> list[str]:
        return [*map(str, more), "--studies", str(self.studies), "--state-dir", str(self.state)]

    def save(self, name: str = "backup.tar", *more: str) -> Path:
        backup(self.words("--output", self.folder / name, *more), APP)
        return self.folder / name


def ignored(path: Path) -> bool:
    parts = ("lock", "before-restore", RESTORE, "audit.jsonl")
    return any(part in str(path) for part in parts)


def content(*folders: Path) -> dict[str, str]:
    """Hash of every file by its path, but for locks, the audit log, and what a restore prepares and keeps."""
    return {
        f"{folder.name}/{path.relative_to(folder)}": hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not ignored(path.relative_to(folder))
    }


def objects(site: Site) -> dict:
    return open_datastore(site.settings).json()["objects"]


def dying(work: Callable[[], None], at: int, *places: tuple[object, str]) -> bool:
    """Do something in a process that is killed at the n-th call of one of these functions. Whether it was."""
    child = os.fork()
    if not child:
        calls = 0

        def counted(function: Callable) -> Callable:
            def call(*arguments, **options):
                nonlocal calls
                calls += 1
                if calls == at:
                    os._exit(9)
                return function(*arguments, **options)

            return call

        try:
            for owner, name in places:
                setattr(owner, name, counted(getattr(owner, name)))
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9
