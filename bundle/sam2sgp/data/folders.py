"""Data folders as MONAI datalists: which image goes with which label, patient and section.

In: a Medical Segmentation Decathlon folder, a folder with `images/` and `labels/` (or `masks/`), a MONAI datalist
JSON, or, for queries, only images. Out: plain dicts of paths and names. Only names and JSON files are read here, and
DICOM headers.
"""

import json
import logging
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom

from sam2sgp.data.io import (
    data_files,
    dicom_files,
    image_stem,
    is_dicom,
    is_dicom_seg,
    is_image,
    is_picture,
    without_pixels,
)
from sam2sgp.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

# A word for "patient" and a number, at the start of a name and not followed by more of the same word.
DEFAULT_PATIENT_PATTERN = (
    r"(?i)^(?:sub-[a-z0-9]+|TCGA-[a-z0-9]{2}-[a-z0-9]{4}|(?:patient|pat|subject|subj|case|STS)[-_ ]?\d+)(?![a-z0-9])"
)
LABEL_FOLDERS = ("labels", "masks")
LABEL_ENDINGS = ("_mask", "_segmentation")
SECTIONS = ("train", "val", "test")
SECTION_OF_KEY = {
    "training": "train",
    "train": "train",
    "validation": "val",
    "val": "val",
    "test": "test",
    "testing": "test",
}
LAYOUTS = (
    "a folder with dataset.json (Medical Segmentation Decathlon, nnU-Net), a folder with images/ and labels/ (or "
    "masks/) whose files have equal stems, or a MONAI datalist JSON file"
)
# An image folder, and the label folders that may lie beside it.
PAIRED_FOLDERS = (("images", *LABEL_FOLDERS), ("imagesTr", "labelsTr"))
DESCRIPTIONS = {"dataset.json", "labels.json"}
# Folders of nnU-Net and the Decathlon, in which `liver_000_0001` is channel 1 of the case `liver_000`.
CHANNEL_FOLDERS = ("imagesTr", "imagesVal", "imagesTs")
CHANNEL = re.compile(r"(.+)_(\d{4})")
LABEL_FOLDER_NAMES = {"labels", "label", "masks", "mask", "labelstr", "labelsts", "segmentations", "annotations"}
SYSTEM_FILES = {"Thumbs.db", "desktop.ini", "__MACOSX"}
# Of images in formats that are not read.
UNREAD_SUFFIXES = (
    *(".npz", ".npy", ".mat", ".h5", ".hdf5", ".zarr", ".gif", ".webp", ".heic", ".jp2", ".j2k", ".jpx", ".avif"),
    *(".ppm", ".pgm", ".svs", ".ndpi", ".czi", ".lif", ".vsi", ".mgz", ".mgh", ".mnc", ".par", ".rec", ".gipl"),
    *(".hdr", ".raw", ".zraw", ".vtk", ".zip", ".tar", ".tar.gz", ".7z", ".rar", ".pdf", ".svg", ".mp4", ".avi"),
)
SERIES_TAGS = ["SeriesInstanceUID", "SeriesDescription", "ImagePositionPatient"]
NAMES_IN_A_WARNING = 5


@dataclass(frozen=True)
class Skipped:
    """A file or folder that was found among images or labels and is not used, and why."""

    path: Path
    why: str


class Datalist(list):
    """Cases of a data folder. `skipped`: what else was found there and is not used."""

    skipped: Sequence[Skipped] = ()


def skipped_in(*datalists: list[dict]) -> list[Skipped]:
    """What was found beside some cases and is used by none of these lists, each once; each is said in the log."""
    used = {case[key] for cases in datalists for case in cases for key in ("image", "label") if key in case}
    found = {file.path: file for cases in datalists for file in getattr(cases, "skipped", ())}
    # A folder that another list takes its cases from is used.
    left = [file for path, file in found.items() if not any(_lies_in(name, path) for name in used)]
    for file in left:
        logger.warning("Not used: %s: %s.", file.path, file.why)
    return left


def _lies_in(path: str, folder: Path) -> bool:
    return path == str(folder) or path.startswith(f"{folder}{os.sep}") and folder.is_dir()


