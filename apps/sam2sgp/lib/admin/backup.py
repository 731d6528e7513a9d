"""`sam2sgp backup`: labels, what is known about them, and the app's state, in one file, while the server serves.

    studies folder ── each image's labels and index entry, while the image's lock is held ─┐
    state folder ──── earlier states of labels, weights in use and published, logs ────────┴─ FILE.tar

In: the studies, the state folder of their server, the path of the file. Out: the file, which is there only when it is
whole (`lib.admin.backup_file`). Decisions about an image wait while its labels are copied, others go on. A label and
what is known about it are of one moment; labels of two images may be of different ones. The weights in use are among
those that are saved, and no label is saved without its line of the audit log: the log comes last.

Of an archive of DICOM, what lies there is not copied: its approved labels are its own. The predictions and removals in
the state folder are, and so are earlier states of labels.
"""

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lib.admin.backup_file import MANIFEST, STATE, STUDIES, BackupWriter, writing
from lib.admin.command_line import check_state, parser_of, settings_of
from lib.checks import NotFound, supported_suffix
from lib.layout import FILE as LAYOUT_FILE
from lib.layout import check_layout
from lib.serving.published_weights import ACTIVE_FILE, Weights
from lib.settings import Settings
from lib.stores.decisions import FINAL, ImageLocks
from lib.stores.folder_index import INDEX
from lib.stores.history import FOLDER as HISTORY
from lib.stores.history import History
from lib.stores.kept_labels import SERIES_NOTES
from lib.stores.opening import open_datastore
from sam2sgp.data.tree import DESCRIPTIONS
from sam2sgp.errors import ConfigError

FOLDER, ARCHIVE = "folder", "archive"
# What an archive's work folder holds: UIDs that are not used any more, and notes of viewers, one file for each series;
# values of class names.
ARCHIVE_FOLDERS, ARCHIVE_FILES = ("removed", SERIES_NOTES), ("classes.json",)


def backup(words: Sequence[str], app_dir: Path) -> None:
    """Make a backup and say what is in it.

    Args:
        words: `--studies`, `--settings`, `--state-dir` (see `lib.admin.command_line`), `--output FILE`, `--images`.
        app_dir: the app's folder.

    Raises:
        Sam2SgpError: there is no such server, an image is locked for too long, the file would be part of itself.
        OSError: a file can't be read or written.
    """
    parser = parser_of("backup")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--images", action="store_true")
    given = parser.parse_args(words)
    settings = settings_of(given, app_dir)
    output = given.output.absolute()
    _check(settings, output)
    for folder in (settings.state_dir, *settings.studies_folders):
        check_layout(folder)
    with writing(output, ARCHIVE if settings.is_remote else FOLDER) as writer:
        if settings.is_remote:
            _add_archive(writer, settings)
        else:
            _add_studies(writer, settings, given.images)
        for room, folder in ((STATE, settings.state_dir), *((STUDIES, folder) for folder in settings.studies_folders)):
            _add_all(writer, [(f"{room}/{LAYOUT_FILE}", folder / LAYOUT_FILE)])
        _add_history(writer, settings)
        _add_weights(writer, settings)
        for log in (settings.progress_file, settings.audit_file):
            _add_log(writer, log)
    sizes = [size for name, (size, _) in writer.files.items() if name != MANIFEST]
    print(f"{output}: {len(sizes)} files, {sum(sizes) / 1e6:.2f} MB")


def _check(settings: Settings, output: Path) -> None:
    check_state(settings)
    studies = settings.studies_folders
    if studies and not studies[0].is_dir():
        raise ConfigError(f"studies: expected a folder of images, found no folder {studies[0]}; correct its path.")
    folders = [settings.state_dir, *studies]
    inside = next((folder for folder in folders if output.resolve().is_relative_to(folder.resolve())), None)
    if inside:
        raise ConfigError(f"output: expected a file outside of what is saved, found one in {inside}; choose another.")


