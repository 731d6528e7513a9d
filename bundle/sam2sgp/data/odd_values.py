"""Class values that may be none: of one label only, or of so few pixels that they may be strays.

In: how many pixels of each value the labels of one data set have. Out: sentences. Where nothing says what a value is,
it becomes a class of its own, and then every query is searched for it.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from sam2sgp.data.pairing import NAMES_SHOWN

# Of fewer labels, none shows what is usual. Where more than such a share of them have values of their own, that is.
LEAST_LABELS, OWN_SHARE = 3, 0.25
# So many pixels are few where the largest class of the same label has so many times as many; the second is for pictures
# of millions of pixels.
FEW = ((64, 100), (1000, 1000))
# Of a class of which most other labels have so many times as many, so many pixels are too few to be an object.
STRAY_PIXELS, MUCH_MORE = 8, 100
REMEDY = (
    "If this is no class, set such pixels to 0 or to the class that they are of; if it is one, give it a name in "
    "dataset.json or labels.json."
)


@dataclass(frozen=True, eq=False)
class CountedLabel:
    """A label file, or the name of its case; the pixels of each value in it but 0, and which of the values are left at
    the network's size."""

    path: str
    pixels: Mapping[int, int]
    seen: Collection[int]


def odd_values(labels: Iterable[CountedLabel], named: Collection[int] = ()) -> Iterator[str]:
    """What may be wrong with the values of one data set, a sentence each.

    Args:
        labels: all of the set.
        named: values of which it is said what they are.

    Example:
        >>> labels = [CountedLabel(f"{name}.png", {1: 500}, {1}) for name in "abc"]
        >>> list(odd_values(labels))
        []
        >>> [sentence] = odd_values([*labels, CountedLabel("d.png", {1: 500, 7: 90}, {1, 7})])
        >>> sentence[:59]
        'd.png: value 7 (90 pixels) is in none of the other 3 labels'
    """
    labels = [label for label in labels if label.pixels]
    holders: dict[int, list[CountedLabel]] = defaultdict(list)
    for label in labels:
        for value in label.pixels:
            holders[value].append(label)
    lost = [value for value, held in holders.items() if not any(value in label.seen for label in held)]
    if lost:
        yield (
            f"{_where(lost, holders)} is too small to be seen at the network's size, so it guides nothing and is not "
            "looked for. If it is no class, set such pixels to 0; if it is one, cut the images out around it."
        )
    unnamed = [value for value in holders if value not in named and value not in lost]
    few = [value for value in unnamed if all(_is_few(label, value) for label in holders[value])]
    if few:
        yield (
            f"{_where(few, holders)} has few pixels in every label that holds it, as where a mask was resized, "
            f"smoothed or stored as JPEG, and is taken as a class of its own. {REMEDY}"
        )
    most = max(map(len, holders.values()), default=0)
    if len(labels) >= LEAST_LABELS and 2 * most >= len(labels):
        lone = [value for value in unnamed if value not in few and len(holders[value]) == 1]
        with_own = list(dict.fromkeys(holders[value][0] for value in lone))
        for label in with_own if len(with_own) <= max(1, OWN_SHARE * len(labels)) else ():
            own = [value for value in lone if value in label.pixels]
            yield (
                f"{label.path}: {_listed(own, label.pixels)} is in none of the other {len(labels) - 1} labels with a "
                f"class, and is taken as a class of its own. {REMEDY}"
            )
    for value in holders.keys() - set(lost) - set(few):
        yield from _strays(value, holders[value])


def _strays(value: int, held: Sequence[CountedLabel]) -> Iterator[str]:
    """Of a class that most labels have more of by far, the labels with hardly any pixel."""
    for label in held:
        others = [other.pixels[value] for other in held if other is not label]
        count = label.pixels[value]
        if len(others) >= LEAST_LABELS and count <= STRAY_PIXELS and median(others) >= MUCH_MORE * count:
            yield (
                f"{label.path}: {_listed([value], label.pixels)} is hardly there, while most other labels have "
                f"{round(median(others))} pixels of it and more; set such pixels to 0 if they are strays."
            )


def _is_few(label: CountedLabel, value: int) -> bool:
    count, largest = label.pixels[value], max(label.pixels.values())
    return any(count <= most and largest >= times * count for most, times in FEW)


def _where(values: Sequence[int], holders: Mapping[int, Sequence[CountedLabel]]) -> str:
    """Values with the most pixels that a label has of each, behind the labels that hold them."""
    paths = list(dict.fromkeys(label.path for value in values for label in holders[value]))
    most = {value: max(label.pixels[value] for label in holders[value]) for value in values}
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return f"{paths[0]}{more}: {_listed(values, most, 'at most ' if more else '')}"


def _listed(values: Sequence[int], pixels: Mapping[int, int], before: str = "") -> str:
    """Such as "value 7 (12 pixels)" or "each of the values 3 (4 pixels), 9 (1 pixel)"."""
    counted = [f"{value} ({before}{pixels[value]} pixel{'' if pixels[value] == 1 else 's'})" for value in values]
    more = f" and {len(counted) - NAMES_SHOWN} more" if len(counted) > NAMES_SHOWN else ""
    shown = ", ".join(counted[:NAMES_SHOWN]) + more
    return f"value {shown}" if len(values) == 1 else f"each of the values {shown}"
