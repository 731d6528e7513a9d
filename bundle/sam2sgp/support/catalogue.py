"""Which items labelled cases have: cases in, support items out.

    cases ─ hash of the content ─ known? else prepare ─ listing: slices and classes ─ items, whose pixels are read late

What preprocessing makes of an item depends on the item's content and on the preprocessing. With a store it is on disk
(`sam2sgp.support.tensor_store`), and of each item only its `ItemInfo` are held. Without one everything is held in
memory.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from sam2sgp.data.classes import check_label_values, complete_class_names
from sam2sgp.data.coding import LabelCoding
from sam2sgp.data.odd_values import CountedLabel, odd_values
from sam2sgp.errors import DataError, cause_of
from sam2sgp.progress import Bar
from sam2sgp.support.content import ATTEMPTS, FileHashes, digest_of, settings_fingerprint
from sam2sgp.support.items import MAX_VALUE, CaseListing, Prepared, SupportItem, prepare_items
from sam2sgp.support.tensor_store import TensorStore, checksum
from sam2sgp.support.turned import AS_STORED, how_turned
from sam2sgp.transforms.acquired import Acquired, mixed_units
from sam2sgp.transforms.scaling import Scaling, SupportScaling, agreed, is_open, log_scalings, scaling_hint

logger = logging.getLogger(__name__)

# Part of the keys of what is prepared and encoded: counted up when that changes by the code.
VERSION = 10
# Cases without any class are kept up to this number, which is enough for `sam2sgp.inferers.object_gate`.
MAX_EMPTY = 32
CASE = "case"
CASES_PER_LOOKUP = 256


@dataclass(frozen=True)
class Found:
    """What a list of cases has.

    items: the support items. class_names: by value, of all values found. errors: cases left out, dicts with `name`,
    `source` (path of the image) and `error`. contents: of all items, those over the limit too. scalings: name and group
    of each case, and how it was scaled. slice_axes: group of each volume, and the axis along which it is sliced.
    acquired: group of each case, and what its DICOM header says.
    warnings: sentences on what may be wrong with cases that are used, or with all of them together.
    """

    items: list[SupportItem]
    class_names: dict[int, str]
    errors: list[dict]
    contents: set[str]
    scalings: list[tuple[str, str, Scaling]]
    slice_axes: list[tuple[str, int]]
    acquired: list[tuple[str, Acquired]]
    warnings: list[str]

    def scaling(self, group: str | None = None) -> SupportScaling:
        """How the cases are scaled; where there are some of `group`, these."""
        of_group = [scaling for _, of, scaling in self.scalings if of == group]
        return SupportScaling.of(of_group or [scaling for *_, scaling in self.scalings])

    def sliced_along(self, group: str | None = None) -> set[int]:
        """The axes along which the volumes are sliced; where there are some of `group`, these."""
        of_group = {axis for of, axis in self.slice_axes if of == group}
        return of_group or {axis for _, axis in self.slice_axes}

    def acquisitions(self, group: str | None = None) -> list[Acquired]:
        """What DICOM headers say of the cases; where there are some of `group`, of these."""
        of_group = [acquired for of, acquired in self.acquired if of == group]
        return of_group or [acquired for _, acquired in self.acquired]

    def log_scalings(self) -> None:
        """Tell how the cases are scaled."""
        log_scalings(logger, "Support set", [name for name, *_ in self.scalings], [s for *_, s in self.scalings])


@dataclass(frozen=True)
class _Listed:
    """A case, the hash of its content, and what it has."""

    case: dict
    digest: str
    listing: CaseListing


@dataclass(frozen=True)
class _LeftOut:
    """A case that can't be used, and why."""

    case: dict
    error: str


@dataclass(frozen=True)
class ItemRules:
    """Which items the cases give, and whether some cases may be left out, or all."""

    slices_per_class: int = 5
    """Slices taken from each volume for each class."""

    max_items: int | None = None
    """Keep at most this many items of cases that hold a class, in an order drawn with `seed`; None keeps all. A volume
    comes with all its items, of which `sam2sgp.inferers.object_gate` learns, so the items may be those of few volumes;
    cases beyond the limit are not read."""

    seed: int = 0
    """Of that choice."""

    skip_errors: bool = False
    """Leave out cases that can't be used, and tell of them; otherwise the first one raises."""

    allow_empty: bool = False
    """No items at all are fine."""


