"""Which image to offer next: `random`, `uncertainty`, `coverage` and `hybrid`.

In: the datastore's list of unlabelled images, and the scores that `Scoring` has left on disk. Out: the id of one image,
and why. No network is used here. Embeddings are held in memory and only rows that are new are read, so an answer among
10,000 images takes a fraction of a second.

Cases of the seed folder, which are no images of the datastore, count as labelled too.

An image that was offered lately counts as labelled: it is not offered again, and neither is one like it. When all have
been offered, the one whose offer is the longest ago comes again. One with a draft waits for its approval: it is offered
only where every other one is labelled. All strategies share one `Choices`, which several threads may ask: it takes them
one by one.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from monailabel.interfaces.tasks.strategy import Strategy

from lib.activelearning.scoring import Row, Scores
from lib.stores.decisions import DRAFT, Decisions
from sam2sgp.active import STRATEGIES, choose

RANDOM = "random"
SECONDS_OF_AN_OFFER = 3600.0
# Images that are put in order for people to see.
FIRST = 24
DESCRIPTIONS = {
    RANDOM: "Any unlabelled image",
    "uncertainty": "The image whose segmentation is most in doubt",
    "coverage": "The image least like anything labelled",
    "hybrid": "The image whose label would help most with images in doubt",
}


class Choices:
    """Scores in memory, and the choice among them.

    Args:
        scores: the file of scores.
        seeds: gives the names of labelled cases that are no images of the datastore.
        seed: of random choices.
    """

    def __init__(self, scores: Scores, seeds: Callable[[], list[str]] = list, seed: int | None = None) -> None:
        self.scores = scores
        self.seeds = seeds
        self.rng = np.random.default_rng(seed)
        self._rows: dict[str, Row] = {}
        self._serial = 0
        self._weights: str | None = None
        self._place: dict[str, int] = {}
        self._lock = threading.Lock()
        self._embedding = torch.zeros(0, 0)

    def __call__(self, strategy: str, unlabelled: list[str], labelled: list[str]) -> dict[str, Any] | None:
        """Choose one of the unlabelled images; None where there is none."""
        with self._lock:
            return self._offer(strategy, unlabelled, labelled)

    def ranked(self, strategy: str, unlabelled: list[str], labelled: list[str]) -> list[str]:
        """All unlabelled images: the `FIRST` ones in the order of the strategy, then the others by name."""
        with self._lock:
            self._read()
            scored = [name for name in unlabelled if name in self._place]
            first = []
            if scored:
                order, _ = choose(strategy, *self._known(scored, labelled), FIRST)
                first = [scored[number] for number in order.tolist()]
        return first + sorted(set(unlabelled) - set(first))

    def _offer(self, strategy: str, unlabelled: list[str], labelled: list[str]) -> dict[str, Any] | None:
        labelled_set = set(labelled)
        open_images = [name for name in unlabelled if name not in labelled_set]
        if not open_images:
            return None
        now = time.time()
        offers = self.scores.offers()
        lately = {name for name in open_images if now - offers.get(name, 0.0) < SECONDS_OF_AN_OFFER}
        free = [name for name in open_images if name not in lately]
        if not free:
            free = [min(open_images, key=lambda name: offers[name])]
            lately.discard(free[0])
        found = self._choose(strategy, free, [*labelled, *lately])
        self.scores.offer(found["id"], now)
        return found

    def _choose(self, strategy: str, free: list[str], labelled: list[str]) -> dict[str, Any]:
        if strategy == RANDOM:
            return {"id": free[int(self.rng.integers(len(free)))]}
        self._read()
        scored = [name for name in free if name in self._place]
        if strategy == "uncertainty":
            scored = [name for name in scored if self._rows[name].uncertainty is not None]
        missing = len(free) - len(scored)
        if not scored:
            note = "No image is scored yet, so this one is drawn at random; run the scoring."
            return {**self._choose(RANDOM, free, labelled), "note": note}
        candidates, covered, uncertainty = self._known(scored, labelled)
        order, distance = choose(strategy, candidates, covered, uncertainty)
        number = int(order[0])
        found: dict[str, Any] = {"id": scored[number], "distance": round(float(distance[number]), 4)}
        if self._rows[scored[number]].uncertainty is not None:
            found["uncertainty"] = round(float(uncertainty[number]), 4)
        if missing:
            found["note"] = f"{missing} of {len(free)} images are not scored yet; run the scoring to consider them."
        return found

    def _known(self, scored: list[str], labelled: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embeddings of candidates (N, D) and of what is labelled (M, D); uncertainties of the candidates (N,)."""
        covered = [name for name in (*labelled, *self.seeds()) if name in self._place]
        uncertainty = torch.tensor([_number(self._rows[name].uncertainty) for name in scored])
        return (
            self._embedding[[self._place[name] for name in scored]],
            self._embedding[[self._place[name] for name in covered]],
            uncertainty,
        )

    def _read(self) -> None:
        """Take in what was written since the last time."""
        rows = self.scores.newer(self._serial)
        if not rows:
            return
        self._serial = rows[-1].serial
        self._rows |= {row.id: row for row in rows}
        # Embeddings by different weights can't be compared; while new ones are made, the most are of the old ones.
        counts = Counter(row.weights for row in self._rows.values() if row.embedding is not None)
        weights = max(counts, key=lambda name: counts[name]) if counts else None
        usable = [row for row in self._rows.values() if row.embedding is not None and row.weights == weights]
        self._place = {row.id: number for number, row in enumerate(usable)}
        self._embedding = torch.stack([row.embedding for row in usable]).float() if usable else torch.zeros(0, 0)


class ScoredStrategy(Strategy):
    """A strategy by its name."""

    def __init__(self, name: str, choices: Choices) -> None:
        super().__init__(DESCRIPTIONS[name])
        self.name = name
        self.choices = choices

    def __call__(self, request: dict[str, Any], datastore: Decisions) -> dict[str, Any] | None:
        """`id` of the image, with `uncertainty`, `distance` to what is labelled, and a `note`, as far as known."""
        unlabelled = datastore.get_unlabeled_images(request.get("label_tag"), request.get("labels"))
        drafted = {image_id for image_id, tags in datastore.tags().items() if DRAFT in tags}
        free = [image_id for image_id in unlabelled if image_id not in drafted]
        return self.choices(self.name, free or unlabelled, datastore.get_labeled_images())


def strategies(choices: Choices) -> dict[str, ScoredStrategy]:
    """All strategies by name, the default first."""
    return {name: ScoredStrategy(name, choices) for name in (*reversed(STRATEGIES), RANDOM)}


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
