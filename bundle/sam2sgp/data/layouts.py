"""What a data folder may look like, and what to do about one that holds no pair of image and label."""

from collections import Counter, defaultdict
from pathlib import Path

from sam2sgp.data.io import image_stem
from sam2sgp.data.pairing import some
from sam2sgp.errors import DataError

LAYOUTS = (
    "a folder with dataset.json (Medical Segmentation Decathlon, nnU-Net), a folder with images/ and labels/ (or "
    "masks/) whose files have equal stems, images and labels side by side (a.png and a_seg.png, or one folder a case), "
    "or a MONAI datalist JSON file"
)


def without_pairs(root: Path, images: list[Path], labels: list[Path], lacks: str = "") -> DataError:
    """The refusal of a folder without a pair of image and label: what was seen, and the nearest layout."""
    if not images and not labels:
        return DataError(f"{root}: expected {LAYOUTS}, found {contents(root)}{lacks}; arrange the folder like these.")
    seen = f"{counted(root, images, 'image')} and {counted(root, labels, 'label') if labels else 'no label'}"
    return DataError(f"{root}: expected {LAYOUTS}, found {seen}{lacks}. {nearest(root, images, labels)}")


def nearest(root: Path, images: list[Path], labels: list[Path]) -> str:
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


def counted(root: Path, paths: list[Path], noun: str) -> str:
    """How many files there are, and the names of some."""
    names = some([str(path.relative_to(root)) for path in paths]) if paths else ""
    return f"{len(paths)} {noun}{'s' * (len(paths) != 1)}" + f" ({names})" * bool(paths)


def lacks(content: dict) -> str:
    """What a dataset.json that describes no images has instead."""
    if not content:
        return ""
    return (
        f" (dataset.json has {some(sorted(map(repr, content)))}, but neither lists of images such as 'training' nor "
        "an imagesTr/ or images/ folder beside it)"
    )


def contents(folder: Path) -> str:
    """What is directly in a folder, in a few words."""
    if not folder.is_dir():
        return "a file"
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("."))
    return some(names) if names else "an empty folder"
