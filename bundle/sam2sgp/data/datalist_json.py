"""Data sets that a JSON file lists: MONAI's datalists, the Decathlon's and nnU-Net's dataset.json.

In: the file's content. Out: raw cases with absolute paths, and what else the file states of them.
"""

import json
import os
import unicodedata
from pathlib import Path

from sam2sgp.data.pairing import several_channels
from sam2sgp.errors import DataError

SECTION_OF_KEY = {
    "training": "train",
    "train": "train",
    "validation": "val",
    "val": "val",
    "test": "test",
    "testing": "test",
}


def read_json(path: Path) -> dict:
    """The object that a JSON file holds. Raises DataError."""
    try:
        # As bytes, so that a byte order mark of any of JSON's encodings is understood.
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected a JSON file, found that it can't be read ({error}); correct it.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, found a {type(content).__name__}; see MONAI's datalists.")
    return content


def cases_of_json(path: Path, content: dict) -> list[dict]:
    """The cases that a MONAI datalist at `path` lists, labelled ones of other sections than training with `section`."""
    if not SECTION_OF_KEY.keys() & content.keys():
        raise DataError(
            f"{path}: expected a datalist with `training`, `validation` or `test`, found the keys "
            f"{sorted(content)}; add a list of images and labels."
        )
    base = path.parent / content.get("root", "")
    modality = single_modality(content.get("modality"))
    cases = []
    for key, section in SECTION_OF_KEY.items():
        for entry in content.get(key, []):
            case = _case_of_entry(path, base, key, entry)
            if "modality" not in case and modality:
                case["modality"] = modality
            # The Decathlon lists all its labelled cases as training; they are split like a folder's.
            if section != "train" and "label" in case:
                case["section"] = section
            cases.append(case)
    if not cases:
        raise DataError(f"{path}: expected at least one image in its lists, found none; add images.")
    return cases


def _case_of_entry(path: Path, base: Path, key: str, entry: object) -> dict:
    if isinstance(entry, str):
        entry = {"image": entry}
    if isinstance(entry, dict) and isinstance(entry.get("image"), list) and len(entry["image"]) > 1:
        raise several_channels(path, str(entry.get("label", key)), list(map(str, entry["image"])))
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
        raise DataError(
            f"{path}: expected entries of `{key}` to be a path or an object with one `image` path, found {entry!r}; "
            "correct it."
        )
    case: dict = {}
    for name in ("image", "label"):
        if isinstance(entry.get(name), str) and entry[name]:
            file = _existing(Path(os.path.abspath(base / entry[name])))
            if file is None:
                file = Path(os.path.abspath(base / entry[name]))
                raise DataError(f"{path}: expected the listed {name} {file}, found no such file; correct the list.")
            case[name] = str(file)
    for name in ("patient", "patient_id", "subject"):
        if entry.get(name) not in (None, "") and "patient" not in case:
            case["patient"] = str(entry[name])
    for name in ("group", "modality"):
        if entry.get(name) not in (None, ""):
            case[name] = str(entry[name])
    return case


def single_modality(declared: object) -> str | None:
    """The modality of all cases from the Decathlon's {"0": "CT"}; None where channels have several."""
    names = {str(name) for name in declared.values()} if isinstance(declared, dict) else {str(declared or "")}
    return next(iter(names)) or None if len(names) == 1 else None


def _existing(path: Path) -> Path | None:
    """The path, or the same in the other form of Unicode: macOS writes letters and their accents separately."""
    for form in (None, "NFC", "NFD"):
        candidate = path if form is None else Path(unicodedata.normalize(form, str(path)))
        if candidate.exists():
            return candidate
    return None


def cases_of_nnunet(path: Path, dataset: dict) -> list[dict]:
    """The cases that nnU-Net's dataset.json lists by name under `dataset`, each with `images` and perhaps `label`."""
    cases = []
    for name, entry in dataset.items():
        images = entry.get("images") if isinstance(entry, dict) else None
        if not isinstance(images, list) or not images:
            raise DataError(
                f"{path}: expected an object with a list `images` for each case of `dataset`, found {entry!r} for "
                f"{name!r}; correct it."
            )
        if len(images) > 1:
            raise several_channels(path, name, [Path(str(image)).name for image in images])
        listed = {"image": images[0]} | ({"label": entry["label"]} if entry.get("label") else {})
        cases.append(_case_of_entry(path, path.parent, "dataset", listed))
    return cases
