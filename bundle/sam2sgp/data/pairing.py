"""Which files of a folder are labels, and of which image, by their names and the names of their folders.

In: images and labels of one folder tree. Out: cases, dicts of `image` and, if there is one, `label`. Names are compared
in one form of Unicode (NFC), because macOS writes letters and their accents separately.
"""

import logging
import re
import unicodedata
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from sam2sgp.data.io import image_stem, is_dicom, is_picture
from sam2sgp.data.tree import Skipped, Tree
from sam2sgp.errors import DataError

logger = logging.getLogger(__name__)

# Names of folders, lower case.
IMAGE_FOLDERS = ("images", "imgs", "image", "img", "imagestr", "imagests", "imagesval")
LABEL_FOLDERS = (
    *("labels", "masks", "label", "mask", "segmentations", "segmentation", "segs", "seg", "gts", "gt"),
    *("annotations", "groundtruth", "labelstr", "labelsts"),
)
LABEL_WORDS = "segmentations?|seg|dseg|labelmap|labels?|masks?|gt|ground[-_ ]?truth|truth|annotations?"
IMAGE_WORDS = "images?|img|volume|vol|scan"
BREAK = r"[-_. ]"
# "a_seg", "a-label", "a_mask_1", "seg", "Segmentation_1", "label0001".
LABEL_NAME = re.compile(rf"(?is)(?P<before>.*?)(?:^|{BREAK})(?:{LABEL_WORDS})(?P<after>{BREAK}?\d+)?")
# "seg_anna": as likely the name of an image, where no image "anna" is near.
LABEL_FIRST = re.compile(rf"(?is)(?:{LABEL_WORDS}){BREAK}(?P<rest>.+)")
IMAGE_NAME = re.compile(rf"(?is)(?P<before>.*?)(?:^|{BREAK})(?:{IMAGE_WORDS})(?P<after>{BREAK}?\d+)?")
IMAGE_FIRST = re.compile(rf"(?is)(?:{IMAGE_WORDS}){BREAK}(?P<rest>.+)")
# What in a BIDS name tells a label from others of its image, but not which image it is of.
BIDS_OF_LABELS = re.compile(r"_(?:space|desc|label|res|den|atlas|hemi|seg)-[A-Za-z0-9]+")
BIDS_SPACE = re.compile(r"_space-([A-Za-z0-9]+)")
BIDS_PREFERRED = "_T1w"
# Folders of nnU-Net and the Decathlon, in which `liver_000_0001` is channel 1 of the case `liver_000`.
CHANNEL_FOLDERS = ("imagesTr", "imagesVal", "imagesTs")
CHANNEL = re.compile(r"(.+)_(\d{4})")
NAMES_SHOWN = 5

IMAGES, LABELS, DERIVATIVES = "images", "labels", "derivatives"
# How well a label's name fits an image, best first.
WHOLE, KEY, BEGINNING, ONLY = range(4)


@dataclass(frozen=True)
class _File:
    """An image or label as it is compared.

    Attributes:
        path: of the file or DICOM series folder.
        place: its folder within the tree, without those named for images, labels or derivatives.
        folder: which of these it lies in, by the nearest one; "" if in none.
        stem: its name without suffix, as NFC; `.seg` of `.seg.nrrd` belongs to it.
        keys: what the image of this label may be called, best first; None if it isn't named as a label.
    """

    path: Path
    place: str
    folder: str
    stem: str
    keys: tuple[str, ...] | None

    @property
    def image_keys(self) -> set[str]:
        """What else than its stem a label may call this image."""
        match, first = IMAGE_NAME.fullmatch(self.stem), IMAGE_FIRST.fullmatch(self.stem)
        keys = {(match["before"] + (match["after"] or "")).strip("-_. ")} if match else set()
        return keys | ({first["rest"]} if first else set())


def label_keys(stem: str) -> tuple[str, ...] | None:
    """What the image of a label of this stem may be called, best first; "" for any. None if it names no label.

    Example:
        >>> label_keys("liver_01_seg"), label_keys("liver_seg_01"), label_keys("Segmentation.seg"), label_keys("liver")
        (('liver_01',), ('liver_01', 'liver'), ('',), None)
    """
    match = LABEL_NAME.fullmatch(stem)
    if match is None:
        return None
    before, after = match["before"], match["after"]
    inner = label_keys(before) if before else None
    if inner is not None:
        return inner
    keys = [before + after] if after else []
    keys.append(before)
    if before.startswith("sub-"):
        keys.append(BIDS_OF_LABELS.sub("", before))
    return tuple(dict.fromkeys(key.strip("-_. ") for key in keys))