def load_datalist(
    root: str | os.PathLike,
    section: str = "all",
    require_labels: bool = True,
    patient_pattern: str = DEFAULT_PATIENT_PATTERN,
    split: Sequence[float] = (0.7, 0.15, 0.15),
    seed: int = 0,
) -> Datalist:
    """The cases of a data folder, ordered by name.

    Args:
        root: a Decathlon or nnU-Net folder with `dataset.json`; a folder with `images/` and `labels/` or `masks/`; a
            MONAI datalist JSON file. Without `require_labels` also a folder of images and DICOM series folders, which
            may lie in subfolders, one image file, or one DICOM series folder.
        section: "all", or "train", "val" or "test". Sections that the JSON file gives with labels are used as they
            are; the other labelled cases are split by patient. Cases without a label belong only to "all".
        require_labels: leave out images without a label.
        patient_pattern: regular expression searched for in an image's stem; what it matches names the patient. Where
            it doesn't match, the whole stem does. `patient` (or `patient_id`, `subject`) in the JSON file wins.
        split: fractions of patients for train, val and test; they sum to 1. With at least three patients no section
            with a fraction above 0 is empty.
        seed: of the split, which depends only on it and the patients' names.

    Returns:
        Dicts with `image` and, if there is one, `label` (absolute paths), `patient`, `group` (what was given, else
        the folder's name), `name` (stem, unique), and `modality` where the JSON file gives one. Their `skipped` lists
        the files that were found and are not used, and why.

    Raises:
        DataError: nothing usable is there, a listed file is missing, or equal stems make pairs ambiguous.
        ConfigError: an unknown section, a split that doesn't sum to 1, or a pattern that isn't a regular expression.
    """
    if section not in ("all", *SECTIONS):
        raise ConfigError(f"section: expected 'all', 'train', 'val' or 'test', found {section!r}.")
    if len(split) != 3 or min(split) < 0 or abs(sum(split) - 1) > 1e-6:
        raise ConfigError(f"split: expected three fractions that sum to 1, found {list(split)}.")
    try:
        pattern = re.compile(patient_pattern)
    except re.error as error:
        raise ConfigError(
            f"patient_pattern: expected a regular expression, found {patient_pattern!r}: {error}."
        ) from None
    root = Path(os.path.abspath(root))
    skipped: list[Skipped] = []
    cases = _find_cases(root, require_labels, skipped)
    if require_labels:
        cases = _labelled(root, cases, skipped)
    _name_cases(root, cases, pattern)
    if section != "all":
        _assign_sections(cases, split, seed)
        cases = [case for case in cases if case.get("section") == section]
    listed = Datalist({key: value for key, value in case.items() if key != "section"} for case in cases)
    listed.skipped = skipped
    return listed


def subset(datalist: Sequence[dict], count: int | None, seed: int = 0) -> list[dict]:
    """At most `count` cases of a datalist, drawn with `seed`, in the datalist's order; None means all."""
    if count is None or count >= len(datalist):
        return list(datalist)
    chosen = np.random.default_rng(seed).permutation(len(datalist))[:count]
    return [datalist[index] for index in sorted(chosen)]


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
            content = _read_json(path)
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
        found = ", ".join(str(value) for value in undeclared[:NAMES_IN_A_WARNING])
        raise DataError(
            f"{path}: expected only the declared classes ({declared}), found value {found}; correct the label, or "
            "declare the class in dataset.json or labels.json."
        )


def choose_slices(areas: np.ndarray, count: int) -> list[int]:
    """Slices of one volume to use as support for one class.

    The largest, and an even spread over the extent with both ends included; never an empty slice.

    Args:
        areas: (Z,) pixels of the class in each slice.
        count: slices wanted, at least 1. With 1 it is only the largest, with 2 the largest and the end farther off;
            from 4 on each further one halves the widest gap.

    Returns:
        Sorted, distinct indices, at most `count`; as many as that where so many slices hold the class.
    """
    areas = np.asarray(areas)
    present = np.flatnonzero(areas > 0)
    if count < 1:
        raise ConfigError(f"slices per class: expected at least 1, found {count}.")
    if len(present) <= count:
        return present.tolist()
    largest = int(np.argmax(areas))
    chosen = {largest}
    ends = sorted((int(present[0]), int(present[-1])), key=lambda end: -abs(end - largest))
    chosen.update(ends[: count - 1])
    while len(chosen) < count:
        free = [int(index) for index in present if int(index) not in chosen]
        chosen.add(max(free, key=lambda index: min(abs(index - other) for other in chosen)))
    return sorted(chosen)


