"""What a client of the MONAI Label app waits for, with many images in the datastore; and the budgets.

    python benchmarks/app_server.py --images 10000

Starts the app in a server process of its own on loopback, on a folder of phantom pictures (links to a few files, so
that a large datastore is made at once) of which a few have approved labels, and asks it over HTTP. Medians, in
milliseconds.

`approve to in use`: from sending an approved label to the end of the answer that lists it among the support items used.
`second request`: the same image asked for again over the first time: for one class of several, which needs nothing new;
and with another K, for which the image is encoded already but has to be segmented again.
`support page`: the page with its ranked list of images, as a browser gets it first and then again; `last page of the
list`; and a picture that it shows, which is drawn for the first time.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import requests

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from sam2sgp.data import load_datalist  # noqa: E402
from sam2sgp.data.phantom import make_phantoms  # noqa: E402
from tests.e2e.server import Server, serving  # noqa: E402

PATIENTS = 64
REPEATS = 9
BUDGETS = {
    "info": 50.0,
    "next sample, random": 1000.0,
    "next sample, hybrid": 1000.0,
    "approve to in use": 3000.0,
    "second request over first, one class": 0.5,
    "second request over first, another K": 0.5,
}


def make_studies(folder: Path, images: int, labelled: int) -> tuple[list[str], Path]:
    """A folder of pictures `case_00000.png`, …, of which the first ones have approved labels; ids and all labels."""
    phantoms = Path(make_phantoms(folder / "phantoms", PATIENTS, (256, 256), modalities=["us"], progress=False))
    cases = load_datalist(phantoms)
    studies, labels = folder / "studies", folder / "labels"
    for made in (studies / "labels" / "final", labels):
        made.mkdir(parents=True)
    ids = [f"case_{number:05d}" for number in range(images)]
    for number, identifier in enumerate(ids):
        case = cases[number % len(cases)]
        os.link(case["image"], studies / f"{identifier}.png")
        if number < len(cases):
            shutil.copy(case["label"], labels / f"{identifier}.png")
        if number < labelled:
            shutil.copy(case["label"], studies / "labels" / "final" / f"{identifier}.png")
    return ids, labels


def timed(call: Callable[[], requests.Response]) -> tuple[float, requests.Response]:
    """Milliseconds of a request, and its answer."""
    started = time.perf_counter()
    answer = call()
    answer.raise_for_status()
    return 1000 * (time.perf_counter() - started), answer


def median(call: Callable[[], requests.Response], repeats: int = REPEATS) -> float:
    return statistics.median(timed(call)[0] for _ in range(repeats))


def infer(server: Server, image: str, **params) -> requests.Response:
    url = f"{server.url}/infer/sam2sgp?image={image}&output=json"
    return requests.post(url, data={"params": json.dumps(params)}, timeout=600)


def approve(server: Server, image: str, label: Path) -> requests.Response:
    with open(label, "rb") as file:
        url = f"{server.url}/datastore/label?image={image}&tag=final"
        return requests.put(url, files={"label": (label.name, file)}, timeout=600)


def measure(images: int, labelled: int) -> dict[str, float]:
    """Milliseconds by what was asked for."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ids, labels = make_studies(folder, images, labelled)
        started = time.perf_counter()
        with serving(folder, folder / "studies") as server:
            found = {"start": 1000 * (time.perf_counter() - started)}
            found["first info"], _ = timed(lambda: requests.get(f"{server.url}/info/", timeout=600))
            found["info"] = median(lambda: requests.get(f"{server.url}/info/", timeout=600))
            # An offer starts the scoring of all images in the background.
            found |= measure_page(server, ids)
            for strategy in ("random", "hybrid"):
                url = f"{server.url}/activelearning/{strategy}"
                found[f"next sample, {strategy}"] = median(lambda url=url: requests.post(url, json={}, timeout=600))
            infer(server, ids[-1])
            queries = iter(ids[PATIENTS:])
            again = {"one class": {"classes": ["class_1"]}, "another K": {"k": 2}}
            times, approvals = defaultdict(list), []
            for _ in range(REPEATS):
                query = next(queries)
                times["first request"].append(timed(lambda query=query: infer(server, query))[0])
                for name, params in again.items():
                    taken, _ = timed(lambda query=query, params=params: infer(server, query, **params))
                    times[f"second request, {name}"].append(taken)
            found |= {name: statistics.median(values) for name, values in times.items()}
            for name in again:
                ratios = np.divide(times[f"second request, {name}"], times["first request"])
                found[f"second request over first, {name}"] = float(np.median(ratios))
            for number in range(labelled, labelled + REPEATS):
                label = labels / f"{ids[number]}.png"
                started = time.perf_counter()
                approve(server, ids[number], label).raise_for_status()
                answer = infer(server, next(queries), k=64).json()
                approvals.append(1000 * (time.perf_counter() - started))
                used = {item["image"] for items in answer["support"].values() for item in items}
                if ids[number] not in used:
                    raise RuntimeError(f"{ids[number]} was approved, but the next answer does not list it.")
            found["approve to in use"] = statistics.median(approvals)
    return found


def measure_page(server: Server, ids: list[str]) -> dict[str, float]:
    """Milliseconds of the support page's parts."""
    url = f"{server.url}/sam2sgp"
    first, answer = timed(lambda: requests.get(f"{url}/", timeout=600))
    last = int(re.findall(r"Page 1 of (\d+)", answer.text)[-1])
    pictures = iter(ids[-REPEATS:])
    return {
        "support page, first": first,
        "support page": median(lambda: requests.get(f"{url}/", timeout=600)),
        "support page, last of the list": median(lambda: requests.get(f"{url}/?next={last}", timeout=600)),
        "picture on the support page": median(
            lambda: requests.get(f"{url}/picture?image={next(pictures)}", timeout=600)
        ),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--images", type=int, default=10_000, help="in the datastore")
    arguments.add_argument("--labelled", type=int, default=8, help="of them approved at the start")
    options = arguments.parse_args()
    found = measure(options.images, options.labelled)
    print(f"\n{date.today()}, {platform.machine()}, {os.cpu_count()} cores, lite, {options.images} images\n")
    print("| what | measured | budget |\n| --- | --- | --- |")
    for name, value in found.items():
        unit = "" if "over first" in name else " ms"
        budget = f"{BUDGETS[name]:g}{unit}" if name in BUDGETS else ""
        print(f"| {name} | {value:.2f}{unit} | {budget} |")


if __name__ == "__main__":
    main()