def sort_out(root: Path, tree: Tree, skipped: list[Skipped]) -> tuple[list[Path], list[Path]]:
    """The images and the labels among the files of a folder, by their names and folders.

    A file is a label if its folder is one of `LABEL_FOLDERS` or its name is that of a label. In a folder named for
    images, and where the word comes first ("seg_anna"), it is one only if its image is there too. Of BIDS derivatives,
    only labels on their image's own grid are used.
    """
    files = [_file(root, path) for path in tree.images]
    stems: dict[str, set[str]] = defaultdict(set)
    for file in files:
        if file.keys is None and file.folder not in (LABELS, DERIVATIVES):
            stems[file.place] |= {file.stem, *file.image_keys}
    images, labels = [], list(tree.segmentations)
    for file in files:
        near = stems[file.place]
        first = LABEL_FIRST.fullmatch(file.stem)
        if file.folder == DERIVATIVES:
            why = _not_of_the_grid(file)
            if why:
                skipped.append(Skipped(file.path, why))
            else:
                labels.append(file.path)
        elif file.folder == LABELS or file.path.name.lower().endswith(".seg.nrrd"):
            labels.append(file.path)
        elif file.path.is_dir():
            images.append(file.path)
        elif file.keys is not None and (file.folder != IMAGES or near & set(file.keys)):
            labels.append(file.path)
        elif file.keys is None and first and first["rest"] in near:
            labels.append(file.path)
        else:
            images.append(file.path)
    return images, labels


def pair(
    root: Path, images: list[Path], labels: list[Path], require_labels: bool, skipped: list[Skipped]
) -> list[dict]:
    """Each image with its label, where there is one.

    Both lie in equal folders, but for folders named for images, labels and derivatives. Their names fit, best first, if
    they have one stem; if the label's, without a word such as "seg", is the image's, without a word such as "img"; if
    it is the beginning of only one image's; or if the label's name is only such a word and one image is there.

    Args:
        root: of the tree, for messages.
        images, labels: paths in it.
        require_labels: whether pairs matter. If so, they must be certain.
        skipped: gets the labels that belong to no image.

    Raises:
        DataError: a case of several channels; or, with `require_labels`, two labels fit one image, or two images one
            label, equally well.
    """
    image_files, label_files = ([_file(root, path) for path in paths] for paths in (images, labels))
    at = _by_place(root, image_files, label_files)
    fits: dict[Path, list[tuple[int, Path]]] = defaultdict(list)
    several: dict[Path, tuple[int, list[Path]]] = {}
    lost: dict[Path, str] = {}
    for file in label_files:
        rank, found = _images_of(file, at)
        if len(found) > 1:
            several[file.path] = rank, found
            found = [image for image in found if _have_one_name(image, file.path)]
        if len(found) == 1:
            fits[found[0]].append((rank, file.path))
        else:
            lost[file.path] = "a label without an image of its name"
    label_of: dict[Path, Path] = {}
    unclear: list[tuple[list[Path], list[Path]]] = []
    for image, ranked in fits.items():
        best = [label for rank, label in ranked if rank == min(ranked)[0]]
        if len(best) > 1:
            best = [label for label in best if _have_one_name(image, label)] or best
        if len(best) == 1:
            label_of[image] = best[0]
            others = f"another label of {image.name} is used"
        else:
            unclear.append(([image], best))
            others = f"one of {len(best)} labels that may be of {image.name}"
        lost |= {label: others for _, label in ranked if [label] != best}
    for label, (rank, found) in several.items():
        unlabelled = [image for image in found if image not in label_of]
        used = label in label_of.values()
        if unlabelled and (used or rank != ONLY or len(unlabelled) == len(found)):
            unclear.append((found, [label]))
            if not used:
                lost[label] = f"a label that may be of any of {len(found)} images ({some([p.name for p in found])})"
    if unclear and require_labels:
        raise _unclear(root, unclear)
    skipped += [Skipped(label, why) for label, why in lost.items()]
    return [{"image": str(image)} | ({"label": str(label_of[image])} if image in label_of else {}) for image in images]


def check_channels(folder: Path, queries: list[Path]) -> None:
    """Raise DataError for cases of several channels in one of nnU-Net's folders.

    In any other folder, names such as `case_0000` may count images as well. Volumes of such names are only warned of.
    """
    found: dict[str, list[Path]] = defaultdict(list)
    for path in queries:
        file = _file(folder, path)
        match = CHANNEL.fullmatch(f"{file.place}/{file.stem}")
        if match and not is_picture(path):
            found[match[1]].append(path)
    for case, images in found.items():
        if len(images) > 1 and folder.name in CHANNEL_FOLDERS:
            raise several_channels(folder, case.lstrip("/"), [image.name for image in images])
        if len(images) > 1 and any(image_stem(image).endswith("_0000") for image in images):
            logger.warning(
                "%s: %s may be channels of one case; each is segmented by itself.",
                folder,
                some([image.name for image in images]),
            )


def several_channels(root: Path, name: str, files: list[str]) -> DataError:
    """The refusal of a case of several images."""
    return DataError(
        f"{root}: expected one image for each case, found {len(files)} channels of {name!r} ({some(files)}); several "
        "volumes of one case are not read together: choose one channel and list its images in a MONAI datalist JSON."
    )