class Catalogue:
    """Items of cases. What is unchanged is not read again.

    Args:
        transform: preprocessing of a case (image and label).
        store: where prepared items and what is known of cases are kept; None: in memory.
        declared: names of classes by value.
        rules: which items cases have.
        progress: show a bar.

    Attributes:
        settings: hash of the preprocessing.
    """

    def __init__(
        self,
        transform: Callable,
        store: TensorStore | None,
        declared: dict[int, str],
        rules: ItemRules,
        progress: bool,
    ) -> None:
        self.transform = transform
        self.store = store
        self.declared = declared
        self.rules = rules
        self.progress = progress
        self.settings = settings_fingerprint(transform, VERSION)
        self._hashes = FileHashes(store)
        self._listings: dict[str, CaseListing] = {}
        self._failed: dict[str, str] = {}
        self._told: set[str] = set()
        # Without a store, pixels by the item's content.
        self._pixels: dict[str, Prepared] = {}

    def read(self, data: list[dict]) -> Found:
        """The items of cases.

        Raises:
            DataError: there is no labelled image, or none with an object; a label has an undeclared value. What was
                known before stays.
        """
        found: list[_Listed] = []
        errors: list[dict] = []
        values: set[int] = set()
        count = 0
        cases = data
        if self.rules.max_items:
            cases = [data[i] for i in np.random.default_rng(self.rules.seed).permutation(len(data))]
        coding = LabelCoding(self.declared)
        bar = Bar(total=len(data), desc="Reading the support set", unit="case", disable=not self.progress)
        with bar:
            for entry in self._listed(cases, coding):
                bar.update()
                if isinstance(entry, _LeftOut):
                    errors.append({"name": entry.case["name"], "source": _source(entry.case), "error": entry.error})
                    continue
                found.append(entry)
                if any(info.holds for info in entry.listing.items):
                    count += len(entry.listing.items)
                values |= {value for value in entry.listing.values if value}
                if self.rules.max_items and count >= self.rules.max_items:
                    break
        found = self._agreed_on_scaling(found)
        items = [item for entry in found for item in self._items(entry)]
        contents = {item.content for item in items}
        items = _limited(items, self.rules.max_items)
        if not items and not self.rules.allow_empty:
            where = Path(data[0]["label"]).parent if data else "the support set"
            raise DataError(
                f"{where}: expected labelled images with at least one object, found {len(data)} without any; add pairs "
                "whose label is not empty."
            )
        self._listings = {entry.digest: entry.listing for entry in found}
        self._pixels = {content: pixels for content, pixels in self._pixels.items() if content in contents}
        scalings = [(entry.case["name"], entry.case["group"], entry.listing.scaling) for entry in found]
        axes = [(entry.case["group"], axis) for entry in found if (axis := entry.listing.slice_axis) is not None]
        acquired = [(entry.case["group"], entry.listing.acquired) for entry in found]
        told = [*_turned(found), *_odd_values(found, coding.named), *_mixed_units(found), *_warnings(found)]
        for sentence in told:
            if sentence not in self._told:
                logger.warning("%s", sentence)
        self._told = set(told)
        of_scaling = [f"{name}: {sentence}" for name, _, scaling in scalings for sentence in scaling.warnings]
        warnings = [*told, *coding.warnings, *of_scaling]
        names = complete_class_names(self.declared, values)
        return Found(items, names, errors, contents, scalings, axes, acquired, warnings)

    def thumbnail(self, content: str) -> Tensor | None:
        """The thumbnail (H, W, 3) uint8 of the item with this content, if it is at hand.

        Any thread may ask for it while another one uses the bank.
        """
        if self.store is None:
            prepared = self._pixels.get(content)
            return None if prepared is None else prepared.drawn()
        tensors = self.store.peek(self._prepared_name(content))
        return None if tensors is None else tensors["thumbnail"]

    def _agreed_on_scaling(self, found: list[_Listed]) -> list[_Listed]:
        """The same cases, of which those whose scaling is open follow the others of their group."""
        by_group = defaultdict(list)
        for entry in found:
            by_group[entry.case["group"]].append(entry.listing.scaling)
        common = {group: agreed(scalings) for group, scalings in by_group.items()}
        result = list(found)
        for number, entry in enumerate(found):
            scaling = common[entry.case["group"]]
            if is_open(entry.listing.scaling) and scaling:
                (followed,) = self._listed([entry.case | {"support_scaling": scaling}], LabelCoding(self.declared))
                if isinstance(followed, _Listed):
                    result[number] = followed
        return result

    def _listed(self, cases: list[dict], coding: LabelCoding) -> Iterator["_Listed | _LeftOut"]:
        """Each case with what it has, or with what is wrong with it; `coding` has seen the others of the set."""
        new: dict[str, bytes] = {}
        try:
            # With a limit, few cases may be enough: each is hashed when it is looked up.
            step = CASES_PER_LOOKUP if self.rules.max_items is None else 1
            for start in range(0, len(cases), step):
                block = cases[start : start + step]
                self._hashes.prefetch(block)
                digests = [self._digest(case) for case in block]
                known = self._known(digests)
                for case, digest in zip(block, digests, strict=True):
                    entry: _Listed | _LeftOut
                    try:
                        if isinstance(digest, DataError):
                            raise digest
                        entry = self._list(case, digest, known, new)
                        check_label_values(case["label"], entry.listing.values, self.declared)
                        coding.check(case["label"], entry.listing.values)
                    except Exception as raised:  # whatever a reader raises for one file must not end the others
                        cause = cause_of(raised)
                        if not self.rules.skip_errors:
                            raise cause from None
                        entry = _LeftOut(case, str(cause))
                    yield entry
                self._commit(new)
        finally:
            self._commit(new)

    def _digest(self, case: dict) -> str | DataError | None:
        """Hash of a case's content, or why there is none; None where the case has no files."""
        try:
            return self._hashes.of_case(case)
        except DataError as error:
            return error

    def _known(self, digests: list) -> dict[str, CaseListing]:
        """Listings from the folder by the hash of a case's content; without those at hand."""
        if self.store is None:
            return {}
        keys = {self._listing_key(d): d for d in digests if isinstance(d, str) and d not in self._listings}
        return {keys[key]: CaseListing.of_json(value) for key, value in self.store.metadata(CASE, keys).items()}

    def _list(self, case: dict, digest: str | None, known: dict[str, CaseListing], new: dict[str, bytes]) -> _Listed:
        """What a case has, which is prepared if that is not known of its content."""
        if digest is not None:
            if digest in self._failed:
                raise DataError(self._failed[digest])
            listing = self._listings.get(digest) or known.get(digest)
            if listing is not None:
                return _Listed(case, digest, listing)
        try:
            found = _Listed(case, *self._prepare(case))
        except Exception as error:
            # The same content fails again: only a changed file is worth reading again.
            if digest is not None and isinstance(cause := cause_of(error), DataError):
                self._failed[digest] = str(cause)
            raise
        if self.store is not None:
            new[self._listing_key(found.digest)] = found.listing.to_json()
        return found

    def _listing_key(self, digest: str) -> str:
        return digest_of(digest, self.settings, self.rules.slices_per_class)

    def _commit(self, new: dict[str, bytes]) -> None:
        self._hashes.flush()
        if self.store is not None:
            self.store.add_metadata(CASE, new)
        new.clear()

    def _prepare(self, case: dict) -> tuple[str, CaseListing]:
        """Preprocess a case and keep its items. Returns the hash of its content, and what it has."""
        for _ in range(ATTEMPTS):
            digest = self._hashes.of_case(case)
            prepared = self.transform(case)
            # Otherwise what was read may be newer than the hash.
            if self._hashes.of_case(case) == digest:
                break
        else:
            raise DataError(
                f"{case['label']}: expected a finished case, found that its files change while they are read; try "
                "again later."
            )
        if digest is None:
            named = {key: prepared[key] for key in ("image", "label", "image_full", "label_full")}
            digest = digest_of(checksum(named), prepared["geometry"].spacing, case.get("modality"), scaling_hint(case))
        if prepared["label"].max() > MAX_VALUE:
            raise DataError(
                f"{case['label']}: expected class values up to {MAX_VALUE}, found {int(prepared['label'].max())}; "
                "number the classes again."
            )
        listing, items = prepare_items(prepared, self.rules.slices_per_class)
        for info, item in zip(listing.items, items, strict=True):
            content = digest_of(digest, info.slice)
            if self.store is None:
                self._pixels[content] = item
            else:
                self.store.write(self._prepared_name(content), item.tensors())
        return digest, listing

    def _items(self, entry: _Listed) -> list[SupportItem]:
        items = []
        case = entry.case
        for info in entry.listing.items:
            content = digest_of(entry.digest, info.slice)
            if self.store is None:
                load = partial(_itself, self._pixels[content])
            else:
                load = partial(self._load, self.store, content, case)
            items.append(
                SupportItem(
                    id=case["name"] if info.slice is None else f"{case['name']}#{info.slice}",
                    content=content,
                    source=_source(case),
                    patient=case["patient"],
                    group=case["group"],
                    case=case,
                    info=info,
                    main_shares=entry.listing.main_shares,
                    edge_fit=entry.listing.fits.get(AS_STORED),
                    load=load,
                )
            )
        return items

    def _prepared_name(self, content: str) -> str:
        return f"prepared/{self.settings}/{content}"

    def _load(self, store: TensorStore, content: str, case: dict) -> Prepared:
        """Pixels of an item from the store, or else from the case's files."""
        name = self._prepared_name(content)
        tensors = store.read(name)
        if tensors is None:
            self._prepare(case)
            tensors = store.read(name)
        if tensors is None:
            raise DataError(
                f"{case['label']}: expected the label that the support set was built from, found another one; call "
                "`reconcile` with the present cases."
            )
        return Prepared.of_tensors(tensors)


