"""Decisions about one image at once: was what was answered also what is stored?

    python benchmarks/decisions.py --rounds 200

Starts the app in a server process of its own on loopback, on a few phantom pictures. In each round several clients at
once approve, reject, remove and submit labels of one picture, and the answers and the labels afterwards are compared
with every order in which the decisions may have been carried out. Prints how often each was answered how; exits with 1
at the first round that fits no order.
"""

import argparse
import shutil
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from sam2sgp.data import load_datalist  # noqa: E402
from sam2sgp.data.phantom import make_phantoms  # noqa: E402
from tests.e2e.server import serving  # noqa: E402
from tests.helpers.decisions import rounds  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--clients", type=int, default=4, help="decisions at once in each round")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        phantoms = make_phantoms(folder / "phantoms", 4, size=(64, 64), modalities=("us",), progress=False)
        cases = load_datalist(phantoms)[:4]
        studies = folder / "studies"
        (studies / "labels" / "final").mkdir(parents=True)
        for case in cases:
            shutil.copy(case["image"], studies)
        for case in cases[:2]:
            shutil.copy(case["label"], studies / "labels" / "final")
        image, labels = cases[2]["name"], (Path(cases[2]["label"]), Path(cases[0]["label"]))
        with serving(folder, studies, {"image_size": "64"}, {"MONAI_LABEL_AUTO_UPDATE_SCORING": "false"}) as server:
            started = time.perf_counter()
            try:
                counts = rounds(server.url, studies, image, labels, options.rounds, options.clients)
            except AssertionError as error:
                sys.exit(f"An answer was not true. {error}")
            taken = time.perf_counter() - started
    print(f"\n{options.rounds} rounds of {options.clients} decisions at once, {date.today()}: all answers were true")
    for (decision, status), count in sorted(counts.items()):
        print(f"{decision:8} {status} {count:5}")
    print(f"{1000 * taken / options.rounds:.0f} ms a round")


if __name__ == "__main__":
    main()