def some(names: list[str]) -> str:
    """The first few of some names, and how many more there are."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _file(root: Path, path: Path) -> _File:
    folder = IMAGES if root.name.lower() in IMAGE_FOLDERS else ""
    place: list[str] = []
    parts = list(path.relative_to(root).parts[:-1])
    while parts:
        part = parts.pop(0)
        if part.lower() == DERIVATIVES:
            folder = DERIVATIVES
            # The folder of the program that made them.
            if parts and not parts[0].startswith("sub-"):
                parts.pop(0)
        elif part.lower() in IMAGE_FOLDERS:
            folder = IMAGES
        elif part.lower() in LABEL_FOLDERS:
            folder = LABELS
        else:
            place.append(part)
    stem = image_stem(path) + ".seg" * path.name.lower().endswith(".seg.nrrd")
    stem = unicodedata.normalize("NFC", stem)
    return _File(path, unicodedata.normalize("NFC", "/".join(place)), folder, stem, label_keys(stem))


def _not_of_the_grid(file: _File) -> str | None:
    """Why a file of BIDS derivatives is not used as a label; None if it is."""
    if file.keys is None:
        return "among derivatives/, and not named as a label"
    space = BIDS_SPACE.search(file.stem)
    if space and space[1].lower() not in ("orig", "native", "individual", "t1w", "t2w", "flair", "bold"):
        return f"a label in the space {space[1]}, not on its image's own grid"
    return None


def _by_place(root: Path, images: list[_File], labels: list[_File]) -> dict[str, list[_File]]:
    """Images by their folder; a DICOM series also by its own, and one channel of nnU-Net by its case's name.

    Raises DataError for a case of several channels.
    """
    stems: dict[str, set[str]] = defaultdict(set)
    for label in labels:
        stems[label.place] |= {label.stem, *(label.keys or ())}
    at: dict[str, list[_File]] = defaultdict(list)
    channels: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for image in images:
        match = CHANNEL.fullmatch(image.stem)
        near = stems[image.place]
        if match and image.stem not in near and (image.path.parent.name in CHANNEL_FOLDERS or match[1] in near):
            channels[image.place, match[1]].append(image.path)
            image = replace(image, stem=match[1])
        at[image.place].append(image)
        if image.path.is_dir():
            inside = "/".join(part for part in (image.place, image.stem) if part) if image.path != root else ""
            if inside != image.place:
                at[inside].append(replace(image, stem=""))
    for (_, case), paths in channels.items():
        if len(paths) > 1:
            raise several_channels(root, case, [path.name for path in paths])
    return at


def _images_of(label: _File, at: dict[str, list[_File]]) -> tuple[int, list[Path]]:
    """The images that a label's name fits best, and how well."""
    near = at.get(label.place, [])
    whole = [image.path for image in near if image.stem == label.stem]
    if whole:
        return WHOLE, whole
    first = LABEL_FIRST.fullmatch(label.stem)
    keys = label.keys if label.keys is not None else ((first["rest"],) if first else ()) + (label.stem,)
    for key in filter(None, keys):
        for found in (
            [image.path for image in near if image.stem == key],
            [image.path for image in near if key in image.image_keys],
        ):
            if found:
                return KEY, found
    if label.keys and label.folder != LABELS:
        for key in filter(None, label.keys):
            begun = [image.path for image in near if re.match(rf"{re.escape(key)}{BREAK}(?!\d)", image.stem)]
            preferred = [path for path in begun if image_stem(path).endswith(BIDS_PREFERRED)]
            if len(begun) > 1 and key.startswith("sub-") and len(preferred) == 1:
                return BEGINNING, preferred
            if begun:
                return BEGINNING, begun
    if is_dicom(label.path) or (label.keys is not None and "" in label.keys):
        return ONLY, [image.path for image in near]
    return ONLY, []


def _have_one_name(image: Path, label: Path) -> bool:
    """Whether a label has its image's whole name, suffix included, but for a word such as "seg"."""
    stem, suffix = image_stem(label), label.name[len(image_stem(label)) :]
    names = {stem + suffix, *(key + suffix for key in label_keys(stem) or ())}
    return unicodedata.normalize("NFC", image.name) in {unicodedata.normalize("NFC", name) for name in names}


def _unclear(root: Path, unclear: list[tuple[list[Path], list[Path]]]) -> DataError:
    images, labels = unclear[0]
    more = f", and {len(unclear) - 1} more such cases" if len(unclear) > 1 else ""
    found = f"{_listed(root, images)} and the labels {_listed(root, labels)}, which fit equally well{more}"
    if len(labels) > 1:
        return DataError(
            f"{root}: expected one label for each image, found the image {found}; merge them into one class map, or "
            "list the right one in a MONAI datalist JSON."
        )
    example = f"{image_stem(images[0])}_seg{labels[0].name[len(image_stem(labels[0])) :]}"
    return DataError(
        f"{root}: expected one image for each label, found the images {found}; give the images different stems and "
        f"each label that of its image, as in {example}, or list the pairs in a MONAI datalist JSON."
    )


def _listed(root: Path, paths: list[Path]) -> str:
    return some([str(path.relative_to(root)) for path in paths])
