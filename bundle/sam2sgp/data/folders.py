"""Data folders as MONAI datalists: which image goes with which label, patient and section.

In: a folder of any usual layout (docs/data.md lists them), a MONAI datalist JSON, or, for queries, only images. Out:
plain dicts of paths and names. Only names and JSON files are read here, and DICOM headers.
"""

import filecmp
import json
import logging
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from sam2sgp.data.io import image_stem, is_image
from sam2sgp.data.pairing import (
    IMAGE_FOLDERS,
    LABEL_FOLDERS,
    NAMES_SHOWN,
    check_channels,
    pair,
    several_channels,
    some,
    sort_out,
)
from sam2sgp.data.tree import DESCRIPTIONS, Skipped, Tree, is_hidden, read_tree, skip_hidden
from sam2sgp.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

# A word for "patient" and a number, at the start of a name and not followed by more of the same word.
DEFAULT_PATIENT_PATTERN = (
    r"(?i)^(?:sub-[a-z0-9]+|TCGA-[a-z0-9]{2}-[a-z0-9]{4}|(?:patient|pat|subject|subj|case|STS)[-_ ]?\d+)(?![a-z0-9])"
)
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
    "masks/) whose files have equal stems, images and labels side by side (a.png and a_seg.png, or one folder a case), "
    "or a MONAI datalist JSON file"
)


class Datalist(list):
    """Cases of a data folder. `skipped`: what else was found there and is not used."""

    skipped: Sequence[Skipped] = ()


def skipped_in(*datalists: list[dict]) -> list[Skipped]:
    """What was found beside some cases and is used by none of these lists, each once; each is said in the log."""
    used = {case[key] for cases in datalists for case in cases for key in ("image", "label") if key in case}
    found: dict[Path, Skipped] = {}
    for file in (file for cases in datalists for file in getattr(cases, "skipped", ())):
        if file.used_elsewhere or file.path not in found:
            found[file.path] = file
    # A folder that another list takes its cases from is used.
    left = [file for path, file in found.items() if file.used_elsewhere or not _is_used(path, used)]
    for file in left:
        logger.warning("Not used: %s: %s.", file.path, file.why)
    return left


def _is_used(path: Path, used: set[str]) -> bool:
    return str(path) in used or path.is_dir() and any(name.startswith(f"{path}{os.sep}") for name in used)


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
            folder, with subfolders or without, in which labels are told from images by their names; a MONAI datalist
            JSON file. Without `require_labels` also a folder without labels, one image file, or one DICOM series
            folder. Files that are labels by their names or folders are never images.
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
        DataError: nothing usable is there, a listed file is missing, a case has several channels, or pairs are
            ambiguous.
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
    if not require_labels:
        _warn_of_equal_stems(cases)
    if section != "all":
        _assign_sections(cases, split, seed)
        cases = [case for case in cases if case.get("section") == section]
    listed = Datalist({key: value for key, value in case.items() if key != "section"} for case in cases)
    listed.skipped = skipped
    return listed


def load_queries(
    root: str | os.PathLike,
    support: Sequence[dict],
    segment_labelled: bool = False,
    patient_pattern: str = DEFAULT_PATIENT_PATTERN,
) -> Datalist:
    """The images to segment: all in `root`, without those of the support set unless they are asked for.

    Args:
        root: as for `load_datalist` without labels.
        support: the support set's cases.
        segment_labelled: keep images of the support set; each gets a warning, and so does in any case an image whose
            file has the same content as one of the support set.
        patient_pattern: as for `load_datalist`.

    Returns:
        As `load_datalist`; images that are left out are in `skipped`.

    Raises:
        DataError: as `load_datalist`; or every image is in the support set and none is asked for.
    """
    queries = load_datalist(root, require_labels=False, patient_pattern=patient_pattern)
    known = {os.path.realpath(case["image"]): case["image"] for case in support}
    of_size: dict[int, list[str]] = defaultdict(list)
    for path in known:
        if os.path.isfile(path):
            of_size[os.path.getsize(path)].append(path)
    kept, own = Datalist(), []
    for case in queries:
        path = os.path.realpath(case["image"])
        if path in known and not segment_labelled:
            why = "a labelled image of the support set; --segment_labelled True segments it too"
            own.append(Skipped(Path(case["image"]), why, used_elsewhere=True))
            continue
        alike = [path] if path in known else of_size[os.path.getsize(path)] if os.path.isfile(path) else []
        same = next((other for other in alike if other == path or filecmp.cmp(path, other, shallow=False)), None)
        if same is not None:
            told = f"The same image is in the support set ({known[same]}): its own label guides it."
            case = case | {"warnings": [*case.get("warnings", ()), told]}
        kept.append(case)
    if not kept:
        raise DataError(
            f"{root}: expected images to segment, found {len(own)} that are all in the support set; give other images, "
            "or --segment_labelled True to segment these too."
        )
    kept.skipped = [*queries.skipped, *own]
    return kept


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
        found = ", ".join(str(value) for value in undeclared[:NAMES_SHOWN])
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
    elif _folders_of(root, IMAGE_FOLDERS):
        cases = _cases_of_folders(root, content, require_labels, skipped)
    else:
        cases = _cases_of_tree(root, content, require_labels, skipped)
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
        f" (dataset.json has {some(sorted(map(repr, content)))}, but neither lists of images such as 'training' nor "
        "an imagesTr/ or images/ folder beside it)"
    )


