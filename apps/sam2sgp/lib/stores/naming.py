"""Class values by class names: viewers number the segments of each label from 1.

3D Slicer submits the segments of a label as 1, 2, 3 in the order in which they are listed, so that of an image without
the second class the third comes as 2. The names that come along tell which is meant. Names count without regard to
case, and `class_2`, which the server itself calls a class that nobody has named, is no name.
"""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lib.checks import BadLabel
from sam2sgp.data.classes import renumbered
from sam2sgp.data.coding import UNNAMED
from sam2sgp.data.io import segment_names

PLACEHOLDER = re.compile(r"class_([1-9]\d{0,4})")


def declared(info: Mapping[str, Any]) -> dict[int, str]:
    """Classes that come with a label as its `label_info`: {value: name}."""
    given = info.get("label_info")
    entries = [entry for entry in given if isinstance(entry, dict)] if isinstance(given, list) else []
    return {
        entry["idx"]: str(entry["name"])
        for entry in entries
        if isinstance(entry.get("idx"), int) and entry["idx"] > 0 and entry.get("name")
    }


def names_by_value(known: Mapping[str, int]) -> dict[int, str]:
    """What values are called; a placeholder only where there is no name."""
    return {value: name for name, value in sorted(known.items(), key=lambda entry: not is_placeholder(*entry))}


def told(path: str | os.PathLike, info: Mapping[str, Any]) -> dict[int, str]:
    """Classes of a label by value: as they were sent with it, or else as a segmentation itself names them, which also
    counts where what was sent is no name.

    Raises BadLabel where both name a value, and differently.
    """
    sent, own = declared(info), {value: name.strip() for value, name in segment_names(path).items()}
    own = {value: name for value, name in own.items() if value > 0 and not UNNAMED.fullmatch(name.casefold())}
    for value in sorted(sent.keys() & own.keys()):
        if UNNAMED.fullmatch(sent[value].casefold()):
            sent[value] = own[value]
        elif sent[value].casefold() != own[value].casefold():
            raise BadLabel(
                f"{path}: expected one name for value {value}, found {own[value]!r} in the file and "
                f"{sent[value]!r} in label_info; correct one of them."
            )
    return sent or own


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

    Raises BadLabel where one name is sent for several values, or some of them have no name or two names stand for one,
    and the others contradict `known`.
    """
    values = [int(value) for value in values if value]
    # A placeholder says which value is meant even where no other label has it.
    known = {name: int(of[1]) for name in sent.values() if (of := PLACEHOLDER.fullmatch(name))} | dict(known)
    sent = _as_known(sent, known)
    _check_alike(values, sent, known)
    changes = renumbering(values, sent, known)
    if not changes:
        _check_agreement(values, sent, known)
    if not changes and any(sent.get(value) is None for value in values):
        return {}, sent
    names = {changes.get(value, value): sent[value] for value in values}
    taken = set(_real(sent, known).values())
    for value, name in sent.items():
        value = known.get(name, value)
        is_new = name not in known and name.casefold() not in map(str.casefold, names.values())
        is_other = name in known and name not in names.values()
        if value not in names and (is_other or (is_new and value not in taken)):
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
        two stand for one value, or a value has none. A new name under a value that another name has gets the next free
        value.
    """
    values = sorted(int(value) for value in values if value)
    names = [sent[value] for value in values if value in sent]
    if len(set(names)) < len(values):
        return {}
    free = max([*known.values(), *values], default=0) + 1
    taken = set(_real(sent, known).values())
    changes = {}
    for value, name in zip(values, names, strict=True):
        wanted = known.get(name)
        if wanted is None and value in taken:
            wanted, free = free, free + 1
        if wanted not in (None, value):
            changes[value] = wanted
    return changes if len({changes.get(value, value) for value in values}) == len(values) else {}


def is_placeholder(name: str, value: int) -> bool:
    """Whether a name says no more than the value; a `class_1` that somebody gave another value is a name."""
    placeholder = PLACEHOLDER.fullmatch(name)
    return placeholder is not None and int(placeholder[1]) == value


def _as_known(sent: Mapping[int, str], known: Mapping[str, int]) -> dict[int, str]:
    """Names as other labels spell them, and in place of placeholders the names that their values have got since."""
    spelt = {name.casefold(): name for name in known}
    of_value = names_by_value(known)
    found = {}
    for value, name in sent.items():
        name = name if name in known else spelt.get(name.casefold(), name)
        meant = known.get(name)
        found[value] = of_value[meant] if meant is not None and is_placeholder(name, meant) else name
    return found


def _real(sent: Mapping[int, str], known: Mapping[str, int]) -> dict[str, int]:
    """Known names, without placeholders where a label comes from somebody who does not know of these."""
    if any(is_placeholder(name, known.get(name, 0)) for name in sent.values()):
        return dict(known)
    return {name: value for name, value in known.items() if not is_placeholder(name, value)}


def _check_alike(values: Iterable[int], sent: Mapping[int, str], known: Mapping[str, int]) -> None:
    """Raise BadLabel where two values of a label have names that nobody could tell apart.

    Other labels may have names that differ in case only for two values, of before this was refused.
    """
    first: dict[str, int] = {}
    for value in values:
        name = sent.get(value)
        if name is None or name in known:
            continue
        other = first.setdefault(name.casefold(), value)
        if other != value:
            alike = "" if sent[other] == name else ", which differ in upper and lower case only"
            raise BadLabel(
                f"label_info: expected one name for each value of the label, found {sent[other]!r} for value {other} "
                f"and {name!r} for value {value}{alike}; make them one segment, or send a distinct name for each."
            )


def _check_agreement(values: Iterable[int], sent: Mapping[int, str], known: Mapping[str, int]) -> None:
    """Raise BadLabel where a value of a label has the name of another value, or another name than in other labels."""
    of_value = names_by_value(_real(sent, known))
    for value in values:
        name = sent.get(value)
        if name is None or known.get(name) == value or (name not in known and value not in of_value):
            continue
        other = f"value {known[name]} for this name" if name in known else f"{of_value[value]!r} for this value"
        raise BadLabel(
            f"label_info: expected one name for each value of the label, as in other labels, found {name!r} for value "
            f"{value}, and {other} in other labels; send a distinct name for each value."
        )


def renumber(labels: np.ndarray, changes: Mapping[int, int]) -> np.ndarray:
    """A class map with other values, all changed at once."""
    table = np.arange(max([int(labels.max(initial=0)), *changes]) + 1)
    for value, wanted in changes.items():
        table[value] = wanted
    return renumbered(labels, table.astype(np.min_scalar_type(int(table.max()))))
