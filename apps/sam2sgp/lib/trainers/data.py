"""The data of a fine-tuning: labelled cases as a MONAI datalist, some patients of which are held back.

In: the cases that also make the support set. Out: a datalist JSON with `training` and `validation`, which the bundle's
`load_datalist` reads, and a digest that tells whether a stopped training can go on.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from sam2sgp.errors import DataError
from sam2sgp.files import write_text

HELD_BACK_SHARE = 0.25
MIN_PATIENTS = 4
SECTIONS = ("training", "validation")


def split(cases: Sequence[Mapping]) -> dict[str, list[Mapping]]:
    """The cases as `training` and `validation`: a quarter of the patients, at least one, is held back for the latter.

    Which patients those are depends on their names alone, so that they stay held back, but for a few at the border,
    as labels are added: weights are not judged by what earlier ones were trained on.

    Raises:
        DataError: there are too few patients.
    """
    patients = sorted({case["patient"] for case in cases}, key=_rank)
    if len(patients) < MIN_PATIENTS:
        raise DataError(
            f"Fine-tuning expected approved labels of at least {MIN_PATIENTS} patients, found {len(cases)} of "
            f"{len(patients)}; approve labels of more patients, then train again. The weights stay as they are."
        )
    held_back = set(patients[: max(1, round(HELD_BACK_SHARE * len(patients)))])
    sections: dict[str, list[Mapping]] = {name: [] for name in SECTIONS}
    for case in cases:
        sections[SECTIONS[case["patient"] in held_back]].append(case)
    return sections


def write_datalist(path: Path, sections: Mapping[str, Sequence[Mapping]], class_names: Mapping[int, str]) -> None:
    """Write the datalist, whole or not at all."""
    keys = ("image", "label", "patient", "modality")
    content: dict = {
        section: [{key: str(case[key]) for key in keys if case.get(key)} for case in cases]
        for section, cases in sections.items()
    }
    if class_names:
        content["labels"] = {str(value): name for value, name in class_names.items()}
    write_text(path, json.dumps(content, indent=1))


def digest(sections: Mapping[str, Sequence[Mapping]]) -> str:
    """Equal for equal labels of equal images in equal sections, wherever the files are."""
    rows = sorted(
        (section, case["name"], case["patient"], _size(Path(case["image"])), _content(Path(case["label"])))
        for section, cases in sections.items()
        for case in cases
    )
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _rank(patient: str) -> str:
    return hashlib.sha256(patient.encode()).hexdigest()


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def _content(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
