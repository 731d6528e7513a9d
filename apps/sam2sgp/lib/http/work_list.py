"""The images of the review page, in the order in which it pays to look at them.

In: what the datastore knows about its labels, and the order of images without one. Out: entries of one part of it.
First come predictions that are marked (unlike every support image, a class that may be absent), then the others and
drafts, least certain first, then images without a label in the order of the strategy `hybrid`, and what was decided.
Nothing is read from the images, so that ten thousand of them take a moment.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from monailabel.interfaces.datastore import DefaultLabelTag

from lib.stores.decisions import DRAFT, FINAL, REMOVED
from lib.stores.records import CORRECTED, UNCHANGED, origin_of

PREDICTED, UNLABELLED, APPROVED = "predicted", "unlabelled", "approved"
# In the order of the list.
STATES = (PREDICTED, DRAFT, UNLABELLED, REMOVED, APPROVED)
Records = Mapping[str, Mapping[str, Mapping[str, Any]]]


class Shown(Enum):
    """Which images are listed; `open`: those that wait for somebody."""

    open = "open"
    predicted = PREDICTED
    draft = DRAFT
    unlabelled = UNLABELLED
    approved = APPROVED
    removed = REMOVED
    all = "all"


class Order(Enum):
    """By what the list is sorted; `pays`: by what it pays most to look at."""

    pays = "pays"
    name = "name"


@dataclass(frozen=True)
class Entry:
    """An image in the list.

    Attributes:
        image: its id. tag: of the label that is shown first; "" for none. state: one of `STATES`.
        confidence: the lowest of a class that was found; None where nothing is known.
        unlike: whether it is unlike every image of the support set. absent: classes that may be absent.
        classes: names of those in the label, as far as known.
        user: who saved the label. time: when, in seconds since 1970.
    """

    image: str
    tag: str = ""
    state: str = UNLABELLED
    confidence: float | None = None
    unlike: bool = False
    absent: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    user: str | None = None
    time: float | None = None


def entry_of(image: str, records: Mapping[str, Mapping[str, Any]]) -> Entry:
    """The entry of an image with labels of these tags and what is known about each."""
    tag, state = shown_first(records)
    if not tag:
        return Entry(image)
    record, found = records[tag], prediction_of(records, tag)
    confidence, absent = found.get("confidence") or {}, found.get("maybe_absent")
    # An index of another program may hold anything here.
    known = {name: value for name, value in confidence.items() if isinstance(value, int | float)}
    named = [str(entry["name"]) for entry in record.get("label_info") or () if entry.get("name")]
    return Entry(
        image,
        tag,
        state,
        min(known.values(), default=None),
        bool(found.get("unlike_support")),
        tuple(map(str, absent)) if isinstance(absent, list | tuple) else (),
        tuple(known) if known else tuple(named),
        record.get("user"),
        record.get("ts"),
    )


def shown_first(tags: Mapping[str, Any]) -> tuple[str, str]:
    """The tag of the label that is shown first, "" for none, and the state of the image."""
    for tag, state in ((FINAL, APPROVED), (DRAFT, DRAFT)):
        if tag in tags:
            return tag, state
    others = [tag for tag in tags if tag != REMOVED]
    if others:
        original = DefaultLabelTag.ORIGINAL.value
        return original if original in others else others[0], PREDICTED
    return (REMOVED, REMOVED) if REMOVED in tags else ("", UNLABELLED)


def prediction_of(records: Mapping[str, Mapping[str, Any]], tag: str) -> dict[str, Any]:
    """What a model said of its label: that with this tag, or the one from which it was made; {} if none did."""
    for name in (tag, DefaultLabelTag.ORIGINAL.value):
        params = records.get(name, {}).get("params")
        if isinstance(params, dict) and isinstance(params.get("confidence"), dict | None):
            return params
    return {}


def origins(records: Records) -> dict[str, int]:
    """How approved labels came about: predictions `unchanged`, predictions `corrected` on the page, and `others`."""
    counts = {UNCHANGED: 0, CORRECTED: 0, "others": 0}
    for found in records.values():
        if FINAL in found:
            counts[origin_of(found[FINAL]) or "others"] += 1
    return counts


def listed(
    records: Records,
    ranked: Callable[[list[str]], list[str]],
    shown: Shown = Shown.open,
    order: Order = Order.pays,
    name: str = "",
    of_class: str = "",
) -> tuple[list[Entry], dict[str, int]]:
    """Entries that match, in order, and the number of images in each state.

    Args:
        records: what is known about the labels of each image, by tag.
        ranked: puts ids of images without an approved label in the order in which they should be labelled.
        shown: in which state.
        order: what pays most first, or by name.
        name: part of the image's id; case doesn't matter.
        of_class: name of a class that the label holds.
    """
    entries = [entry_of(image, found) for image, found in records.items()]
    counts = dict.fromkeys(STATES, 0)
    for entry in entries:
        counts[entry.state] += 1
    wanted = {Shown.open: {PREDICTED, DRAFT, UNLABELLED}, Shown.all: set(STATES)}.get(shown, {shown.value})
    part = name.casefold()
    kept = [
        entry
        for entry in entries
        if entry.state in wanted
        and part in entry.image.casefold()
        and (not of_class or of_class in entry.classes or of_class in entry.absent)
    ]
    if order is Order.name:
        return sorted(kept, key=lambda entry: entry.image), counts
    unlabelled = [entry.image for entry in kept if entry.state == UNLABELLED]
    place = {image: number for number, image in enumerate(ranked(unlabelled))} if unlabelled else {}
    return sorted(kept, key=lambda entry: _worth(entry, place)), counts


def _worth(entry: Entry, place: Mapping[str, int]) -> tuple:
    """What entries are sorted by, the first ones first."""
    waits = entry.state in (PREDICTED, DRAFT)
    marked = waits and (entry.unlike or bool(entry.absent))
    doubt = entry.confidence if waits and entry.confidence is not None else 1.0
    group = 0 if waits else STATES.index(entry.state)
    recent = -(entry.time or 0) if entry.state == APPROVED else 0
    return group, not marked, doubt, recent, place.get(entry.image, 0), entry.image
