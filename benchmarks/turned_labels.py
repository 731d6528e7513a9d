"""How often labels that fit are taken for turned ones, and turned ones are found out, see `sam2sgp.support.turned`.

    python benchmarks/turned_labels.py DIR [DIR ...] [--cases 30] [--draws 400]

Of each data folder support sets of 3, 4, 8 and 16 labelled images are drawn, with the labels as they are and with all
of them turned alike.
"""

import argparse
import logging
from pathlib import Path

import numpy as np

from sam2sgp.data import load_datalist
from sam2sgp.data.io import read_image, read_label
from sam2sgp.support.turned import AS_STORED, REVERSED, TURNS, edge_fits, how_turned

SIZES = (3, 4, 8, 16)
# Of each turn the one that undoes it, where that is another.
UNDONE = {"turned by 90 degrees": "turned by 270 degrees", "turned by 270 degrees": "turned by 90 degrees"}


def seen_turned(fit: dict[str, float], turn: str) -> dict[str, float] | None:
    """What of a fit is known where the label is turned: how it fits so, and turned back; None where it can't be."""
    return {AS_STORED: fit[turn], UNDONE.get(turn, turn): fit[AS_STORED]} if turn in fit else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    parser.add_argument("--cases", type=int, default=30, help="looked at of each folder")
    parser.add_argument("--draws", type=int, default=400, help="support sets drawn of each folder and size")
    options = parser.parse_args()
    false = sets = 0
    found: dict[str, list[bool]] = {turn: [] for turn in (*TURNS, REVERSED) if turn != AS_STORED}
    for folder in options.folders:
        rng = np.random.default_rng(0)
        cases = load_datalist(folder)
        fits = []
        for index in rng.permutation(len(cases))[: options.cases]:
            image = read_image(cases[index]["image"])
            fits.append(edge_fits(image.slices, read_label(cases[index]["label"], image.geometry)))
        here = 0
        for size in SIZES:
            for _ in range(options.draws if len(fits) >= size else 0):
                drawn = [fits[index] for index in rng.choice(len(fits), size, replace=False)]
                here += how_turned(drawn) is not None
                sets += 1
                for turn, hits in found.items():
                    turned = [fit for fit in (seen_turned(fit, turn) for fit in drawn if fit) if fit]
                    if len(turned) == size:
                        hits.append(how_turned(turned) == UNDONE.get(turn, turn))
        false += here
        print(f"{folder.name}: {len(fits)} labels, {here} support sets taken for turned", flush=True)
    print(f"Taken for turned: {false} of {sets} support sets")
    for turn, hits in found.items():
        if hits:
            print(f"Labels {turn}: found out in {np.mean(hits):.2f} of {len(hits)} support sets")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
