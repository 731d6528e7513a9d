"""Class values by class names: viewers number the segments of each label from 1.

3D Slicer submits the segments of a label as 1, 2, 3 in the order in which they are listed, so that of an image without
the second class the third comes as 2. The names that come along tell which is meant.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sam2sgp.data.classes import renumbered


def declared(info: Mapping[str, Any]) -> dict[int, str]:
    """Classes that come with a label as its `label_info`: {value: name}."""
    given = info.get("label_info")
    entries = [entry for entry in given if isinstance(entry, dict)] if isinstance(given, list) else []
    return {
        entry["idx"]: str(entry["name"])
        for entry in entries
        if isinstance(entry.get("idx"), int) and entry["idx"] > 0 and entry.get("name")
    }


def agreed(
    values: Iterable[int], sent: Mapping[int, str], known: Mapping[str, int]
) -> tuple[dict[int, int], dict[int, str]]:
    """How a label is stored so that each name means one value, and each value one name, in all labels.

    Args:
        values: in the label.
        sent: names that came with it, by value; viewers send those of empty segments too.
        known: values of the names of other labels.

    Returns:
        Changes of values, see `renumbering`, and the names by value after them. Of a class that is not in the label the
        name is left out where its value is another's. What is agreed on already is returned as it is.
    """
    values = [int(value) for value in values if value]
    changes = renumbering(values, sent, known)
    if not changes and any(sent.get(value) is None for value in values):
        return {}, dict(sent)
    names = {changes.get(value, value): sent[value] for value in values}
    taken = {value: name for name, value in known.items()} | names
    for value, name in sent.items():
        value = known.get(name, value)
        if name not in names.values() and taken.get(value, name) == name:
            names[value] = name
    return changes, names


def renumbering(values: Iterable[int], sent: Mapping[int, str], known: Mapping[str, int]) -> dict[int, int]:
    """Which values of a label must change so that each class keeps the value that its name has in other labels.

    Args:
        values: in the label.
        sent: names that came with it, by value.
        known: values of the names of other labels.

    Returns:
        {value: new value}; {} where nothing has to change, or where names don't tell: one is sent for several values,
        or a value has none. A new name under a value that another name has gets the next free value.
    """
    values = sorted(int(value) for value in values if value)
    names = [sent[value] for value in values if value in sent]
    if len(set(names)) < len(values):
        return {}
    taken = set(known.values())
    free = max([*taken, *values], default=0) + 1
    changes = {}
    for value, name in zip(values, names, strict=True):
        wanted = known.get(name)
        if wanted is None and value in taken:
            wanted, free = free, free + 1
        if wanted not in (None, value):
            changes[value] = wanted
    return changes


def renumber(labels: np.ndarray, changes: Mapping[int, int]) -> np.ndarray:
    """A class map with other values, all changed at once."""
    table = np.arange(max([int(labels.max(initial=0)), *changes]) + 1)
    for value, wanted in changes.items():
        table[value] = wanted
    return renumbered(labels, table.astype(np.min_scalar_type(int(table.max()))))