def _find_cases(root: Path, require_labels: bool, skipped: list[Skipped]) -> list[dict]:
    """Raw cases: `image`, perhaps `label`, `section` and what a JSON file says; not yet named."""
    if not root.exists():
        raise DataError(f"{root}: expected {LAYOUTS}, found no such file or folder; check the path.")
    if root.is_file():
        if root.suffix.lower() == ".json":
            return _cases_of_json(root, _read_json(root))
        if not require_labels and is_image(root):
            return [{"image": str(root)}]
        raise DataError(f"{root}: expected {LAYOUTS}, found a file of another kind; give one of these.")
    listing = root / "dataset.json"
    content = _read_json(listing) if listing.is_file() else {}
    if SECTION_OF_KEY.keys() & content.keys():
        cases = _cases_of_json(listing, content)
        _skip_unlisted(root, cases, skipped)
        return cases
    modality = _single_modality(content.get("modality", content.get("channel_names")))
    if isinstance(content.get("dataset"), dict):
        cases = _cases_of_nnunet(listing, content["dataset"])
        _skip_unlisted(root, cases, skipped)
    elif (root / "imagesTr").is_dir() or (root / "images").is_dir():
        cases = _cases_of_folders(root, require_labels, skipped)
    elif require_labels:
        raise DataError(
            f"{root}: expected {LAYOUTS}, found {_contents(root)}{_lacks(content)}; arrange the folder like one of "
            "these."
        )
    else:
        images = _images_or_series(root, skipped)
        _check_channels(root, images)
        cases = [{"image": str(path)} for path in images]
    if not cases:
        raise DataError(
            f"{root}: expected images (NIfTI, NRRD, MetaImage, DICOM series folders, PNG, JPEG, TIFF, BMP), found "
            f"{_contents(root)}; check the path."
        )
    return [case | {"modality": modality} if modality else case for case in cases]


def _lacks(content: dict) -> str:
    """What a dataset.json that describes no images has instead."""
    if not content:
        return ""
    return (
        f" (dataset.json has {_some(sorted(map(repr, content)))}, but neither lists of images such as 'training' nor "
        "an imagesTr/ or images/ folder beside it)"
    )


def _cases_of_folders(root: Path, require_labels: bool, skipped: list[Skipped]) -> list[dict]:
    """Pairs of an image folder and a label folder beside it, and for queries nnU-Net's and the Decathlon's imagesTs."""
    image_folder, *names = next(names for names in PAIRED_FOLDERS if (root / names[0]).is_dir())
    label_folder = next((root / name for name in names if (root / name).is_dir()), None)
    labels = _images_in(label_folder, skipped) if label_folder else []
    images = _images_or_series(root / image_folder, skipped)
    cases = _pair(root, root / image_folder, images, label_folder, labels, require_labels, skipped)
    used = {image_folder, *([label_folder.name] if label_folder else [])}
    if image_folder == "imagesTr" and not require_labels and (root / "imagesTs").is_dir():
        more = _images_or_series(root / "imagesTs", skipped)
        _check_channels(root / "imagesTs", more)
        cases += [{"image": str(path)} for path in more]
        used.add("imagesTs")
    hidden = []
    for path in sorted(root.iterdir()):
        if _is_hidden(path):
            hidden.append(path)
        elif path.name not in used | DESCRIPTIONS:
            what = f"a folder beside {image_folder}/" if path.is_dir() else f"a file beside {image_folder}/"
            skipped.append(Skipped(path, f"{what}, from which the images are taken"))
    _skip_hidden(hidden, skipped)
    return cases


def _cases_of_nnunet(path: Path, dataset: dict) -> list[dict]:
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
            raise _several_channels(path, name, [Path(str(image)).name for image in images])
        listed = {"image": images[0]} | ({"label": entry["label"]} if entry.get("label") else {})
        cases.append(_case_of_entry(path, path.parent, "dataset", listed))
    return cases


def _several_channels(root: Path, name: str, files: list[str]) -> DataError:
    return DataError(
        f"{root}: expected one image for each case, found {len(files)} channels of {name!r} ({_some(files)}); several "
        "volumes of one case are not read together: choose one channel and list its images in a MONAI datalist JSON."
    )


def _skip_unlisted(root: Path, cases: list[dict], skipped: list[Skipped]) -> None:
    """Images in the folders of a data set of which dataset.json says nothing."""
    listed = {os.path.realpath(case[key]) for case in cases for key in ("image", "label") if key in case}
    for name in ("imagesTr", "imagesTs", "images"):
        if (root / name).is_dir():
            for path in _images_or_series(root / name, skipped):
                if os.path.realpath(path) not in listed:
                    skipped.append(Skipped(path, "not listed in dataset.json"))


