"""How long clients of the MONAI Label app wait while it segments a volume and trains.

    python benchmarks/app_load.py --minutes 3

Starts the app in a server process of its own on loopback, on phantom pictures and volumes. One client has one volume
after the other segmented, one fine-tuning runs in the background, and beside them people work, as many as `--clients`:
each asks for something, looks at it for a second or so, and asks for the next thing. What they do: lists, the state of
the server, the support page and its pictures, uploads of images, submitted labels, predictions that are saved and then
approved or rejected, offers of the next image. Prints the median, the 95th percentile and the worst of the seconds that
each kind of request took, answers that were none, and the server's memory every half minute (resident, without the
training, which has a process of its own). Exits with 1 if the worst of anything that people do is over `--limit`.
"""

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from itertools import count
from pathlib import Path

import psutil
import requests

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from sam2sgp.data import load_datalist  # noqa: E402
from sam2sgp.data.phantom import make_phantoms  # noqa: E402
from tests.e2e.server import serving  # noqa: E402

PATIENTS, VOLUMES, APPROVED = 24, 4, 8
TIMEOUT = 300
# Seconds between two readings of the server's memory.
SAMPLED = 30
# What people do, and how often for each other thing.
SHARES = {
    "info": 2,
    "list": 2,
    "support page": 3,
    "picture": 6,
    "upload of an image": 1,
    "submitted label": 1,
    "decision": 2,
    "next sample": 1,
}
MODEL = "sam2sgp"


class Load:
    """Requests of many clients, and how long each took.

    Args:
        url: of the server.
        pictures: phantom cases of pictures that are in the studies folder without a label.

    Attributes:
        seconds: of each request, by kind. failures: what the failed ones answered, by kind.
        memory: bytes that the server's process held, one reading each `SAMPLED` seconds.
    """

    def __init__(self, url: str, pictures: list[dict]) -> None:
        self.url = url
        self.pictures = pictures
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.failures: dict[str, list[str]] = defaultdict(list)
        self.memory: list[int] = []
        self.over = threading.Event()
        self._lock = threading.Lock()
        self._numbers = count()

    def ask(self, kind: str, method: str, path: str, **options) -> requests.Response | None:
        started = time.perf_counter()
        try:
            answer = requests.request(method, f"{self.url}{path}", timeout=TIMEOUT, **options)
        except requests.RequestException as error:
            if self.over.is_set():
                # What the end of the server cuts off.
                return None
            answer, failure = None, type(error).__name__
        else:
            failure = "" if answer.ok else f"{answer.status_code} {answer.text[:200]}"
        with self._lock:
            self.seconds[kind].append(time.perf_counter() - started)
            if failure:
                self.failures[kind].append(failure)
        return answer

    def person(self, seed: int) -> None:
        """One who works until it is over."""
        choices = random.Random(seed)
        kinds, weights = list(SHARES), list(SHARES.values())
        while not self.over.wait(choices.uniform(0.5, 1.5)):
            self.do(choices.choices(kinds, weights)[0], choices)

    def do(self, kind: str, choices: random.Random) -> None:
        with self._lock:
            number = next(self._numbers)
        case = self.pictures[number % len(self.pictures)]
        name = case["name"]
        if kind == "info":
            self.ask(kind, "GET", "/info/")
        elif kind == "list":
            self.ask(kind, "GET", "/datastore/?output=all")
        elif kind == "support page":
            self.ask(kind, "GET", "/sam2sgp/")
        elif kind == "picture":
            self.ask(kind, "GET", "/sam2sgp/picture", params={"image": name})
        elif kind == "next sample":
            self.ask(kind, "POST", "/activelearning/random", json={})
        elif kind == "upload of an image":
            self.send(kind, "/datastore/image", {"image": f"new_{number:06}"}, "file", case["image"])
        elif kind == "submitted label":
            self.send(kind, "/datastore/label", {"image": name, "tag": "final"}, "label", case["label"])
        else:
            # Hardly anybody else decides about the same one meanwhile.
            tag = f"prediction{number % 3}"
            self.send("saved prediction", "/datastore/label", {"image": name, "tag": tag}, "label", case["label"])
            decision = choices.choice(["approve", "reject"])
            self.ask(decision, "POST", f"/sam2sgp/{decision}", json={"image": name, "label_tag": tag})

    def send(self, kind: str, path: str, query: dict, field: str, file: str) -> None:
        with open(file, "rb") as content:
            self.ask(kind, "PUT", path, params=query, files={field: (Path(file).name, content)})

    def segmenting(self, volumes: list[str]) -> None:
        """Have volumes segmented, one after the other, each time in another way than before."""
        for number in count():
            if self.over.is_set():
                return
            params = {"params": json.dumps({"k": 1 + number % 8})}
            volume = volumes[number % len(volumes)]
            self.ask("(segmentation)", "POST", f"/infer/{MODEL}?image={volume}&output=image", data=params)


