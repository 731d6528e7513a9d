"""A scripted annotator on the review page: segments, corrects, approves and rejects, by keys and brush only.

    python benchmarks/annotator.py --data DIR --images 50

Starts the app on a copy of a data folder (`images/` and `labels/` or `masks/`; without `--data` phantoms are made), of
which `--seeds` images are approved at the start, and drives the page in Chromium. Each image is segmented by key. A
prediction with a Dice of at least `--good` is approved as it is; of the others the first `--corrections` are corrected
with the brush (what was found is removed, and the truth painted with a round brush, so that its corners stay round) and
approved, and the rest are rejected. Prints a line for each image: Dice of the prediction, what was done, and seconds
from the decision's key until the next image is on the screen, without segmenting. Exits with 1 if anything was not
stored as it was painted.
"""

import argparse
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
from scipy.ndimage import binary_dilation, binary_erosion, distance_transform_edt, label
from skimage.morphology import disk

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from playwright.sync_api import Page, expect  # noqa: E402

from sam2sgp.data import load_datalist, read_image, read_label  # noqa: E402
from sam2sgp.data.phantom import make_phantoms  # noqa: E402
from tests.e2e.browsers import page  # noqa: E402
from tests.e2e.server import Server, serving  # noqa: E402

PATIENCE_MS = 300_000