def _read_json(path: Path) -> dict:
    try:
        # As bytes, so that a byte order mark of any of JSON's encodings is understood.
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected a JSON file, found that it can't be read ({error}); correct it.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, found a {type(content).__name__}; see MONAI's datalists.")
    return content


def _cases_of_json(path: Path, content: dict) -> list[dict]:
    if not SECTION_OF_KEY.keys() & content.keys():
        raise DataError(
            f"{path}: expected a datalist with `training`, `validation` or `test`, found the keys "
            f"{sorted(content)}; add a list of images and labels."
        )
    base = path.parent / content.get("root", "")
    modality = _single_modality(content.get("modality"))
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
        raise _several_channels(path, str(entry.get("label", key)), list(map(str, entry["image"])))
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


def _single_modality(declared: object) -> str | None:
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


def _images_or_series(folder: Path, skipped: list[Skipped]) -> list[Path]:
    """The folder itself if it is one DICOM series, else the images in it and its subfolders.

    Raises DataError if it holds several series of which one has several slices: no file there is an image by itself.
    """
    series = _series_of(dicom_files(folder))
    if len(series) > 1 and max(series.values()) > 1:
        listed = "; ".join(f"{name}: {count} files" for name, count in sorted(series.items()))
        raise DataError(
            f"{folder}: expected one DICOM series, found {len(series)}: {listed}; put each in a folder of its own."
        )
    return _images_in(folder, skipped)


def _images_in(folder: Path, skipped: list[Skipped]) -> list[Path]:
    """Images of a folder and its subfolders, by name; what is none of them is put on `skipped` with the reason."""
    images: list[Path] = []
    hidden: list[Path] = []
    _walk(folder, images, hidden, skipped, set())
    _skip_hidden(hidden, skipped)
    return sorted(images, key=lambda path: (path.name, str(path)))


def _walk(folder: Path, images: list[Path], hidden: list[Path], skipped: list[Skipped], above: set[str]) -> None:
    real = os.path.realpath(folder)
    if real in above:
        skipped.append(Skipped(folder, "a link to a folder that it lies in"))
        return
    entries = sorted(folder.iterdir(), key=lambda path: path.name)
    slices = _slices_of_series(folder, entries)
    if slices:
        images.append(folder)
    data = {part for path in entries if path.is_file() for part in data_files(path)}
    for path in entries:
        if _is_hidden(path):
            hidden.append(path)
        elif path.is_dir():
            why = _folder_not_used(path)
            if why:
                skipped.append(Skipped(path, why))
            else:
                _walk(path, images, hidden, skipped, above | {real})
        elif path in slices or path in data or (path.name in DESCRIPTIONS and not above):
            continue
        elif is_image(path) and is_dicom(path) and is_dicom_seg(path):
            skipped.append(Skipped(path, "a DICOM segmentation, not an image"))
        elif is_image(path):
            images.append(path)
        else:
            skipped.append(Skipped(path, file_not_used(path)))
    if not entries:
        skipped.append(Skipped(folder, "an empty folder"))


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name in SYSTEM_FILES


def _skip_hidden(hidden: list[Path], skipped: list[Skipped]) -> None:
    """One entry for all hidden files."""
    if hidden:
        more = f", and {len(hidden) - 1} more" if len(hidden) > 1 else ""
        skipped.append(Skipped(hidden[0], f"a hidden or system file{more}"))


def _folder_not_used(path: Path) -> str | None:
    """Why a folder among images is not looked into; None if it is."""
    if path.name.lower() in LABEL_FOLDER_NAMES:
        return "a folder of labels, not of images"
    if (path / "records").is_dir() and any((path / name).is_file() for name in ("summary.csv", "metrics.csv")):
        return "results of an earlier run"
    return None


def file_not_used(path: Path) -> str:
    """Why a file among images is not used."""
    if path.name.upper() == "DICOMDIR":
        return "an index of DICOM files, not an image"
    if path.stat().st_size == 0:
        return "an empty file"
    kind = without_pixels(path) if is_dicom(path) else None
    if kind is not None:
        return f"a DICOM object without pixels ({kind})"
    suffix = next((suffix for suffix in UNREAD_SUFFIXES if path.name.lower().endswith(suffix)), None)
    if suffix is not None:
        return f"{suffix} files are not read; convert it to NIfTI, NRRD, MetaImage, DICOM, PNG or TIFF"
    return f"not an image ({path.suffix or 'a name without an ending'})"


