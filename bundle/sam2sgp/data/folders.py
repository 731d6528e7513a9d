"""Data folders as MONAI datalists: which image goes with which label, patient and section.

In: a folder of any usual layout (docs/data.md lists them), a MONAI datalist JSON, or, for queries, only images. Out:
plain dicts of paths and names. Only names and JSON files are read here, and DICOM headers.

    folder    read_tree (`tree`), sort_out, pair (`pairing`) ──┐
    JSON      cases_of_json, cases_of_nnunet (`datalist_json`) ┴ names, patients ─ assign_sections (`split`) ─ Datalist
"""

import filecmp
import logging
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from sam2sgp.data.datalist_json import (
    SECTION_OF_KEY,
    cases_of_json,
    cases_of_nnunet,
    read_json,
    single_modality,
)
from sam2sgp.data.io import image_stem, is_image
from sam2sgp.data.layouts import LAYOUTS, contents, counted, lacks, nearest, without_pairs
from sam2sgp.data.pairing import IMAGE_FOLDERS, LABEL_FOLDERS, check_channels, pair, some, sort_out
from sam2sgp.data.split import SECTIONS, assign_sections
from sam2sgp.data.tree import DESCRIPTIONS, Skipped, Tree, is_hidden, read_tree, skip_hidden
from sam2sgp.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

# A word for "patient" and a number, at the start of a name and not followed by more of the same word.
DEFAULT_PATIENT_PATTERN = (
    r"(?i)^(?:sub-[a-z0-9]+|TCGA-[a-z0-9]{2}-[a-z0-9]{4}|(?:patient|pat|subject|subj|case|STS)[-_ ]?\d+)(?![a-z0-9])"
)


class Datalist(list):
    """Cases of a data folder. `skipped`: what else was found there and is not used."""

    skipped: Sequence[Skipped] = ()


def skipped_in(*datalists: list[dict]) -> list[Skipped]:
    """What was found beside some cases and is used by none of these lists, each once.

    The log says how many there are for each reason, and names the first few.
    """
    used = {case[key] for cases in datalists for case in cases for key in ("image", "label") if key in case}
    found: dict[Path, Skipped] = {}
    for file in (file for cases in datalists for file in getattr(cases, "skipped", ())):
        if file.used_elsewhere or file.path not in found:
            found[file.path] = file
    # A folder that another list takes its cases from is used.
    left = [file for path, file in found.items() if file.used_elsewhere or not _is_used(path, used)]
    alike: dict[tuple[Path, str], list[str]] = defaultdict(list)
    for file in left:
        alike[file.path.parent, file.why].append(file.path.name)
    for (folder, why), names in alike.items():
        if len(names) == 1:
            logger.warning("Not used: %s: %s.", folder / names[0], why)
        else:
            logger.warning("Not used: %d in %s (%s): %s.", len(names), folder, some(names), why)
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
        assign_sections(cases, split, seed)
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


def _find_cases(root: Path, require_labels: bool, skipped: list[Skipped]) -> list[dict]:
    """Raw cases: `image`, perhaps `label`, `section` and what a JSON file says; not yet named."""
    if not root.exists():
        raise DataError(f"{root}: expected {LAYOUTS}, found no such file or folder; check the path.")
    if root.is_file():
        if root.suffix.lower() == ".json":
            return cases_of_json(root, read_json(root))
        if not require_labels and is_image(root):
            return [{"image": str(root)}]
        raise DataError(f"{root}: expected {LAYOUTS}, found a file of another kind; give one of these.")
    listing = root / "dataset.json"
    content = read_json(listing) if listing.is_file() else {}
    if SECTION_OF_KEY.keys() & content.keys():
        cases = cases_of_json(listing, content)
        _skip_unlisted(root, cases, skipped)
        return cases
    modality = single_modality(content.get("modality", content.get("channel_names")))
    if isinstance(content.get("dataset"), dict):
        cases = cases_of_nnunet(listing, content["dataset"])
        _skip_unlisted(root, cases, skipped)
    elif _folders_of(root, IMAGE_FOLDERS):
        cases = _cases_of_folders(root, content, require_labels, skipped)
    else:
        cases = _cases_of_tree(root, content, require_labels, skipped)
    if not cases:
        raise DataError(
            f"{root}: expected images (NIfTI, NRRD, MetaImage, DICOM series folders, PNG, JPEG, TIFF, BMP), found "
            f"{contents(root)}; check the path."
        )
    return [case | {"modality": modality} if modality else case for case in cases]


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
        raise without_pairs(root, images, labels)
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
        raise without_pairs(root, images, labels, lacks(content))
    if labels and not images:
        raise DataError(
            f"{root}: expected images, found {counted(root, labels, 'file')} of labels' names and no image; give the "
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


def _skip_unlisted(root: Path, cases: list[dict], skipped: list[Skipped]) -> None:
    """Images in the folders of a data set of which dataset.json says nothing."""
    listed = {os.path.realpath(case[key]) for case in cases for key in ("image", "label") if key in case}
    for folder in _folders_of(root, IMAGE_FOLDERS):
        tree = read_tree(folder)
        skipped += tree.skipped
        skipped += [
            Skipped(path, "not listed in dataset.json") for path in tree.images if os.path.realpath(path) not in listed
        ]


def _labelled(root: Path, cases: list[dict], skipped: list[Skipped]) -> list[dict]:
    labelled = [case for case in cases if "label" in case]
    if not labelled:
        raise DataError(
            f"{root}: expected images with labels ({LAYOUTS}), found {len(cases)} images and no label for any of them "
            f"({contents(root)}). {nearest(root, [Path(case['image']) for case in cases], [])}"
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
