"""How close the prediction that was shown came to the label that was approved in its place.

In: an image's approved label and the prediction from which it was made, as they are stored. Out: Dice of each class
that the prediction was asked for. Of a prediction that was approved as it was the label is all that is left, and Dice
is 1 by definition; if it is corrected after all, that earlier state is the prediction.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monailabel.interfaces.datastore import DefaultLabelTag

from lib.stores.audit import content_hash
from lib.stores.decisions import FINAL, Decisions
from lib.stores.image_identity import is_of_another
from lib.stores.naming import declared, is_placeholder, renumber
from lib.stores.records import UNCHANGED, origin_of, time_of
from sam2sgp.data import read_geometry, read_label
from sam2sgp.evaluation import dice_of_values

Records = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Pair:
    """A prediction and the label in its place: their files, what is known about each, and whether they are the same."""

    prediction: Path
    of_prediction: Mapping[str, Any]
    label: Path
    of_label: Mapping[str, Any]
    unchanged: bool


def pair_of(datastore: Decisions, image: str, records: Records, approved_before: str | None = None) -> Pair | None:
    """The pair of an image with an approved label; None where no prediction of it was there before the label.

    Args:
        datastore: where they are.
        image: its id.
        records: what is known about its labels, by tag.
        approved_before: hash of a prediction of this image that was approved as it was, earlier.
    """
    final = records[FINAL]
    label = Path(datastore.path_of_label(image, FINAL))
    if origin_of(final) == UNCHANGED:
        return Pair(label, final, label, final, unchanged=True)
    corrected = final.get("corrected")
    tags = [corrected.get("from") if isinstance(corrected, dict) else None, DefaultLabelTag.ORIGINAL.value]
    for tag in tags:
        record = records.get(tag) if tag != FINAL else None
        if record and record.get("model") and not record.get("corrected") and time_of(record) <= time_of(final):
            if not datastore.is_of_another_image(image, tag):
                return Pair(Path(datastore.path_of_label(image, tag)), record, label, final, unchanged=False)
    if approved_before:
        path = datastore.get_image_uri(image)
        for version in datastore.history.versions(image):
            file, record = datastore.history.get(image, version["version"])
            is_it = version["tag"] == FINAL and content_hash(file) == approved_before
            if is_it and not is_of_another(record, path, file):
                return Pair(file, record, label, final, unchanged=False)
    return None


def dice_of(pair: Pair, image: Path) -> dict[str, float]:
    """Dice by the class's name; classes that neither map holds are left out.

    Args:
        pair: of the image's labels.
        image: the image's file.

    Raises:
        DataError: one of the files can't be read, or doesn't fit the image.
    """
    geometry = read_geometry(image)
    truth = read_label(pair.label, geometry)
    found = truth if pair.unchanged else read_label(pair.prediction, geometry)
    names = _asked_for(pair.of_prediction)
    if not pair.unchanged:
        changes = _values_in_label(names, declared(pair.of_label))
        found = renumber(found, changes)
        names = {changes[value]: name for value, name in names.items()}
    return {names[value]: dice for value, dice in dice_of_values(found, truth, names).items()}


def mean_of(dice: Mapping[Any, float]) -> float | None:
    """The mean over all classes; None without any."""
    return statistics.mean(dice.values()) if dice else None


def _asked_for(record: Mapping[str, Any]) -> dict[int, str]:
    """Names of the classes that a prediction could have had, by the values that they have, or would have, in its file.

    A store that renumbered it says so in its classes, and leaves what the model said as it was.
    """
    params = record.get("params")
    told = params.get("label_names") if isinstance(params, dict) else None
    if not isinstance(told, dict):
        return declared(record)
    names = {value: name for name, value in told.items() if isinstance(value, int) and value > 0}
    stored = _values_in_label(names, declared(record))
    return {stored[value]: name for value, name in names.items()}


def _values_in_label(asked_for: Mapping[int, str], named: Mapping[int, str]) -> dict[int, int]:
    """For each value of a prediction the one that its class has in the label, which may be another for the same name.

    A class that the label doesn't name keeps its value, or gets a free one where another class has it. One that had no
    name when the prediction was made (`class_2`) is the one that has got a name since.
    """
    wanted = {name: value for value, name in named.items()}
    free = max([0, *asked_for, *named]) + 1
    changes = {}
    for value, name in asked_for.items():
        changes[value] = wanted.get(name, free if value in named and not is_placeholder(name, value) else value)
        free += changes[value] == free
    return changes