def _slices_of_series(folder: Path, entries: list[Path]) -> set[Path]:
    """The DICOM files of a folder if they are slices of a series, so that the folder is an image; else none.

    Files of several series are too: reading the folder says which.
    """
    files = dicom_files(folder)
    series = _series_of(files)
    several = bool(series) and max(series.values()) > 1
    only = len(series) == 1 and len([path for path in entries if path.is_file() and is_image(path)]) == 1
    return set(files) if several or only else set()


def _series_of(files: list[Path]) -> Counter:
    """How many files with a position in space each DICOM series has; damaged files don't count."""
    series: Counter = Counter()
    for file in files:
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=SERIES_TAGS, force=True)
        except Exception:  # whatever is wrong with a damaged file, reading it as an image tells
            continue
        if "ImagePositionPatient" in header:
            series[f"{header.get('SeriesInstanceUID')} ({header.get('SeriesDescription', 'no description')})"] += 1
    return series


def _pair(
    root: Path,
    image_folder: Path,
    images: list[Path],
    label_folder: Path | None,
    labels: list[Path],
    require_labels: bool,
    skipped: list[Skipped],
) -> list[dict]:
    """Join images and labels by subfolder and stem; by whole name where stems aren't unique."""
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for label in labels:
        by_stem[_place(label_folder, label)].append(label)
    image_stems: dict[str, list[Path]] = defaultdict(list)
    for image in images:
        image_stems[_place(image_folder, image)].append(image)
    image_stems = _without_channels(root, image_folder, image_stems, by_stem)
    cases, used = [], set()
    for stem, sharing in image_stems.items():
        endings = ("", *LABEL_ENDINGS)
        candidates = next((by_stem[stem + ending] for ending in endings if stem + ending in by_stem), [])
        if len(sharing) == 1 and len(candidates) == 1:
            pairs = {sharing[0]: candidates[0]}
        else:
            pairs = {image: label for image in sharing for label in candidates if _full_stem(label) == image.name}
            if candidates and len(pairs) < len(sharing):
                raise DataError(
                    f"{root}: expected one label for each image of the stem {stem!r}, found the images "
                    f"{[path.name for path in sharing]} and the labels {[path.name for path in candidates]}; give them "
                    "different stems."
                )
        used.update(pairs.values())
        cases += [{"image": str(image)} | ({"label": str(pairs[image])} if image in pairs else {}) for image in sharing]
    if require_labels and images and labels and not used:
        raise DataError(
            f"{root}: expected {LAYOUTS}, found no pair among the images {_some([path.name for path in images])} and "
            f"the labels {_some([path.name for path in labels])}; give each label its image's stem."
        )
    skipped += [Skipped(label, "a label without an image of its name") for label in labels if label not in used]
    return cases


def _place(folder: Path, path: Path) -> str:
    """Subfolder and stem of an image or label, alike for both forms of Unicode."""
    relative = path.relative_to(folder)
    return unicodedata.normalize("NFC", str(relative.with_name(image_stem(path))) if relative.parts else path.name)


def _without_channels(
    root: Path, folder: Path, image_stems: dict[str, list[Path]], labels: dict[str, list[Path]]
) -> dict[str, list[Path]]:
    """Images by their case: `liver_000_0000` is channel 0 of `liver_000` in nnU-Net's folders, and where that label is.

    Raises DataError for a case of several channels.
    """
    by_case: dict[str, list[Path]] = defaultdict(list)
    for stem, images in image_stems.items():
        match = CHANNEL.fullmatch(stem)
        is_channel = match and stem not in labels and (folder.name in CHANNEL_FOLDERS or match[1] in labels)
        by_case[match[1] if is_channel else stem] += images
    for case, images in by_case.items():
        if len(images) > 1 and all(CHANNEL.fullmatch(image_stem(image)) for image in images):
            raise _several_channels(root, case, [image.name for image in images])
    return by_case