def run(minutes: float, clients: int, size: int, slices: int) -> Load:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = []
        for modality, patients, shape in (("us", PATIENTS, (256, 256)), ("mr", VOLUMES, (size, size))):
            made = folder / modality
            make_phantoms(made, patients, shape, slices, modalities=(modality,), progress=False)
            cases += load_datalist(made)
        pictures = [case for case in cases if str(case["image"]).endswith(".png")]
        volumes = [case for case in cases if case not in pictures]
        studies = folder / "studies"
        (studies / "labels" / "final").mkdir(parents=True)
        for case in cases:
            shutil.copy(case["image"], studies)
        for case in [*pictures[:APPROVED], volumes[0]]:
            shutil.copy(case["label"], studies / "labels" / "final")
        environment = {"MONAI_LABEL_AUTO_UPDATE_SCORING": "false"}
        with serving(folder, studies, environment=environment) as server:
            load = Load(server.url, pictures[APPROVED:])
            load.ask("(training)", "POST", "/train/finetune", json={"max_epochs": 10_000})
            work: list[Callable[[], None]] = [lambda: load.segmenting([case["name"] for case in volumes[1:]])]
            work += [lambda seed=seed: load.person(seed) for seed in range(clients)]
            threads = [threading.Thread(target=task) for task in work]
            for thread in threads:
                thread.start()
            process = psutil.Process(server.process.pid)
            for _ in range(round(60 * minutes / SAMPLED)):
                time.sleep(SAMPLED)
                load.memory.append(process.memory_info().rss)
            running = load.ask("(training, state)", "GET", "/train/?check_if_running=true")
            print(f"training at the end: {running.text[:200] if running is not None else 'no answer'}")
            load.over.set()
            load.ask("(training, end)", "DELETE", "/train/")
            for thread in threads[1:]:
                thread.join()
        threads[0].join()
        return load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--size", type=int, default=256, help="pixels of a volume's slice")
    parser.add_argument("--slices", type=int, default=64, help="slices of a volume")
    parser.add_argument("--limit", type=float, default=1.0, help="seconds that people may wait at most")
    options = parser.parse_args()
    load = run(options.minutes, options.clients, options.size, options.slices)
    print(
        f"\n{options.clients} clients for {options.minutes:g} minutes beside volumes of {options.slices} slices and a"
    )
    print(f"training, {date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores; seconds\n")
    print("| request | number | median | 95 % | worst | failed |\n| --- | --- | --- | --- | --- | --- |")
    for kind, seconds in sorted(load.seconds.items()):
        ordered = sorted(seconds)
        high = ordered[min(int(0.95 * len(ordered)), len(ordered) - 1)]
        figures = (f"{value:.2f}" for value in (statistics.median(ordered), high, ordered[-1]))
        print(f"| {kind} | {len(ordered)} | {' | '.join(figures)} | {len(load.failures[kind])} |")
    for kind, failures in load.failures.items():
        for failure in sorted(set(failures))[:3]:
            print(f"{kind}: {failure}")
    print(f"memory of the server, MiB: {' '.join(f'{size / 2**20:.0f}' for size in load.memory)}")
    worst = max(max(seconds) for kind, seconds in load.seconds.items() if not kind.startswith("("))
    if worst > options.limit:
        sys.exit(f"The longest wait was {worst:.2f} s: expected at most {options.limit:g} s.")


if __name__ == "__main__":
    main()
