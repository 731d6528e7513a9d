"""The images of a folder and its subfolders, and the reason for each file that is none.

Only names, the first bytes and DICOM headers are read here.
"""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pydicom

from sam2sgp.data.io import data_files, dicom_files, is_dicom, is_dicom_seg, is_image, without_pixels
from sam2sgp.errors import DataError

# What a data folder or a folder of results says of itself.
DESCRIPTIONS = {"dataset.json", "labels.json", "labels.txt", "labels.ctbl"}
SYSTEM_FILES = {
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "system volume information", "$recycle.bin"),
    *("#recycle", "@eadir", "lost+found"),
}
# Start of the name of a file that an office program has open.
OPENED = "~$"
# Suffixes of images in formats that are not read.
UNREAD_SUFFIXES = (
    *(".npz", ".npy", ".mat", ".h5", ".hdf5", ".zarr", ".gif", ".webp", ".heic", ".jp2", ".j2k", ".jpx", ".avif"),
    *(".ppm", ".pgm", ".svs", ".ndpi", ".czi", ".lif", ".vsi", ".mgz", ".mgh", ".mnc", ".par", ".rec", ".gipl"),
    *(".hdr", ".raw", ".zraw", ".vtk", ".zip", ".tar", ".tar.gz", ".7z", ".rar", ".pdf", ".svg", ".mp4", ".avi"),
)
SERIES_TAGS = ["SeriesInstanceUID", "SeriesDescription", "ImagePositionPatient"]


@dataclass(frozen=True)
class Skipped:
    """A file or folder that was found among images or labels and is not used, and why.

    Attributes:
        path: of the file or folder.
        why: in a few words, without a full stop.
        used_elsewhere: whether it is told even where another list uses the file.
    """

    path: Path
    why: str
    used_elsewhere: bool = False


@dataclass
class Tree:
    """What a folder and its subfolders hold, by name.

    Attributes:
        images: image files and DICOM series folders, labels among them.
        segmentations: DICOM segmentations.
        skipped: everything else.
    """

    images: list[Path] = field(default_factory=list)
    segmentations: list[Path] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


def read_tree(folder: Path) -> Tree:
    """What a folder and its subfolders hold; the folder itself is the one image if it is one DICOM series.

    Raises:
        DataError: it holds several DICOM series of which one has several slices: no file there is an image by itself.
    """
    tree = Tree()
    hidden: list[Path] = []
    _walk(folder, tree, hidden, set())
    skip_hidden(hidden, tree.skipped)
    for found in (tree.images, tree.segmentations):
        found.sort(key=lambda path: (path.name, str(path)))
    return tree


def is_hidden(path: Path) -> bool:
    return path.name.startswith((".", OPENED)) or path.name.lower() in SYSTEM_FILES


def skip_hidden(hidden: list[Path], skipped: list[Skipped]) -> None:
    """Put one entry for all hidden files on `skipped`."""
    if hidden:
        more = f", and {len(hidden) - 1} more" if len(hidden) > 1 else ""
        skipped.append(Skipped(hidden[0], f"a hidden or system file{more}"))


def file_not_used(path: Path) -> str:
    """Why a file among images is not used."""
    if path.name.upper() == "DICOMDIR":
        return "an index of DICOM files, not an image"
    if not path.exists():
        return "a link to nothing"
    if not path.is_file():
        return "neither a file nor a folder"
    if path.stat().st_size == 0:
        return "an empty file"
    kind = without_pixels(path) if is_dicom(path) else None
    if kind is not None:
        return f"a DICOM object without pixels ({kind})"
    suffix = next((suffix for suffix in UNREAD_SUFFIXES if path.name.lower().endswith(suffix)), None)
    if suffix is not None:
        return f"{suffix} files are not read; convert it to NIfTI, NRRD, MetaImage, DICOM, PNG or TIFF"
    return f"not an image ({path.suffix or 'a name without an ending'})"


def _walk(folder: Path, tree: Tree, hidden: list[Path], above: set[str]) -> None:
    real = os.path.realpath(folder)
    if real in above:
        tree.skipped.append(Skipped(folder, "a link to a folder that it lies in"))
        return
    entries = sorted(folder.iterdir(), key=lambda path: path.name)
    files = dicom_files(folder)
    series = _series_of(files)
    if not above and len(series) > 1 and max(series.values()) > 1:
        listed = "; ".join(f"{name}: {count} files" for name, count in sorted(series.items()))
        raise DataError(
            f"{folder}: expected one DICOM series, found {len(series)}: {listed}; put each in a folder of its own."
        )
    slices = set(files) if _is_series(series, entries) else set()
    if slices:
        tree.images.append(folder)
    data = {part for path in entries if path.is_file() for part in data_files(path)}
    for path in entries:
        if is_hidden(path):
            hidden.append(path)
        elif path.is_dir():
            if _holds_results(path):
                tree.skipped.append(Skipped(path, "results of an earlier run"))
            else:
                _walk(path, tree, hidden, above | {real})
        elif not path.is_file():
            tree.skipped.append(Skipped(path, file_not_used(path)))
        elif path in slices or path in data or (path.name in DESCRIPTIONS and not above):
            continue
        elif is_image(path) and is_dicom(path) and is_dicom_seg(path):
            tree.segmentations.append(path)
        elif is_image(path):
            tree.images.append(path)
        else:
            tree.skipped.append(Skipped(path, file_not_used(path)))
    if not entries:
        tree.skipped.append(Skipped(folder, "an empty folder"))


def _holds_results(path: Path) -> bool:
    """Whether a folder among images was written by a run."""
    return (path / "records").is_dir() and any((path / name).is_file() for name in ("summary.csv", "metrics.csv"))


def _is_series(series: Counter, entries: list[Path]) -> bool:
    """Whether the DICOM files of a folder are slices, so that the folder is an image.

    Files of several series are too: reading the folder says which.
    """
    if len(series) == 1 and max(series.values()) == 1:
        return len([path for path in entries if path.is_file() and is_image(path)]) == 1
    return bool(series) and max(series.values()) > 1


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
