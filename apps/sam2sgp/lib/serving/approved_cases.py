"""The support set of the app: the datastore's approved labels, and an optional folder of labelled pairs.

In: a datastore, in which labels come, change and go in any way: by requests, or as files copied into its folder. Out:
the list of cases that a `SupportBank` is brought in line with, and the names of their classes. Only labels with the tag
`final` are approved; all others are ignored.

For one thread at a time, but for `prepare` and `read_ahead`. `changed` costs two stats for each approved label, and if
it is to be certain for each pair of the seed folder too, so it may be asked before every request.
"""

import logging
import os
import re
import time
from collections.abc import Iterable
from typing import Any

from monailabel.interfaces.datastore import Datastore

from lib.checks import NotFound
from lib.settings import Settings
from lib.stamps import Stamp, stamp
from lib.stores.decisions import FINAL
from lib.stores.image_identity import is_of_another
from lib.stores.naming import declared, is_placeholder
from lib.stores.records import time_of
from sam2sgp.data import class_names, load_datalist, skipped_in
from sam2sgp.errors import DataError
from sam2sgp.files import TRUSTED_AGE

logger = logging.getLogger(__name__)

DECLARATIONS = ("dataset.json", "labels.json")
# What in a data folder its list of pairs depends on.
LISTINGS = (".", *DECLARATIONS, "images", "labels", "masks")
OF_ANOTHER = (
    "image {}: expected an approved label of this image, found one that was made of another image under this name; "
    "correct it on this one, or remove it."
)


