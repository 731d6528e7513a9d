"""Names of classes by label value: as a data folder declares them, or made up, and checked against labels; and which
values there are in a class map."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from sam2sgp.data.datalist_json import read_json
from sam2sgp.data.pairing import NAMES_SHOWN
from sam2sgp.errors import DataError


def class_names(root: str | os.PathLike, labels_found: Iterable[int] | None = None) -> dict[int, str]:
    """Declared class names by value, background left out, from `labels` of dataset.json or from labels.json.

    Args:
        root: as for `load_datalist`; for a JSON file, that file, then labels.json beside it.
        labels_found: values that labels hold; where given, names are completed and checked against them.

    Returns:
        {1: "liver", …}, ordered by value; {} if nothing is declared and nothing was given.

    Raises:
        DataError: the declaration can't be understood, or a value found isn't declared.
    """
    root = Path(root)
    folder = root if root.is_dir() else root.parent
    candidates = [root] if root.suffix.lower() == ".json" else []
    names: dict[int, str] = {}
    for path in [*candidates, folder / "dataset.json", folder / "labels.json"]:
        if not names and path.is_file():
            content = read_json(path)
            declared = content.get("labels", content if path.name == "labels.json" else None)
            names = _names_by_value(path, declared) if declared else {}
    if labels_found is None:
        return names
    values = sorted(labels_found)
    check_label_values(root, values, names)
    return complete_class_names(names, values)


def complete_class_names(names: dict[int, str], values: Iterable[int]) -> dict[int, str]:
    """Declared names if there are any, else `class_<value>` for each value but 0; ordered by value."""
    if names:
        return dict(sorted(names.items()))
    return {int(value): f"class_{int(value)}" for value in sorted(values) if value}


def check_label_values(path: str | os.PathLike, values: Iterable[int], names: dict[int, str]) -> None:
    """Raise DataError if `values`, found in the label at `path`, hold one that `names` does not declare.

    0 is always allowed; without names so is every value.
    """
    undeclared = [int(value) for value in values if value and int(value) not in names]
    if names and undeclared:
        declared = ", ".join(f"{value} {name}" for value, name in sorted(names.items()))
        found = ", ".join(str(value) for value in undeclared[:NAMES_SHOWN])
        raise DataError(
            f"{path}: expected only the declared classes ({declared}), found value {found}; correct the label, or "
            "declare the class in dataset.json or labels.json."
        )


def values_in(classes: np.ndarray) -> list[int]:
    """Sorted values of a class map (Z, H, W) of integers, slice by slice: what sorts a long volume takes gigabytes.

    Example:
        >>> values_in(np.array([[[0, 7]], [[3, 0]]], np.uint8))
        [0, 3, 7]
    """
    return sorted({value for part in classes for value in np.unique(part).tolist()})


def pixels_by_value(classes: np.ndarray) -> dict[int, int]:
    """How many pixels each value but 0 has in a class map (Z, H, W) of integers >= 0, by value; slice by slice.

    Example:
        >>> pixels_by_value(np.array([[[0, 7]], [[3, 7]]], np.uint8))
        {3: 1, 7: 2}
    """
    counts: Counter[int] = Counter()
    for part in classes:
        if part.any():
            found = np.bincount(part.ravel())
            counts.update({int(value): int(found[value]) for value in np.flatnonzero(found) if value})
    return dict(sorted(counts.items()))


def renumbered(classes: np.ndarray, table: np.ndarray) -> np.ndarray:
    """`table[classes]` of a class map (Z, H, W) of integers >= 0, slice by slice: NumPy makes indices of eight bytes.

    Example:
        >>> renumbered(np.array([[[0, 7]], [[3, 0]]], np.uint8), np.array([0, 0, 0, 1, 0, 0, 0, 2], np.uint8)).tolist()
        [[[0, 2]], [[1, 0]]]
    """
    made = np.empty(classes.shape, table.dtype)
    for target, part in zip(made, classes, strict=True):
        target[...] = table[part]
    return made


def _names_by_value(path: Path, declared: Mapping) -> dict[int, str]:
    """{"1": "liver"} or {"liver": 1} -> {1: "liver"}, without background."""
    names: dict[int, str] = {}
    try:
        for key, value in declared.items():
            by_value = re.fullmatch(r"\s*\d+\s*", str(key)) is not None
            names[int(key if by_value else value)] = str(value if by_value else key)
    except (AttributeError, TypeError, ValueError):
        raise DataError(
            f'{path}: expected class names such as {{"1": "liver"}} or {{"liver": 1}}, found {declared!r}; '
            "correct `labels`."
        ) from None
    names.pop(0, None)
    return dict(sorted(names.items()))