def _check_channels(folder: Path, queries: list[Path]) -> None:
    """Raise DataError for cases of several channels in one of nnU-Net's folders.

    In any other folder, names such as `case_0000` may count images as well. Volumes of such names are only warned of.
    """
    found: dict[str, list[Path]] = defaultdict(list)
    for path in queries:
        match = CHANNEL.fullmatch(_place(folder, path))
        if match and not is_picture(path):
            found[match[1]].append(path)
    several = {case: images for case, images in found.items() if len(images) > 1}
    for case, images in several.items():
        if folder.name in CHANNEL_FOLDERS:
            raise _several_channels(folder, case, [image.name for image in images])
        if any(image_stem(image).endswith("_0000") for image in images):
            logger.warning(
                "%s: %s may be channels of one case; each is segmented by itself.",
                folder,
                _some([image.name for image in images]),
            )


def _full_stem(label: Path) -> str:
    """A label's file name without `_mask` or `_segmentation`, to compare with an image's whole name."""
    stem = image_stem(label)
    suffix = label.name[len(stem) :]
    for ending in LABEL_ENDINGS:
        stem = stem.removesuffix(ending)
    return stem + suffix


def _labelled(root: Path, cases: list[dict], skipped: list[Skipped]) -> list[dict]:
    labelled = [case for case in cases if "label" in case]
    if not labelled:
        raise DataError(
            f"{root}: expected images with labels ({LAYOUTS}), found {len(cases)} images and no label for any of them "
            f"({_contents(root)}); add labels of equal stems."
        )
    skipped += [Skipped(Path(case["image"]), "an image without a label") for case in cases if "label" not in case]
    return labelled


def _name_cases(root: Path, cases: list[dict], pattern: re.Pattern) -> None:
    """Give each case its name, patient and group, and bring them into the order of their names."""
    folder = root if root.is_dir() else root.parent
    stems = Counter(image_stem(case["image"]) for case in cases)
    names = Counter(Path(case["image"]).name for case in cases)
    for case in cases:
        path = Path(case["image"])
        stem = image_stem(path)
        if stems[stem] == 1:
            case["name"] = stem
        elif names[path.name] == 1:
            case["name"] = path.name
        else:
            case["name"] = os.path.relpath(path, folder).replace(os.sep, "_")
        # Where a data set calls all files alike, their folders tell patients apart.
        text = stem if names[path.name] == 1 else case["name"]
        match = pattern.search(text)
        case.setdefault("patient", match[0] if match and match[0] else text)
        case.setdefault("group", folder.name)
    cases.sort(key=lambda case: (case["name"], case["image"]))


def _assign_sections(cases: list[dict], split: Sequence[float], seed: int) -> None:
    """Set `section` of labelled cases that have none yet: whole patients, in a random order that `seed` decides.

    Sections that the file gives keep their share: the rest is split among the others. A patient who is in a given
    section belongs to it with all cases.
    """
    given = {case["patient"]: case["section"] for case in cases if "section" in case}
    open_sections = [name for name in SECTIONS if name not in given.values()]
    free = sorted({case["patient"] for case in cases if "label" in case and case["patient"] not in given})
    shares = np.array([split[SECTIONS.index(name)] for name in open_sections])
    counts = _apportion(shares, len(free))
    order = [free[index] for index in np.random.default_rng(seed).permutation(len(free))]
    section_of = dict(given)
    start = 0
    for name, count in zip(open_sections, counts, strict=True):
        section_of.update(dict.fromkeys(order[start : start + count], name))
        start += count
    for case in cases:
        if "label" in case and "section" not in case:
            case["section"] = section_of[case["patient"]]


def _apportion(shares: np.ndarray, total: int) -> list[int]:
    """Whole numbers that sum to `total`, closest to `shares`, and at least 1 for each share above 0 if `total` allows.

    With fewer than that the first sections are served first.
    """
    if not shares.sum():
        shares = np.eye(1, len(shares))[0]
    exact = shares / shares.sum() * total
    counts = np.floor(exact).astype(int)
    for index in np.argsort(-(exact - counts), kind="stable")[: total - counts.sum()]:
        counts[index] += 1
    for index in np.flatnonzero((shares > 0) & (counts == 0)):
        if counts.max() > 1:
            counts[np.argmax(counts)] -= 1
            counts[index] += 1
    return counts.tolist()


def _names_by_value(path: Path, declared: object) -> dict[int, str]:
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


def _contents(folder: Path) -> str:
    if not folder.is_dir():
        return "a file"
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("."))
    return _some(names) if names else "an empty folder"


def _some(names: list[str]) -> str:
    more = len(names) - NAMES_IN_A_WARNING
    return ", ".join(names[:NAMES_IN_A_WARNING]) + (f" and {more} more" if more > 0 else "")