class LabelledCases:
    """The labelled cases of a datastore and of `settings.support_dir`.

    Args:
        datastore: of images and labels.
        settings: the app's.

    Attributes:
        problem: why no cases of `support_dir` are used; None if nothing is wrong.
        left_out: approved labels that aren't of the image that is there, as of the last `cases`: dicts with `name`,
            `source` and `error`, as those of a `SupportBank`.
    """

    def __init__(self, datastore: Datastore, settings: Settings) -> None:
        self.datastore = datastore
        self.settings = settings
        self.pattern = re.compile(settings.value("patient_pattern"))
        self._seen: tuple | None = None
        self._settled = False
        self._declared: dict[int, str] = {}
        self._given: dict[int, str] = {}
        self._folders: tuple | None = None
        self._paths: dict[str, tuple[str, str]] = {}
        self.problem: str | None = None
        self.left_out: list[dict] = []
        self._seeds: list[dict] = []
        self._listing: tuple = ()
        self._listing_settled = False
        self._seeds_seen: tuple = ()
        self._refresh_seeds()

    def changed(self, certain: bool = True) -> bool:
        """Whether `cases` may give another list, or files of other content, than when it was called last.

        Args:
            certain: files of `support_dir` that were changed in place are noticed too, and what changed so lately that
                it may have changed again unseen counts as changed.
        """
        state = self._state(self._ids())
        if state != self._seen:
            return True
        return certain and (not self._settled or self.problem is not None or self._seed_files() != self._seeds_seen)

    def seeds(self) -> list[str]:
        """Names of the cases of `support_dir`, as of the last `cases`."""
        return [case["name"] for case in self._seeds]

    def prepare(self, wait: float | None = None) -> None:
        """Let approved labels come from an archive, for a moment, or for `wait` seconds at most; others come later.

        Not to be called under a lock that others wait for.
        """
        if self.settings.is_remote:
            self.datastore.prepare(*(() if wait is None else (wait,)))

    def read_ahead(self) -> None:
        """Read images that were touched since their labels were made, which may be large, so that `cases` needn't.

        Not to be called under a lock that others wait for.
        """
        if self.changed(certain=False):
            for image_id, (image, label) in self._pairs().items():
                if image:
                    is_of_another(self.datastore.get_label_info(image_id, FINAL), image, label)

    def images(self) -> dict[str, str]:
        """Ids of the labelled images of the datastore by their paths, as of the last `cases`."""
        return {image: image_id for image_id, (image, _) in self._paths.items()}

    def cases(self) -> list[dict]:
        """Dicts with `name` (the image's id), `image`, `label` (paths), `patient` and `group`, ordered by name."""
        started = time.time_ns()
        pairs = self._pairs()
        ids = list(pairs)
        # Before anything is read: what comes while it is being read is a change.
        self._paths = pairs
        self._folders = self._folder_times()
        self._seen = self._state(ids)
        paths = {}
        cases, infos, left_out = [], [], list[dict]()
        for image_id, (image, label) in pairs.items():
            try:
                info = self.datastore.get_image_info(image_id) if image else None
            except NotFound:
                info = None
            # Gone since it was listed.
            if info is None:
                continue
            paths[image_id] = image, label
            about = self.datastore.get_label_info(image_id, FINAL)
            if is_of_another(about, image, label):
                left_out.append({"name": image_id, "source": image, "error": OF_ANOTHER.format(image_id)})
                continue
            case = {"name": image_id, "image": image, "label": label, "patient": self.patient_of(image_id, info)}
            modality = info.get("Modality")
            more = {"modality": modality} if modality else {}
            cases.append({**case, "group": None, "named": sorted(_names_of([about])), **more})
            infos.append(about)
        if paths.keys() != pairs.keys():
            # What has gone is looked for again, for it may come back.
            self._paths = paths
            self._folders = self._folder_times()
            self._seen = self._state(ids)
        self.left_out = left_out
        self._refresh_seeds()
        self._given = _names_of(infos)
        self._declared = self._read_declared()
        self._seeds_seen = self._seed_files()
        folders, _, files = self._seen
        found = [*(entry for _, entry in folders), *(files or ()), *self._seeds_seen]
        self._settled = files is not None and _is_settled(found, started)
        return cases + self._seeds

    def patient_of(self, image_id: str, info: dict[str, Any] | None = None) -> str:
        """Whose image it is: by its DICOM tag, else by what `patient_pattern` finds in its id, else the id."""
        known = (info or {}).get("PatientID")
        if known and known != "UNK":
            return str(known)
        match = self.pattern.search(image_id)
        return match[0] if match and match[0] else image_id

    def declared(self) -> dict[int, str]:
        """Names that every label has to keep to, by value; {} where nothing is declared for the folders.

        Names given together with labels add to them.
        """
        return {**self._given, **self._declared} if self._declared else {}

    def names(self, values: Iterable[int]) -> dict[int, str]:
        """A distinct name for each value: as declared, else as given with a label, else `class_<value>`."""
        names: dict[int, str] = {}
        for value in sorted(values):
            name = self._declared.get(value) or self._given.get(value) or f"class_{value}"
            names[value] = f"{name} ({value})" if name in names.values() else name
        return names

    def _ids(self) -> list[str]:
        """Ids of the labelled images that can be used now: an archive's are, when their files have been fetched."""
        return list(self.datastore.pairs_at_hand() if self.settings.is_remote else self.datastore.get_labeled_images())

    def _pairs(self) -> dict[str, tuple[str, str]]:
        """Paths of image and label of each of them, ordered by id; "" for what has gone. Nothing is fetched."""
        if self.settings.is_remote:
            return dict(sorted(self.datastore.pairs_at_hand().items()))
        pairs = {}
        for image_id in sorted(self.datastore.get_labeled_images()):
            label_id = self.datastore.get_label_by_image_id(image_id, FINAL)
            label = self.datastore.get_label_uri(label_id, FINAL) if label_id else ""
            image = self.datastore.get_image_uri(image_id) if label else ""
            pairs[image_id] = image, label
        return pairs

    def _refresh_seeds(self) -> None:
        """List the pairs of `support_dir` again, unless nothing came or went there since the last time."""
        listing, started = self._seed_listing(), time.time_ns()
        gone = None in self._seed_files()
        if listing == self._listing and self._listing_settled and self.problem is None and not gone:
            return
        self._listing, self._listing_settled = listing, _is_settled(listing, started)
        folder, problem = self.settings.support_dir, self.problem
        self._seeds, self.problem = [], None
        if folder is None:
            return
        try:
            seeds = load_datalist(folder, patient_pattern=self.settings.value("patient_pattern"))
            skipped_in(seeds)
            # They are in one group with the datastore's labels: queries are guided only by their own group where it has
            # items.
            self._seeds = [{**case, "name": f"{folder.name}/{case['name']}", "group": None} for case in seeds]
        except DataError as error:
            self.problem = f"support_dir is not used: {error}"
            if self.problem != problem:
                logger.error("%s", self.problem)

    def _seed_listing(self) -> tuple[Stamp | None, ...]:
        """Stamps of what the list of pairs in `support_dir` depends on."""
        root = self.settings.support_dir
        if root is None:
            return ()
        # For a datalist file, names are declared next to it.
        paths = (
            [root / name for name in LISTINGS] if root.is_dir() else [root, *(root.parent / n for n in DECLARATIONS)]
        )
        return tuple(stamp(path) for path in paths)

    def _seed_files(self) -> tuple[Stamp | None, ...]:
        return tuple(stamp(case[key]) for case in self._seeds for key in ("image", "label"))

    def _read_declared(self) -> dict[int, str]:
        declared = class_names(self.settings.support_dir) if self.settings.support_dir else {}
        return {**declared, **({} if self.settings.is_remote else self.datastore.declared_names())}

    def _state(self, ids: list[str]) -> tuple:
        """What tells a change: ids, the folders' times, and time and size of each file."""
        folders = self._folder_times()
        if folders != self._folders or set(ids) != self._paths.keys():
            return folders, tuple(sorted(ids)), None
        files = tuple(stamp(path) for pair in self._paths.values() for path in pair)
        return folders, tuple(sorted(ids)), files + self._seed_listing()

    def _folder_times(self) -> tuple[tuple[str, Stamp | None], ...]:
        """A file of another kind under the same id changes the folder that it is in."""
        folders = {os.path.dirname(path) for pair in self._paths.values() for path in pair}
        paths = sorted(folders)
        if not self.settings.is_remote:
            paths += [os.path.join(self.settings.studies, name) for name in DECLARATIONS]
        return tuple((path, stamp(path)) for path in paths)


def _is_settled(stamps: Iterable[Stamp | None], now: int) -> bool:
    """Whether all times are old enough to change if their files do."""
    return not any(entry and 0 <= now - entry[0] < TRUSTED_AGE for entry in stamps)


def _names_of(infos: list[dict[str, Any]]) -> dict[int, str]:
    """Class names that clients sent with labels, as `label_info`; of several for one value the newest counts.

    That a class has no name yet (`class_2`) is no name.
    """
    names: dict[int, str] = {}
    for info in sorted(infos, key=time_of):
        names |= {value: name for value, name in declared(info).items() if not is_placeholder(name, value)}
    return names
