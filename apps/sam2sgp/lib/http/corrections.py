"""What somebody painted on a page, as voxel changes of a label.

In: for each slice, runs of pixels with their new class value: [start, length, value, start, length, value, …], where
`start` counts the slice's pixels row by row as displayed. Out: the whole class map. Runs go upwards and don't overlap,
so a request can't ask for more work than the slice has pixels.
"""

from collections.abc import Collection, Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from lib.checks import BadLabel
from lib.http.routing import Id, OptionalTag
from lib.serving.options import Declared, LabelClasses
from lib.stores.decisions import DRAFT, FINAL

MOST_SLICES = 4096
# Numbers of one request, whose body has a limit as well.
MOST_NUMBERS = 1 << 19
MOST_VOXELS = 1 << 40

State = Annotated[str, Field(max_length=256)]


class SliceChange(Declared):
    """What changes in one slice; see the module."""

    slice: Annotated[int, Field(ge=0, le=MOST_VOXELS)]
    runs: Annotated[list[Annotated[int, Field(ge=0, le=MOST_VOXELS)]], Field(max_length=MOST_NUMBERS, fail_fast=True)]


class Correction(Declared):
    """A label that somebody made on the page, of another one or of nothing.

    `image_seen`, `seen` and `replaces` are states: of the image, of the label with `label_tag` from which it was made,
    and of the label whose place it takes; "" where there was none.
    """

    image: Id
    image_seen: Annotated[State, Field(min_length=1)]
    shape: Annotated[list[int], Field(min_length=3, max_length=3)]
    label_tag: OptionalTag
    seen: State
    save_as: Literal["draft", "final"]
    replaces: State
    classes: LabelClasses
    changes: Annotated[list[SliceChange], Field(max_length=MOST_SLICES, fail_fast=True)]


def corrected(labels: np.ndarray, changes: Sequence[SliceChange], values: Collection[int]) -> np.ndarray:
    """A class map (Z, H, W) with the changes; the one given stays as it is.

    Args:
        labels: integers.
        changes: of different slices.
        values: of the classes that may be painted.

    Raises:
        BadLabel: a slice or pixel outside the map, runs that are not in order, or a value of no class.

    Example:
        >>> changes = [SliceChange(slice=0, runs=[1, 2, 7])]
        >>> corrected(np.zeros((1, 2, 2), int), changes, {7}).tolist()
        [[[0, 7], [7, 0]]]
    """
    allowed = np.array(sorted({0, *values}))
    painted = labels.astype(np.uint16, order="C")
    pixels = painted.reshape(len(painted), -1)
    seen: set[int] = set()
    for change in changes:
        if change.slice >= len(painted) or change.slice in seen:
            raise BadLabel(f"changes: expected each slice from 0 to {len(painted) - 1} once, found {change.slice}.")
        seen.add(change.slice)
        if len(change.runs) % 3:
            raise BadLabel(f"changes: expected start, length and value of each run, found {len(change.runs)} numbers.")
        starts, lengths, new = np.array(change.runs, dtype=np.int64).reshape(-1, 3).T
        ends = starts + lengths
        in_order = (starts[1:] >= ends[:-1]).all() and (lengths > 0).all() and (ends <= pixels.shape[1]).all()
        if not in_order:
            raise BadLabel(f"changes: expected runs upwards within slice {change.slice}, found others; load it again.")
        if not np.isin(new, allowed).all():
            raise BadLabel(
                f"changes: expected the classes {', '.join(map(str, allowed))}, found "
                f"{int(new[~np.isin(new, allowed)][0])}; name the class first."
            )
        row = pixels[change.slice]
        for start, end, value in zip(starts.tolist(), ends.tolist(), new.tolist(), strict=True):
            row[start:end] = value
    return painted


def tags_seen(correction: Correction) -> dict[str, str]:
    """The states of the labels that a correction is about, by their tags."""
    target = FINAL if correction.save_as == FINAL else DRAFT
    base = {correction.label_tag: correction.seen} if correction.label_tag else {}
    return {target: correction.replaces, **base}


class Restoration(Declared):
    """An earlier state of a label, to be a draft again. `replaces`: state of the draft there is now."""

    image: Id
    version: Annotated[str, Field(max_length=128)]
    image_seen: Annotated[State, Field(min_length=1)]
    replaces: State
