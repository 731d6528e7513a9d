"""The data of a fine-tuning: labelled cases in two halves, each of which judges what the other has trained.

In: the cases that also make the support set. Out: of each half a datalist JSON with `training` and `validation`, which
the bundle's `load_datalist` reads, and a digest that tells whether a stopped training can go on.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from sam2sgp.errors import DataError
from sam2sgp.files import sha256_of, write_text

HALVES = 2
MIN_PATIENTS_OF_A_HALF = 2
MIN_PATIENTS = HALVES * MIN_PATIENTS_OF_A_HALF


def halve(cases: Sequence[Mapping], known: Mapping[str, int]) -> dict[str, int]:
    """The half, 0 or 1, of each patient.

    Args:
        cases: labelled ones.
        known: halves of the patients that the weights to start from were trained on. They stay where they are, so that
            no half judges weights that it has trained.

    The others go, in an order that depends only on their names, to the half with fewer patients.

    Raises:
        DataError: there are too few patients, of all or (after labels were taken away) of a half.
    """
    patients = sorted({case["patient"] for case in cases}, key=_rank)
    half_of = {patient: known[patient] for patient in patients if patient in known}
    for patient in patients:
        if patient not in half_of:
            half_of[patient] = min(range(HALVES), key=list(half_of.values()).count)
    least = min(list(half_of.values()).count(half) for half in range(HALVES))
    if least < MIN_PATIENTS_OF_A_HALF:
        expected = f"approved labels of at least {MIN_PATIENTS} patients"
        if len(patients) >= MIN_PATIENTS:
            expected += f", {MIN_PATIENTS_OF_A_HALF} in each half of those that the weights in use were trained on"
        raise DataError(
            f"Fine-tuning expected {expected}, found {len(cases)} of {len(patients)}; approve labels of more "
            "patients, then train again. The weights stay as they are."
        )
    return half_of


def sections(cases: Sequence[Mapping], half_of: Mapping[str, int], half: int) -> dict[str, list[Mapping]]:
    """A half's cases as `training`, the others as `validation`."""
    parts: dict[str, list[Mapping]] = {"training": [], "validation": []}
    for case in cases:
        parts["training" if half_of[case["patient"]] == half else "validation"].append(case)
    return parts


def write_datalist(path: Path, data: Mapping[str, Sequence[Mapping]], class_names: Mapping[int, str]) -> None:
    """Write a datalist of sections, whole or not at all."""
    keys = ("image", "label", "patient", "modality")
    content: dict = {
        section: [{key: str(case[key]) for key in keys if case.get(key)} for case in cases]
        for section, cases in data.items()
    }
    if class_names:
        content["labels"] = {str(value): name for value, name in class_names.items()}
    write_text(path, json.dumps(content, indent=1))


def digest(cases: Sequence[Mapping], half_of: Mapping[str, int]) -> str:
    """Equal for equal labels of equal images in equal halves, wherever the files are."""
    rows = sorted(
        (
            half_of[case["patient"]],
            case["name"],
            case["patient"],
            _size(Path(case["image"])),
            sha256_of(Path(case["label"])),
        )
        for case in cases
    )
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _rank(patient: str) -> str:
    return hashlib.sha256(patient.encode()).hexdigest()


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size
