"""Whether a label fits its image and names its classes as others do, before it is approved in a folder.

In: files of an image and a label, what was sent with the label, the folder's own class names and what is known about
the labels approved so far. Out: a `CheckedLabel`, with the values that these have for its names, or an error of one
sentence. Checking reads the image and takes a while, so other labels may be approved meanwhile: `check_values` looks
again where the change is made, and `again_if_renumbered` checks once more.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np

from lib.checks import BadLabel
from lib.stores.naming import agreed, declared, renumber, told
from sam2sgp.data.classes import check_label_values
from sam2sgp.data.io import output_suffix, read_geometry, read_label, write_label
from sam2sgp.errors import DataError


class _Renumbered(Exception):
    """Labels that were approved meanwhile have other values for the names of a label."""


@dataclass(frozen=True)
class CheckedLabel:
    """A label that fits its image: its file, the values in it, and what is known about it."""

    file: str
    values: tuple[int, ...]
    info: dict[str, Any]


def checked_label(
    image: str,
    label: str,
    name: str,
    info: Mapping[str, Any],
    declared_names: Callable[[], Mapping[int, str]],
    approved: Iterable[Mapping[str, Any]],
    scratch: Path,
) -> CheckedLabel:
    """A label to approve, with the values that other labels have for its names: where these differ from its own, in a
    file in `scratch`.

    Args:
        image, label: paths.
        name: of the label's file, for errors.
        info: what was sent with it.
        declared_names: gives the folder's own class names by value.
        approved: what is known about each approved label.
        scratch: a folder.

    Raises BadLabel.
    """
    try:
        with naming_file(label, name):
            geometry = read_geometry(image)
            labels = read_label(label, geometry)
            names = declared_names()
            changes, agreed_on = agreed(np.unique(labels).tolist(), told(label, info), _known_names(names, approved))
            if changes:
                labels = renumber(labels, changes)
            if agreed_on != declared(info):
                entries = [{"name": text, "idx": value} for value, text in sorted(agreed_on.items())]
                info = {**info, "label_info": entries}
            values = tuple(np.unique(labels).tolist())
            if names:
                check_label_values(label, values, {**names, **agreed_on})
            if changes:
                path = scratch / f"label{output_suffix(geometry)}"
                write_label(path, labels, geometry)
                label = str(path)
            return CheckedLabel(label, values, dict(info))
    except DataError as error:
        raise BadLabel(str(error)) from error


def check_values(
    values: tuple[int, ...],
    info: Mapping[str, Any],
    names: Mapping[int, str],
    approved: Iterable[Mapping[str, Any]],
) -> None:
    """Have a label checked again where labels that have come since it was give its names other values.

    Only within what `again_if_renumbered` decorates. Arguments as of `checked_label`; `names`: the folder's own.
    """
    sent = declared(info)
    if agreed(values, sent, _known_names(names, approved)) != ({}, sent):
        raise _Renumbered


def again_if_renumbered(approve: Callable[..., Any]) -> Callable[..., Any]:
    """Check the label once more, as often as others are approved first: two new names must not get one value."""

    @wraps(approve)
    def again(*arguments: Any) -> Any:
        while True:
            with suppress(_Renumbered):
                return approve(*arguments)

    return again


def _known_names(names: Mapping[int, str], approved: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Values of the class names of the folder, and of approved labels."""
    known = {text: value for value, text in names.items()}
    for info in approved:
        for value, text in declared(info).items():
            known.setdefault(text, value)
    return known


@contextmanager
def naming_file(path: str, name: str) -> Iterator[None]:
    """Errors that name a temporary path name the file as the client knows it."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error).replace(str(path), name)) from error