class Annotator:
    """Somebody at the page who knows the truth.

    Args:
        opened: the page. server: of the app. truths: label files by image id.
    """

    def __init__(self, opened: Page, server: Server, truths: dict[str, Path]) -> None:
        self.opened = opened
        self.server = server
        self.truths = truths

    def stored(self, image: str, tag: str) -> np.ndarray | None:
        """A label (Z, H, W) as it is stored; None where there is none."""
        studies = Path(self.server.studies)
        found = sorted((studies / "labels" / tag).glob(f"{image}.*"))
        source = next(path for path in studies.glob(f"{image}.*") if path.is_file())
        return read_label(found[0], read_image(source).geometry) if found else None

    def truth(self, image: str) -> np.ndarray:
        source = next(path for path in Path(self.server.studies).glob(f"{image}.*") if path.is_file())
        return read_label(self.truths[image], read_image(source).geometry)

    def shown(self) -> str:
        """The image on the screen, once it is there."""
        title = self.opened.locator("#panel h2").inner_text()
        expect(self.opened.locator(f"#picture[data-drawn^='{title}/']")).to_have_count(1)
        return title

    def segment(self) -> None:
        """By key; returns when the prediction is on the screen."""
        with self.opened.expect_response(lambda answer: "/infer/" in answer.url) as answer:
            self.opened.keyboard.press("g")
        if not answer.value.ok:
            raise RuntimeError(answer.value.text())
        expect(self.opened.locator("#message")).to_contain_text("Segmented")

    def decide(self, key: str, image: str, is_last: bool) -> float:
        """Press a key; seconds until the next image is on the screen, if there is one."""
        started = time.perf_counter()
        with self.opened.expect_response(lambda answer: answer.request.method == "POST") as answer:
            self.opened.keyboard.press(key)
        if not answer.value.ok:
            raise RuntimeError(answer.value.text())
        expect(self.opened.locator("#message")).to_contain_text(image)
        if not is_last:
            expect(self.opened.locator("#panel h2")).not_to_have_text(image)
        self.shown()
        return time.perf_counter() - started

    def paint(self, truth: np.ndarray) -> None:
        """Put the truth (1, H, W) in the place of what was found, with fill and brush."""
        found = self.stored(self.shown(), "original")
        self.opened.keyboard.press("f")
        for value in np.unique(found[found > 0]):
            parts, count = label(found[0] == value)
            for number in range(1, count + 1):
                row, column = self.middle(parts == number)
                self.opened.keyboard.down("Shift")
                self.opened.mouse.click(*self.place(row, column))
                self.opened.keyboard.up("Shift")
        self.opened.keyboard.press("b")
        for value in np.unique(truth[truth > 0]):
            self.opened.keyboard.press(str(self.key_of(int(value))))
            self.brush(truth[0] == value)

    def brush(self, mask: np.ndarray) -> None:
        """Paint a mask (H, W) with a brush that fits into it."""
        radius = max(1, min(12, int(distance_transform_edt(np.pad(mask, 1)).max() // 3)))
        self.opened.locator("#size").fill(str(2 * radius))
        self.opened.locator("#picture").focus()
        centres = binary_erosion(mask, disk(radius))
        for row in range(0, len(mask), max(1, radius // 2)):
            runs = np.flatnonzero(np.diff(np.pad(centres[row].astype(int), 1)))
            for first, end in zip(runs[::2], runs[1::2], strict=True):
                self.opened.mouse.move(*self.place(row, first))
                self.opened.mouse.down()
                self.opened.mouse.move(*self.place(row, end - 1), steps=2)
                self.opened.mouse.up()

    def key_of(self, value: int) -> int:
        values = self.opened.locator("#panel .class").evaluate_all("rows => rows.map(row => Number(row.dataset.value))")
        return values.index(value) + 1

    def place(self, row: float, column: float) -> tuple[float, float]:
        """Where a pixel's centre is on the screen."""
        zoom, stretch, left, top = json.loads(self.opened.locator("#picture").get_attribute("data-view"))
        box = self.opened.locator("#picture").bounding_box()
        return box["x"] + left + (column + 0.5) * zoom, box["y"] + top + (row + 0.5) * zoom * stretch

    def middle(self, mask: np.ndarray) -> tuple[int, int]:
        """A pixel deep inside a mask."""
        depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
        row, column = np.unravel_index(int(depth.argmax()), mask.shape)
        return int(row), int(column)


def dice(found: np.ndarray | None, truth: np.ndarray) -> float:
    """Mean over the classes of the truth."""
    if found is None:
        return 0.0
    values = [value for value in np.unique(truth) if value]
    return statistics.mean(
        2.0 * ((found == value) & (truth == value)).sum() / ((found == value).sum() + (truth == value).sum())
        for value in values
    )


def work(annotator: Annotator, images: int, good: float, corrections: int) -> int:
    """Work through images; the number of those that were not stored as painted."""
    scores, seconds, wrong = [], [], 0
    for number in range(images):
        image = annotator.shown()
        annotator.segment()
        truth = annotator.truth(image)
        score = dice(annotator.stored(image, "original"), truth)
        if score >= good:
            done, key = "approved", "a"
        elif corrections and len(truth) == 1:
            corrections -= 1
            done, key = "corrected", "a"
            annotator.paint(truth)
        else:
            done, key = "rejected", "x"
        took = annotator.decide(key, image, number == images - 1)
        final = annotator.stored(image, "final")
        if done == "corrected":
            near = binary_dilation(truth > 0, np.ones((1, 5, 5)))
            if final is None or dice(final, truth) < 0.8 or (final[~near] > 0).any():
                wrong += 1
        elif (final is None) != (done == "rejected"):
            wrong += 1
        scores.append(score)
        seconds.append(took)
        left = f", Dice of the label {dice(final, truth):.3f}" if done == "corrected" else ""
        print(f"{number + 1:3} {image:24} Dice {score:.3f}  {done:9} next image after {took:.2f} s{left}", flush=True)
    tenths = [f"{statistics.mean(scores[first : first + 10]):.3f}" for first in range(0, len(scores), 10)]
    print(
        f"\nDice of predictions, ten by ten: {', '.join(tenths)}\n"
        f"Seconds from a decision to the next image: median {statistics.median(seconds):.2f}, worst {max(seconds):.2f}"
    )
    return wrong


def studies_of(folder: Path, cases: list[dict], seeds: int, images: int) -> tuple[Path, dict[str, Path]]:
    """A studies folder with some approved labels, and the truths of the other images.

    Images get numbers as names, in random order, so that the list by name is in no order of its own.
    """
    studies = folder / "studies"
    (studies / "labels" / "final").mkdir(parents=True)
    order = np.random.default_rng(0).permutation(len(cases))[: seeds + images]
    truths = {}
    for place, case in enumerate(cases[number] for number in order):
        image, truth = Path(case["image"]), Path(case["label"])
        name = f"case_{place + 1:03}"
        shutil.copy(image, studies / f"{name}{suffix_of(image)}")
        if place < seeds:
            shutil.copy(truth, studies / "labels" / "final" / f"{name}{suffix_of(truth)}")
        else:
            truths[name] = truth
    return studies, truths


def suffix_of(path: Path) -> str:
    return ".nii.gz" if path.name.endswith(".nii.gz") else path.suffix


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--data", type=Path)
    arguments.add_argument("--images", type=int, default=50)
    arguments.add_argument("--seeds", type=int, default=2)
    arguments.add_argument("--corrections", type=int, default=10)
    arguments.add_argument("--good", type=float, default=0.7)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if options.data:
            cases = load_datalist(options.data)
        else:
            make_phantoms(folder / "set", 16, modalities=("us",), progress=False)
            cases = load_datalist(folder / "set")
        studies, truths = studies_of(folder, cases, options.seeds, options.images)
        print(f"{date.today()}, {platform.machine()}, {platform.system()}; {len(truths)} images\n")
        with serving(folder, studies) as server, page(1280, 800) as opened:
            opened.set_default_timeout(PATIENCE_MS)
            expect.set_options(timeout=PATIENCE_MS)
            opened.goto(f"{server.url}/sam2sgp/review/")
            opened.locator("[name=order]").select_option("name")
            expect(opened.locator("#picture[data-drawn]")).to_have_count(1)
            opened.locator("#picture").focus()
            wrong = work(Annotator(opened, server, truths), len(truths), options.good, options.corrections)
    if wrong:
        print(f"{wrong} labels were not stored as they were painted")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