def _add_studies(writer: BackupWriter, settings: Settings, images: bool) -> None:
    store: Any = open_datastore(settings)
    objects: dict[str, Any] = {}
    for image_id in store.list_images():
        with suppress(NotFound), store.deciding(image_id):
            objects[image_id] = _entry(writer, store, image_id, images)
    index = {"name": store.name(), "description": store.description(), "objects": objects}
    writer.add_bytes(f"{STUDIES}/{INDEX}", json.dumps(index, ensure_ascii=False).encode("utf-8", "backslashreplace"))
    _add_all(writer, ((f"{STUDIES}/{name}", Path(settings.studies, name)) for name in DESCRIPTIONS))


def _entry(writer: BackupWriter, store: Any, image_id: str, images: bool) -> dict[str, Any]:
    """The entry of an image in the index, whose labels are added. Raises NotFound if the image has gone."""
    image = Path(store.get_image_uri(image_id))
    about = {key: value for key, value in store.get_image_info(image_id).items() if key != "path"}
    entry: dict[str, Any] = {"image": {"ext": image.name[len(image_id) :], "info": about}, "labels": {}}
    if images:
        _add_all(writer, [(f"{STUDIES}/{image.name}", image)])
    for tag in store.get_labels_by_image_id(image_id):
        path = store.get_label_uri(image_id, tag)
        if path:
            suffix = supported_suffix(path)
            # Somebody may delete it by hand meanwhile.
            with suppress(FileNotFoundError):
                writer.add(f"{STUDIES}/labels/{tag}/{image_id}{suffix}", Path(path))
                entry["labels"][tag] = {"ext": suffix, "info": store.get_label_info(image_id, tag)}
    return entry


def _add_archive(writer: BackupWriter, settings: Settings) -> None:
    folder = settings.state_dir / ARCHIVE
    locks = ImageLocks(folder / "locks")
    for tag in _folders(folder / "labels"):
        if tag.name != FINAL:
            for label in sorted(tag.glob("*.nii.gz")):
                series = label.name.removesuffix(".nii.gz")
                with locks.hold(series):
                    files = (label, label.with_name(f"{series}.json"))
                    _add_all(writer, ((f"{STATE}/{ARCHIVE}/labels/{tag.name}/{file.name}", file) for file in files))
    for name in ARCHIVE_FOLDERS:
        found = sorted((folder / name).glob("*.json"))
        _add_all(writer, ((f"{STATE}/{ARCHIVE}/{name}/{file.name}", file) for file in found))
    _add_all(writer, ((f"{STATE}/{ARCHIVE}/{name}", folder / name) for name in ARCHIVE_FILES))


def _add_history(writer: BackupWriter, settings: Settings) -> None:
    place = f"{ARCHIVE}/{HISTORY}" if settings.is_remote else HISTORY
    for label, notes in History(settings.state_dir / place).files():
        # States never change, but the oldest ones go; one without its notes is none.
        with suppress(FileNotFoundError):
            for file in (label, notes):
                writer.add(f"{STATE}/{place}/{file.parent.name}/{file.name}", file)


def _add_weights(writer: BackupWriter, settings: Settings) -> None:
    folder = settings.state_dir / "weights"
    # Which are in use comes first: versions never change, and none is published or put in use before it is there.
    _add_all(writer, [(f"{STATE}/weights/{ACTIVE_FILE}", folder / ACTIVE_FILE)])
    for version in Weights(folder, settings.start_weights).versions()[1:]:
        for file in sorted(version.path.parent.iterdir()):
            writer.add(f"{STATE}/weights/{version.name}/{file.name}", file)


def _add_log(writer: BackupWriter, path: Path) -> None:
    with suppress(FileNotFoundError):
        # A line that is being written has no end yet.
        whole = 0
        with open(path, "rb") as file:
            for line in file:
                whole += len(line) if line.endswith(b"\n") else 0
        writer.add(f"{STATE}/{path.name}", path, whole)


def _add_all(writer: BackupWriter, files: Iterable[tuple[str, Path]]) -> None:
    """Those that are there."""
    for name, path in files:
        with suppress(FileNotFoundError):
            writer.add(name, path)


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
