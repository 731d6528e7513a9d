"""`sam2sgp restore`: what a backup holds becomes the content of a studies folder and a state folder.

    FILE.tar ─ checked whole ─ unpacked next to where it belongs ─ put in place by renaming

In: a backup, the studies, the state folder, and no server at work on them. Out: both folders as the backup has them;
images that it doesn't hold stay where they are. Until everything lies unpacked on the right disk, nothing is changed
but two hidden folders, so a restore that fails or is killed leaves all as it was, and the next one clears up. Then what
goes where is written down (`switch.json`), and from there on there is only forward: a restore that is killed while it
renames is finished by the next one, and no server starts before that. What was replaced is kept next to it.
"""

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lib.admin.backup import ARCHIVE, ARCHIVE_FILES, ARCHIVE_FOLDERS, FOLDER
from lib.admin.backup_file import STATE, STUDIES, Manifest, checked, unpack
from lib.admin.command_line import parser_of, settings_of
from lib.layout import FILE as LAYOUT_FILE
from lib.settings import Settings
from lib.state_folder import LOCK, RESTORE, UNFINISHED, exclusive, make_private
from lib.stores.audit import Audit
from lib.stores.folder_index import INDEX, JOURNAL
from lib.stores.history import FOLDER as HISTORY
from sam2sgp.data.tree import DESCRIPTIONS
from sam2sgp.errors import ConfigError, DataError
from sam2sgp.files import sync_folder, write_text

# What a backup takes the place of, though it may hold none of it: stale, it would be taken for a part of it.
REPLACED = {
    STUDIES: ("labels", INDEX, JOURNAL, *DESCRIPTIONS, LAYOUT_FILE),
    STATE: ("weights", "audit.jsonl", "progress.jsonl", HISTORY, LAYOUT_FILE),
}
REPLACED_OF_ARCHIVE = tuple(f"{ARCHIVE}/{name}" for name in ("labels", *ARCHIVE_FOLDERS, *ARCHIVE_FILES, HISTORY))
NAMES_TOLD = 3


@dataclass(frozen=True)
class _Step:
    """A place in one of the two folders: what is there is kept elsewhere, then what is new takes its place.

    Attributes:
        new: unpacked, if the backup has anything for the place. place: where it belongs. kept: where what was there
            goes. replaces: whether there was anything.
    """

    new: Path
    place: Path
    kept: Path
    replaces: bool

    def make(self) -> None:
        """Do what is left of it, wherever it was interrupted."""
        if self.replaces and not _is_there(self.kept):
            _rename(self.place, self.kept)
        if _is_there(self.new):
            _rename(self.new, self.place)


def restore(words: Sequence[str], app_dir: Path) -> None:
    """Restore a backup, or finish a restore that was interrupted, and say what was done.

    Args:
        words: `FILE`, `--studies`, `--settings`, `--state-dir` (see `lib.admin.command_line`), `--overwrite`.
        app_dir: the app's folder.

    Raises:
        Sam2SgpError: the backup isn't whole, a server is at work, a folder isn't empty and `--overwrite` isn't given.
        OSError: a file can't be written.
    """
    parser = parser_of("restore")
    parser.add_argument("file", type=Path)
    parser.add_argument("--overwrite", action="store_true")
    given = parser.parse_args(words)
    settings = settings_of(given, app_dir)
    state = settings.state_dir
    is_new = not state.exists()
    make_private(state)
    with exclusive(state):
        unfinished = state / UNFINISHED
        if unfinished.exists():
            _finish(unfinished)
            print(f"{state}: the restore that was interrupted is finished; run it again for another backup.")
            return
        try:
            _restore(given.file, settings, given.overwrite)
        except BaseException:
            if is_new:
                # A restore that has begun to put files in place stays.
                if not unfinished.exists():
                    (state / LOCK).unlink(missing_ok=True)
                    with suppress(OSError):
                        state.rmdir()
            raise


def _restore(file: Path, settings: Settings, overwrite: bool) -> None:
    manifest = checked(file)
    targets = _targets(manifest, settings, file)
    _check_names(manifest, file)
    for target in targets.values():
        shutil.rmtree(target / RESTORE, ignore_errors=True)
    if not overwrite:
        for target in targets.values():
            _check_empty(target)
    made = [target for target in targets.values() if not target.exists()]
    with ExitStack() as undo:
        # Nothing stays of a restore that fails; what a killed one left goes with the next.
        for target in targets.values():
            if target in made:
                undo.callback(target.rmdir)
            (target / RESTORE).mkdir(parents=True)
            undo.callback(shutil.rmtree, target / RESTORE, ignore_errors=True)

        def place(name: str) -> Path:
            room, _, rest = name.partition("/")
            return targets[room] / RESTORE / "new" / rest

        unpack(file, place)
        steps = _steps(manifest, targets, settings.is_remote)
        unfinished = settings.state_dir / UNFINISHED
        folders = [str(target / RESTORE) for target in targets.values()]
        told = [[str(step.new), str(step.place), str(step.kept), step.replaces] for step in steps]
        about = {"backup": file.name, "made": manifest.made, "audit": str(settings.audit_file)}
        write_text(unfinished, json.dumps({**about, "steps": told, "folders": folders}))
        undo.pop_all()
    _finish(unfinished)
    print(f"{file}: {len(manifest.files)} files of {manifest.made} are restored")
    if STUDIES in targets:
        _tell_missing(targets[STUDIES])


