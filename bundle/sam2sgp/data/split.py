"""Sections of a data set: whole patients for training, validation and test, drawn by a seed."""

from collections.abc import Sequence

import numpy as np

SECTIONS = ("train", "val", "test")


def assign_sections(cases: list[dict], split: Sequence[float], seed: int) -> None:
    """Set `section` of labelled cases that have none yet: whole patients, in a random order that `seed` decides.

    Sections that the file gives keep their share: the rest is split among the others. A patient who is in a given
    section belongs to it with all cases.
    """
    given = {case["patient"]: case["section"] for case in cases if "section" in case}
    open_sections = [name for name in SECTIONS if name not in given.values()]
    free = sorted({case["patient"] for case in cases if "label" in case and case["patient"] not in given})
    shares = np.array([split[SECTIONS.index(name)] for name in open_sections])
    counts = _apportion(shares, len(free))
    order = [free[index] for index in np.random.default_rng(seed).permutation(len(free))]
    section_of = dict(given)
    start = 0
    for name, count in zip(open_sections, counts, strict=True):
        section_of.update(dict.fromkeys(order[start : start + count], name))
        start += count
    for case in cases:
        if "label" in case and "section" not in case:
            case["section"] = section_of[case["patient"]]


def _apportion(shares: np.ndarray, total: int) -> list[int]:
    """Whole numbers that sum to `total`, closest to `shares`, and at least 1 for each share above 0 if `total` allows.

    With fewer than that the first sections are served first.
    """
    if not shares.sum():
        shares = np.eye(1, len(shares))[0]
    exact = shares / shares.sum() * total
    counts = np.floor(exact).astype(int)
    for index in np.argsort(-(exact - counts), kind="stable")[: total - counts.sum()]:
        counts[index] += 1
    for index in np.flatnonzero((shares > 0) & (counts == 0)):
        if counts.max() > 1:
            counts[np.argmax(counts)] -= 1
            counts[index] += 1
    return counts.tolist()


def subset(datalist: Sequence[dict], count: int | None, seed: int = 0) -> list[dict]:
    """At most `count` cases of a datalist, drawn with `seed`, in the datalist's order; None means all."""
    if count is None or count >= len(datalist):
        return list(datalist)
    chosen = np.random.default_rng(seed).permutation(len(datalist))[:count]
    return [datalist[index] for index in sorted(chosen)]