def _cases_of_folders(root: Path, content: dict, require_labels: bool, skipped: list[Skipped]) -> list[dict]:
    """Pairs of an image folder and a label folder beside it, and for queries nnU-Net's and the Decathlon's imagesTs."""
    folders = sorted(_folders_of(root, IMAGE_FOLDERS), key=lambda path: path.name.lower() != "imagestr")
    beside = sorted(_folders_of(root, LABEL_FOLDERS), key=lambda path: path.name.lower() != "labelstr")
    if folders[0].name.lower() != "imagestr":
        beside = [path for path in beside if path.name.lower() not in ("labelstr", "labelsts")]
    used = [folders[0], *beside[:1]]
    trees = [read_tree(folder) for folder in used]
    for tree in trees:
        skipped += tree.skipped
    found = Tree([path for tree in trees for path in tree.images], [p for tree in trees for p in tree.segmentations])
    _leave_other_endings(found, content, skipped)
    images, labels = sort_out(root, found, skipped)
    cases = pair(root, images, labels, require_labels, skipped)
    if require_labels and images and labels and not any("label" in case for case in cases):
        raise _without_pairs(root, images, labels)
    if folders[0].name.lower() == "imagestr" and not require_labels:
        for folder in (path for path in folders if path.name.lower() == "imagests"):
            more = read_tree(folder)
            skipped += more.skipped
            check_channels(folder, more.images)
            cases += [{"image": str(path)} for path in more.images]
            used.append(folder)
    hidden = []
    for path in sorted(root.iterdir()):
        if is_hidden(path):
            hidden.append(path)
        elif path in beside and path not in used:
            skipped.append(Skipped(path, f"a second folder of labels; those in {beside[0].name}/ are used"))
        elif path not in used and path.name not in DESCRIPTIONS:
            what = "a folder" if path.is_dir() else "a file"
            skipped.append(Skipped(path, f"{what} beside {folders[0].name}/, from which the images are taken"))
    skip_hidden(hidden, skipped)
    _compare_number(root, content, sum("label" in case for case in cases))
    return cases


def _cases_of_tree(root: Path, content: dict, require_labels: bool, skipped: list[Skipped]) -> list[dict]:
    """Cases of a folder in which labels are told from images by their names and folders."""
    tree = read_tree(root)
    images, labels = sort_out(root, tree, skipped)
    if not require_labels and root.name.lower() in LABEL_FOLDERS and _folders_of(root.parent, IMAGE_FOLDERS):
        raise DataError(
            f"{root}: expected images, found a folder of labels by its name, with "
            f"{_folders_of(root.parent, IMAGE_FOLDERS)[0].name}/ beside it; give that one."
        )
    cases = pair(root, images, labels, require_labels, skipped)
    if require_labels and not any("label" in case for case in cases):
        raise _without_pairs(root, images, labels, _lacks(content))
    if labels and not images:
        raise DataError(
            f"{root}: expected images, found {_counted(root, labels, 'file')} of labels' names and no image; give the "
            "folder of the images, rename them, or list them in a MONAI datalist JSON."
        )
    check_channels(root, [Path(case["image"]) for case in cases if "label" not in case])
    skipped += tree.skipped
    return cases


def _folders_of(root: Path, names: Sequence[str]) -> list[Path]:
    """Folders in `root` of these names, in whatever case, in the order of the names."""
    found = [path for path in sorted(root.iterdir()) if path.name.lower() in names and path.is_dir()]
    return sorted(found, key=lambda path: names.index(path.name.lower()))


def _leave_other_endings(tree: Tree, content: dict, skipped: list[Skipped]) -> None:
    """nnU-Net's dataset.json says which ending its files have."""
    ending = content.get("file_ending")
    if isinstance(ending, str) and ending:
        for path in [path for path in tree.images if not path.name.endswith(ending)]:
            tree.images.remove(path)
            skipped.append(Skipped(path, f"not of the ending {ending} that dataset.json gives"))