def _limited(items: list[SupportItem], most: int | None) -> list[SupportItem]:
    """The first items of cases that hold a class, at most so many; behind them those of cases that hold none, which
    guide nothing, and so are of use only beside others."""
    holding = {item.source for item in items if item.info.holds}
    guiding = [item for item in items if item.source in holding][: most or None]
    if not guiding:
        return []
    empty = [item for item in items if item.source not in holding]
    kept = set(list(dict.fromkeys(item.source for item in empty))[:MAX_EMPTY])
    return guiding + [item for item in empty if item.source in kept]


def _by_group(found: Iterable[_Listed]) -> dict[str | None, list[_Listed]]:
    by_group = defaultdict(list)
    for entry in found:
        by_group[entry.case["group"]].append(entry)
    return by_group


def _turned(found: Iterable[_Listed]) -> Iterator[str]:
    """Whether the labels of a group lie turned on their images, a sentence each."""
    for entries in _by_group(found).values():
        turn = how_turned(entry.listing.fits for entry in entries)
        if turn:
            yield (
                f"{_folder(entries[0].case)}: the outlines of the labels fit the images clearly better "
                f"{turn} than as they are stored; look at some of them, and store them as their images are."
            )


def _odd_values(found: Iterable[_Listed], named: Collection[int]) -> Iterator[str]:
    """Values of each group that may be no classes; `named` are known to be some."""
    for entries in _by_group(found).values():
        known = {value for entry in entries for value in entry.case.get("named", ())}
        labels = (CountedLabel(_label(entry.case), entry.listing.pixels, entry.listing.values) for entry in entries)
        yield from odd_values(labels, known.union(named))


def _mixed_units(found: Iterable[_Listed]) -> Iterator[str]:
    for entries in _by_group(found).values():
        if sentence := mixed_units(entry.listing.acquired for entry in entries):
            yield f"{_folder(entries[0].case)}: {sentence}"


def _warnings(found: Iterable[_Listed]) -> Iterator[str]:
    """What may be wrong with each case, a sentence each."""
    for entry in found:
        for sentence in entry.listing.warnings:
            yield f"{entry.case['name']}: {sentence}"


def _folder(case: dict) -> str:
    """The folder of a case's label; the case's name where it has tensors instead."""
    label = case.get("label")
    return str(Path(label).parent) if isinstance(label, str | Path) else case["name"]


def _label(case: dict) -> str:
    """Path of a case's label; the case's name where it has tensors instead."""
    label = case.get("label")
    return str(label) if isinstance(label, str | Path) else case["name"]


def _source(case: dict) -> str:
    """Path of a case's image; its name where it has tensors instead."""
    return str(case["image"]) if isinstance(case.get("image"), str | Path) else case["name"]


def _itself(value: Prepared) -> Prepared:
    return value