def _tell_missing(studies: Path) -> None:
    index = json.loads((studies / INDEX).read_text(encoding="utf-8"))
    names = [image_id + entry["image"]["ext"] for image_id, entry in index["objects"].items()]
    if missing := [name for name in names if not (studies / name).exists()]:
        print(f"{len(missing)} images of the backup are not in {studies}, such as {missing[0]}: copy them there.")


def _targets(manifest: Manifest, settings: Settings, file: Path) -> dict[str, Path]:
    """The folder that each part of a backup belongs into."""
    kind = ARCHIVE if settings.is_remote else FOLDER
    if manifest.kind != kind:
        raise ConfigError(
            f"studies: expected those of a server on {'an archive' if manifest.kind == ARCHIVE else 'a folder'}, of "
            f"which {file} is a backup, found {settings.studies}; name the right ones."
        )
    return (
        {STATE: settings.state_dir}
        if settings.is_remote
        else {
            STATE: settings.state_dir,
            STUDIES: Path(settings.studies).resolve(),
        }
    )


def _check_names(manifest: Manifest, file: Path) -> None:
    """Raise DataError for a file that no backup has, such as code in the folder that the server starts from."""
    known = {STATE: (*REPLACED[STATE], *REPLACED_OF_ARCHIVE)} if manifest.kind == ARCHIVE else REPLACED
    for name in manifest.files:
        room, _, rest = name.partition("/")
        is_image = room == STUDIES and room in known and "/" not in rest and not rest.startswith(".")
        if not is_image and not any(_is_within(rest, place) for place in known.get(room, ())):
            raise DataError(f"{file}: expected a backup, found {ascii(name)[:80]}, which none has; take another one.")


def _check_empty(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir() if path.name != LOCK) if folder.exists() else []
    if names:
        raise DataError(
            f"{folder}: expected an empty folder to restore to, found {', '.join(names[:NAMES_TOLD])}"
            f"{' and more' if len(names) > NAMES_TOLD else ''}; choose another one, or give --overwrite: what is "
            "replaced is kept next to it."
        )


def _steps(manifest: Manifest, targets: dict[str, Path], is_remote: bool) -> list[_Step]:
    """What has to be renamed so that both folders are as the backup has them."""
    label = f"before-restore-{datetime.now(UTC):%Y%m%dT%H%M%S}"
    steps = []
    for room, target in targets.items():
        names = list(REPLACED[room])
        if room == STATE and is_remote:
            names += REPLACED_OF_ARCHIVE
        if room == STATE:
            # Copies of the index, which would stand in for it.
            names += [path.name for path in target.glob("index-*.json")]
        # Images, of which each is by itself.
        own = {name.partition("/")[2] for name in manifest.files if name.startswith(f"{room}/")}
        names += sorted(name for name in own if not any(_is_within(name, known) for known in names))
        # Hidden in the studies folder, where it would be told of as something that is no image.
        kept = target / (f".{label}" if room == STUDIES else label)
        for name in names:
            step = _Step(target / RESTORE / "new" / name, target / name, kept / name, _is_there(target / name))
            if step.replaces or _is_there(step.new):
                steps.append(step)
    return steps


def _is_within(name: str, known: str) -> bool:
    return name == known or name.startswith(f"{known}/")


def _finish(unfinished: Path) -> None:
    """Do what is written down, note it in the audit log, clear up, and say where that is which was replaced."""
    told: dict[str, Any] = json.loads(unfinished.read_text(encoding="utf-8"))
    steps = [_Step(Path(new), Path(place), Path(kept), replaces) for new, place, kept, replaces in told["steps"]]
    for step in steps:
        step.make()
    Audit(told["audit"]).write("restore", backup=told["backup"], made=told["made"])
    unfinished.unlink()
    sync_folder(unfinished.parent)
    for folder in told["folders"]:
        shutil.rmtree(folder, ignore_errors=True)
    for step in steps:
        if step.replaces:
            print(f"{step.place} was replaced; what was there is {step.kept}")


def _rename(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)
    sync_folder(target.parent)
    sync_folder(source.parent)


def _is_there(path: Path) -> bool:
    return path.is_symlink() or path.exists()