def _compare_number(root: Path, content: dict, pairs: int) -> None:
    stated = content.get("numTraining")
    if isinstance(stated, int) and stated != pairs:
        logger.warning("%s: dataset.json says numTraining %d, found %d images with labels.", root, stated, pairs)


def _without_pairs(root: Path, images: list[Path], labels: list[Path], lacks: str = "") -> DataError:
    """The refusal of a folder without a pair of image and label: what was seen, and the nearest layout."""
    if not images and not labels:
        return DataError(f"{root}: expected {LAYOUTS}, found {_contents(root)}{lacks}; arrange the folder like these.")
    seen = f"{_counted(root, images, 'image')} and {_counted(root, labels, 'label') if labels else 'no label'}"
    return DataError(f"{root}: expected {LAYOUTS}, found {seen}{lacks}. {_nearest(root, images, labels)}")


def _nearest(root: Path, images: list[Path], labels: list[Path]) -> str:
    """What to do to come to the layout that is nearest to what was found."""
    if not images:
        return "All are labels by their names: put the images beside them."
    if labels:
        example, suffix = image_stem(images[0]), labels[0].name[len(image_stem(labels[0])) :]
        return (
            f"Give each label its image's stem: for {images[0].name}, labels/{example}{suffix} or, beside the image, "
            f"{example}_seg{suffix}."
        )
    stems: dict[str, set[Path]] = defaultdict(set)
    for path in images:
        stems[image_stem(path)].add(path.parent)
    both = Counter(frozenset(folders) for folders in stems.values() if len(folders) == 2).most_common(1)
    if both:
        first, second = sorted(path.relative_to(root).as_posix() or "." for path in both[0][0])
        return (
            f"{first}/ and {second}/ have {both[0][1]} names in common: if one of them holds the labels, call it "
            "labels/ and the other images/."
        )
    suffixes = Counter((image_stem(path), path.parent) for path in images)
    twice = [f"{stem}.*" for (stem, _), count in suffixes.items() if count > 1]
    if twice:
        return (
            f"{len(twice)} names are there in two formats ({some(twice)}): if one of them is the label, put those into "
            "labels/ and the images into images/."
        )
    example = image_stem(images[0])
    return f"Put labels into labels/ and the images into images/, or beside each other as {example}_seg.nii.gz or .png."


def _counted(root: Path, paths: list[Path], noun: str) -> str:
    names = some([str(path.relative_to(root)) for path in paths]) if paths else ""
    return f"{len(paths)} {noun}{'s' * (len(paths) != 1)}" + f" ({names})" * bool(paths)


def _warn_of_equal_stems(cases: list[dict]) -> None:
    """Two files of one stem in a folder may be one image twice, or an image and its label."""
    alike: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for case in cases:
        path = Path(case["image"])
        alike[str(path.parent), unicodedata.normalize("NFC", image_stem(path))].append(case)
    for found in alike.values():
        for case in found if len(found) > 1 else []:
            others = some([Path(other["image"]).name for other in found if other is not case])
            told = f"{others} has the same stem in the same folder: if that is a label, or the same image, remove one."
            case["warnings"] = [*case.get("warnings", ()), told]


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
            raise several_channels(path, name, [Path(str(image)).name for image in images])
        listed = {"image": images[0]} | ({"label": entry["label"]} if entry.get("label") else {})
        cases.append(_case_of_entry(path, path.parent, "dataset", listed))
    return cases


def _skip_unlisted(root: Path, cases: list[dict], skipped: list[Skipped]) -> None:
    """Images in the folders of a data set of which dataset.json says nothing."""
    listed = {os.path.realpath(case[key]) for case in cases for key in ("image", "label") if key in case}
    for folder in _folders_of(root, IMAGE_FOLDERS):
        tree = read_tree(folder)
        skipped += tree.skipped
        skipped += [
            Skipped(path, "not listed in dataset.json") for path in tree.images if os.path.realpath(path) not in listed
        ]


def _read_json(path: Path) -> dict:
    try:
        # As bytes, so that a byte order mark of any of JSON's encodings is understood.
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
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


def _labelled(root: Path, cases: list[dict], skipped: list[Skipped]) -> list[dict]:
    labelled = [case for case in cases if "label" in case]
    if not labelled:
        raise DataError(
            f"{root}: expected images with labels ({LAYOUTS}), found {len(cases)} images and no label for any of them "
            f"({_contents(root)}). {_nearest(root, [Path(case['image']) for case in cases], [])}"
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
    return some(names) if names else "an empty folder"
