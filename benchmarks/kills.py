"""kill -9 of the app's server at random moments, and what is there when it starts again.

    python benchmarks/kills.py --kills 20 --seed 0

Starts the app in a server process of its own on loopback, on a folder of phantom pictures, and kills it in turn while
it saves labels, scores, trains, and makes tokens for new weights. Each time the work is seen to be going on before the
kill, which comes after a random part of that work's `WINDOW`. After each restart it checks

- labels: every approved label is there, whole: the last one that was acknowledged, or the one that was on its way;
- support set: an answer over HTTP lists exactly the approved labels' items, and its pixels are those of a bank made
  in an empty folder, with the weights in use;
- files: every file of the support cache is valid, SQLite finds no fault with any database, and every line of the audit
  log is whole;
- training: it says that it was stopped, or what came of it; started again, it goes on where there was something to go
  on with;
- processes: none of the killed server's goes on without it.

Prints a row for each kill. The first check that fails ends the run with an error.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import date
from pathlib import Path

import numpy as np
import psutil
import requests
import torch

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "apps" / "sam2sgp")]

from lib.serving.approved_cases import LabelledCases  # noqa: E402
from lib.serving.options import Options  # noqa: E402
from lib.serving.published_weights import Weights  # noqa: E402
from lib.serving.segmenter import ServerSegmenter  # noqa: E402
from lib.settings import Settings  # noqa: E402
from lib.stores.opening import open_datastore  # noqa: E402
from sam2sgp.data import load_datalist  # noqa: E402
from sam2sgp.data.io import read_label  # noqa: E402
from sam2sgp.data.phantom import make_phantoms  # noqa: E402
from sam2sgp.networks import save_weights  # noqa: E402
from sam2sgp.support.tensor_store import load  # noqa: E402
from tests.e2e.server import Server  # noqa: E402

PATIENTS = 8
CONF = {"image_size": "64", "three_d_memory": "false", "region_below": "0", "k": "64"}
TRAINING = {"max_epochs": 3, "episodes_per_epoch": 8, "learning_rate": 1e-3}
# Of such a training: episodes are taken three at a time.
STEPS = 9
# Seconds after the first sign of the work within which the server is killed.
WINDOW = {"saving": 3.0, "scoring": 3.0, "training": 20.0, "tokens": 1.0}
WAIT = 120.0
TITLES = ("#", "while", "killed after", "found then", "labels", "items used", "tokens", "restart")


class Trial:
    """A server on phantoms, what it was told, and what it must therefore know.

    Args:
        folder: for everything.
        seed: of all random choices.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.folder = folder
        phantoms = make_phantoms(folder / "set", PATIENTS, (64, 64), 6, seed, modalities=("us",), progress=False)
        cases = [case for case in load_datalist(phantoms) if read_label(case["label"]).any()]
        self.studies = folder / "studies"
        self.final = self.studies / "labels" / "final"
        self.final.mkdir(parents=True)
        for case in cases:
            shutil.copy(case["image"], self.studies / f"{case['name']}.png")
        last = max(case["patient"] for case in cases)
        self.query = next(case["name"] for case in cases if case["patient"] == last)
        self.names = [case["name"] for case in cases if case["patient"] != last]
        # All are of one size, so that any may be any image's label.
        self.contents = [Path(case["label"]).read_bytes() for case in cases]
        # What may be there: the last label acknowledged, and one that was sent after it.
        self.labels: dict[str, list[bytes]] = {}
        for name in [next(n for n in self.names if n.startswith(f"us_{patient:03d}")) for patient in range(5)]:
            content = Path(next(case["label"] for case in cases if case["name"] == name)).read_bytes()
            (self.final / f"{name}.png").write_bytes(content)
            self.labels[name] = [content]
        self.saved = 0
        self.server = Server(folder, self.studies, CONF)
        self.weights = Weights(self.server.state / "weights", self.server.folder / "bundle" / "models" / "model.pt")

    def start(self) -> float:
        """Start the server; the seconds until it answers."""
        started = time.monotonic()
        # What is scored, and when, is chosen here.
        self.server.start({"MONAI_LABEL_AUTO_UPDATE_SCORING": "false"})
        return time.monotonic() - started

    def post(self, path: str, body: dict | None = None) -> requests.Response:
        answer = requests.post(f"{self.server.url}{path}", json=body or {}, timeout=WAIT)
        answer.raise_for_status()
        return answer

    def info(self) -> dict:
        answer = requests.get(f"{self.server.url}/info/", timeout=WAIT)
        answer.raise_for_status()
        return answer.json()

    def wait_for(self, sign: Callable[[], object], what: str) -> None:
        end = time.monotonic() + WAIT
        while not sign():
            if time.monotonic() > end:
                raise RuntimeError(f"No sign of {what}:\n{self.server.output()}")
            time.sleep(0.02)

    # Works, each of which returns when it is seen to be going on

    def saving(self) -> None:
        """Labels are approved and replaced, one after the other, until the server is gone."""
        before = self.saved

        def work() -> None:
            while True:
                name = str(self.rng.choice(self.names))
                content = self.contents[int(self.rng.integers(len(self.contents)))]
                self.labels[name] = [*self.labels.get(name, [b""]), content]
                url = f"{self.server.url}/datastore/label?image={name}&tag=final"
                try:
                    answer = requests.put(url, files={"label": ("label.png", content)}, timeout=WAIT)
                except requests.RequestException:
                    return
                answer.raise_for_status()
                self.labels[name] = [content]
                self.saved += 1

        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()
        self.wait_for(lambda: self.saved > before, "a label that is saved")

    def scoring(self) -> None:
        """All unlabelled images are scored, as the support set is another one than when they were scored last."""
        self._approve_one()
        rows = self._serial()
        self.post("/scoring/scores")
        self.wait_for(lambda: self._serial() > rows, "a score")

    def training(self) -> None:
        """A fine-tuning, from its beginning to its end: up to some step of it."""
        self._approve_one()
        self._train()
        step = int(self.rng.integers(STEPS + 1))

        def reached() -> bool:
            facts = self._status()
            return facts.get("step", 0) >= step or facts["state"] != "running"

        self.wait_for(reached, f"step {step} of the training")

    def tokens(self) -> None:
        """Other weights are put in use, and the support set is encoded with them."""
        segmenter = self._segmenter(self.folder / "unused")
        torch.manual_seed(int(self.rng.integers(2**31)))
        for parameter in segmenter.network.parameters():
            parameter.data += 0.01 * parameter.data.std(correction=0) * torch.randn_like(parameter)
        save_weights(segmenter.network, self.folder / "other.pt")
        before = self._folders()
        self.weights.publish(self.folder / "other.pt", {})
        self.info()
        self.wait_for(lambda: self._folders() > before, "tokens of new weights")

    def _train(self) -> None:
        since = time.time()
        self.post("/train/finetune", TRAINING)
        status = self.server.state / "training" / "status.json"
        self.wait_for(lambda: status.exists() and status.stat().st_mtime > since, "a training")

    def _approve_one(self) -> None:
        name = str(self.rng.choice(self.names))
        content = self.contents[int(self.rng.integers(len(self.contents)))]
        (self.final / f"{name}.part").write_bytes(content)
        os.replace(self.final / f"{name}.part", self.final / f"{name}.png")
        self.labels[name] = [content]

    def _serial(self) -> int:
        path = self.server.state / "scores.sqlite"
        if not path.exists():
            return 0
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as file:
            try:
                return file.execute("SELECT COALESCE(MAX(serial), 0) FROM scores").fetchone()[0]
            except sqlite3.OperationalError:
                return 0

    def _folders(self) -> set[str]:
        folder = self.server.state / "support" / "encoded"
        return {path.name for path in folder.iterdir()} if folder.is_dir() else set()

    # The kill

    def kill(self, work: str) -> list[str]:
        """Do a work, kill the server in the midst of it, start it again and check. Returns the cells of a row."""
        self.thread = None
        acknowledged, rows, began = self.saved, self._serial(), time.time()
        getattr(self, work)()
        delay = float(self.rng.uniform(0, WINDOW[work]))
        time.sleep(delay)
        process = psutil.Process(self.server.process.pid)
        started_by_it = process.children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        gone, alive = psutil.wait_procs(started_by_it, timeout=30)
        alive = [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
        require(not alive, f"processes that end with their server, found {alive}")
        self.server.stop()
        if self.thread is not None:
            self.thread.join()
        found = {
            "saving": lambda: f"{self.saved - acknowledged} labels acknowledged",
            "scoring": lambda: f"{self._serial() - rows} images scored",
            "training": self._training_left,
            "tokens": lambda: f"{self._encoded()} of {len(self.labels)} items encoded",
        }[work]()
        left = (self.server.state / "training" / "work").glob("*/last.pt")
        resumable = work == "training" and any(path.stat().st_mtime > began for path in left)
        restart = self.start()
        labels = self.check_labels()
        items, tokens = self.check_support()
        self.check_files()
        found += self.check_training(resumable) if work == "training" else ""
        return [work, f"{delay:.2f} s", found, labels, str(items), str(tokens), f"{restart:.0f} s"]

    def _training_left(self) -> str:
        facts = self._status()
        return f"epoch {facts.get('epoch', 0)}, step {facts.get('step', 0)} of {facts.get('steps', '?')}"

    def _status(self) -> dict:
        return json.loads((self.server.state / "training" / "status.json").read_text())

    def _encoded(self) -> int:
        folders = sorted((self.server.state / "support" / "encoded").iterdir(), key=lambda path: path.stat().st_mtime)
        return len(list(folders[-1].glob("*.item.safetensors")))

    # Checks

    def check_labels(self) -> str:
        """Every approved label is there, and is one of those that it may be."""
        kept = 0
        for name, allowed in self.labels.items():
            path = self.final / f"{name}.png"
            content = path.read_bytes() if path.is_file() else b""
            require(content in allowed, f"{path.name} as it was saved, found {len(content)} other bytes")
            kept += len(allowed) > 1 and content == allowed[-1]
        self.labels = {
            name: [path.read_bytes()] for name in self.labels if (path := self.final / f"{name}.png").is_file()
        }
        completed = self.info()["datastore"]["completed"]
        require(completed == len(self.labels), f"{len(self.labels)} approved labels, found {completed}")
        return f"{len(self.labels)} of {len(self.labels)}" + (", one on its way kept" if kept else "")

    def check_support(self) -> tuple[int, int]:
        """An answer rests on exactly the approved labels, and is that of a new bank. Items, and files of them."""
        url = f"{self.server.url}/infer/sam2sgp?image={self.query}"
        answer = requests.post(f"{url}&output=json", timeout=WAIT)
        answer.raise_for_status()
        params = answer.json()
        used = {entry["image"]: entry["item"] for items in params["support"].values() for entry in items}
        require(used.keys() == self.labels.keys(), f"{sorted(self.labels)} to be used, found {sorted(used)}")
        require(params["weights"] == self.weights.active().name, f"the active weights, found {params['weights']}")
        image = requests.post(f"{url}&output=image", timeout=WAIT)
        image.raise_for_status()
        shown = self.folder / "answer.png"
        shown.write_bytes(image.content)
        with tempfile.TemporaryDirectory(dir=self.folder) as empty:
            fresh = self._segmenter(Path(empty)).segment(self.studies / f"{self.query}.png", Options())
        items = {entry["image"]: entry["item"] for entries in fresh["used"].values() for entry in entries}
        require(items == used, "the items of a new bank, found others")
        require(np.array_equal(read_label(shown), fresh["pred"].numpy()), "the pixels of a new bank, found others")
        files = list((self.server.state / "support" / "encoded").rglob("*.safetensors"))
        return len(used), len(files)

    def check_files(self) -> None:
        """No half file in the state folder."""
        support = self.server.state / "support"
        for path in support.rglob("*.safetensors"):
            if not any(part.startswith(".") for part in path.relative_to(support).parts):
                name = str(path.relative_to(support)).removesuffix(".safetensors")
                require(load(path, name) is not None, f"a valid file, found {path.name} damaged")
        for path in self.server.state.rglob("*.sqlite"):
            with closing(sqlite3.connect(path)) as file:
                (verdict,) = file.execute("PRAGMA integrity_check").fetchone()
            require(verdict == "ok", f"a sound database, found {path.name}: {verdict}")
        log = self.server.state / "audit.jsonl"
        for line in log.read_text().splitlines() if log.exists() else []:
            json.loads(line)

    def check_training(self, resumable: bool) -> str:
        """A killed training says that it was stopped, and goes on if there is something to go on with."""
        stats = self.info()["train_stats"]["finetune"]
        require(stats.get("state") != "running", "no training that runs, found one")
        if stats["state"] != "stopped":
            return f", {stats['state']}"
        require("was stopped after" in stats["message"], f"a training that says it was stopped, found {stats}")
        if not resumable:
            return ""
        before = len(self._trainings())
        self._train()
        self.wait_for(lambda: len(self._trainings()) > before, "a training that knows whether it goes on")
        require(self._trainings()[-1]["resumed"], "a training that goes on, found one that began again")
        requests.delete(f"{self.server.url}/train/", timeout=WAIT).raise_for_status()
        return ", went on"

    def _trainings(self) -> list[dict]:
        """What the audit log says of trainings that began or went on."""
        log = self.server.state / "audit.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        return [entry for entry in map(json.loads, lines) if "resumed" in entry]

    def _segmenter(self, state: Path) -> ServerSegmenter:
        """The app's network and bank in this process, with the weights in use."""
        torch.set_num_threads(1)
        app = self.server.folder / "apps" / "sam2sgp"
        settings = Settings.from_conf(app, str(self.studies), {**CONF, "state_dir": str(state)})
        return ServerSegmenter(settings, self.weights, LabelledCases(open_datastore(settings), settings))


def require(holds: bool, expected: str) -> None:
    if not holds:
        raise RuntimeError(f"Expected {expected}.")


def run(folder: Path, works: Sequence[str], seed: int, show: Callable[[list[str]], None]) -> None:
    """Kill a server once in each of the works. `show` gets the cells of each row."""
    trial = Trial(folder, seed)
    try:
        trial.start()
        trial.check_support()
        for number, work in enumerate(works, 1):
            show([str(number), *trial.kill(work)])
    finally:
        trial.server.stop()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--kills", type=int, default=20, help="how many (default: %(default)s)")
    arguments.add_argument("--works", nargs="+", choices=WINDOW, default=list(WINDOW), help="in turn (default: all)")
    arguments.add_argument("--seed", type=int, default=0, help="of moments and labels (default: %(default)s)")
    options = arguments.parse_args()
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, lite, seed {options.seed}\n")
    print(f"| {' | '.join(TITLES)} |\n|{' --- |' * len(TITLES)}", flush=True)
    works = [options.works[number % len(options.works)] for number in range(options.kills)]
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), works, options.seed, lambda cells: print(f"| {' | '.join(cells)} |", flush=True))
    print(f"\n{len(works)} kills, nothing lost.")


if __name__ == "__main__":
    main()
