"""The support bank: labelled slices, and what the network makes of them.

    data ─ reconcile ─ items: prepared pixels ─ encode ─ embedding and memory ─ retrieve, select ─ support of a query

The truth is the data; all else is a cache of two layers. *Prepared* is what preprocessing makes of an item; it depends
on the item's content and on the preprocessing. *Encoded* is what the network makes of that; it depends on the network
as well: weights, LoRA, switches, precision. On a CPU an item is encoded by itself, so that its encoding depends on
nothing else, not even in the last bit; then results are the same with and without a folder, in one go or after an
interruption.

With a cache folder both layers are on disk (`sam2sgp.support.store`), and a bank holds of each item only a few facts
and its embedding; pixels and memory are read when they are asked for, through a cache of bounded size. Without a folder
everything is held in memory. A query costs the same however large the bank is, but for the cosine similarities.

A bank is for one thread at a time, but for `thumbnail`: `reconcile`, `encode` and `forget` renumber or drop items, so
none of them may be called while a query that has retrieved is still being segmented. Any number of processes may share
a cache folder; each has a bank of its own and encodes what it does not find there.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from sam2sgp import distributed
from sam2sgp.data.coding import LabelCoding
from sam2sgp.data.folders import check_label_values, complete_class_names
from sam2sgp.errors import DataError, cause_of
from sam2sgp.heap import give_back
from sam2sgp.networks import SAM2SGP, ImageFeatures, SupportMemory
from sam2sgp.support.content import ATTEMPTS, FileHashes, digest_of, network_fingerprint, settings_fingerprint
from sam2sgp.support.fingerprint import LARGEST_TILE, fingerprint, tile_share
from sam2sgp.support.items import VIEWS, Listing, Prepared, SupportItem, prepare_items
from sam2sgp.support.sampler import SupportSampler
from sam2sgp.support.store import Store, Tensors, checksum
from sam2sgp.transforms.array import to_three_channels
from sam2sgp.transforms.dictionary import log_warnings
from sam2sgp.transforms.scaling import Scaling, SupportScaling, agreed, is_open, log_scalings, scaling_hint

logger = logging.getLogger(__name__)

# Part of the keys of both layers: counted up when what is prepared or encoded changes by the code.
VERSION = 4
CASE, ENCODED = "case", "encoded"
WHOLE = "item"
CASES_PER_LOOKUP = 256
NAMES_PER_COMMIT = 64
# After how many batches memory that is not used goes back to the system.
BATCHES_PER_TIDYING = 8
# Items whose regions are encoded, over all classes, and of each class at least: a set of many classes in many slices
# would encode thousands of regions before its first result.
MAX_VIEWED, LEAST_VIEWED = 480, 8
MAX_VALUE = 255
# So few classes are looked for in every image. Of more, those that one of the most similar items holds, and as many of
# those whose own items are the most similar.
FEW_CLASSES = 8
NEAREST_ITEMS = 8
# Memory of an item by itself and by class; some are missing where the network has no prior.
OF_ITEM, OF_CLASS = ("prior_key", "gram"), ("tokens", "prior_mask", "gram_foreground")


@dataclass
class Retrieved:
    """Support of one class for B queries.

    index, similarity: (B, K) numbers of items and their cosine similarities. likely: (B,) whether the class is worth
    looking for, which of few classes all are.
    """

    value: int
    index: Tensor
    similarity: Tensor
    likely: Tensor

    def rows(self, rows: slice | Tensor) -> "Retrieved":
        """The same for some of the queries."""
        return Retrieved(self.value, self.index[rows], self.similarity[rows], self.likely[rows])


@dataclass
class Changes:
    """Ids of items that `SupportBank.reconcile` took in and left out; of a changed case the same ids are in both."""

    added: list[str]
    removed: list[str]


@dataclass
class _Pool:
    """Encoded rows of one part of the items: each item as a whole, or the views of one class.

    embedding: (R, D). spans: first and past-the-last row of each encoding, by its name. owner: (R,) number of the item
    that a row is of. place: per row, its number within the item's encoding.
    """

    embedding: Tensor
    spans: dict[str, tuple[int, int]]
    owner: Tensor
    place: list[int]


class SupportBank:
    """Support items of a data folder, encoded on demand.

    Args:
        data: labelled cases, dicts with `image`, `label`, `patient`, `group` and `name`.
        transform: preprocessing of a case (image and label). With a cache folder it should be a MONAI transform or a
            `Compose` of such, whose settings are part of the key.
        class_names: declared names by value; {} names the values found `class_1`, ….
        slices_per_class: slices taken from each volume for each class.
        max_items: keep at most this many items, drawn evenly over the cases with `seed`; None keeps all.
        seed: of that choice.
        batch_size: images encoded at a time on a GPU; on a CPU it is one.
        progress: show bars.
        cache_dir: folder of both layers; None holds them in memory.
        cache_mb: MiB of pixels and memory held in memory where there is a folder.
        skip_errors: leave out cases that can't be used and list them in `errors`; otherwise the first one raises.
        allow_empty: a bank without items is fine.

    Attributes:
        items: the `SupportItem`s. class_names: by value; class_values: of the C classes, sorted.
        holds: (N, C) bool, which item holds which class.
        embedding: (N, D) L2-normalised embeddings; None where nothing is encoded.
        fingerprint: hash of network and preprocessing that the encoding is of; None where nothing is encoded.
        patients, groups: who has items here, and of which groups; numbers by name.
        errors: cases left out, dicts with `name`, `source` (path of the image) and `error`.

    Raises:
        DataError: there is no labelled image, or none with an object; a label has an undeclared value.
        ConfigError: `cache_mb` is not a number of at least 0.
    """

    def __init__(
        self,
        data: list[dict],
        transform: Callable,
        class_names: dict[int, str] | None = None,
        slices_per_class: int = 5,
        max_items: int | None = None,
        seed: int = 0,
        batch_size: int = 8,
        progress: bool = True,
        cache_dir: str | Path | None = None,
        cache_mb: float = 64,
        skip_errors: bool = False,
        allow_empty: bool = False,
    ) -> None:
        self.data: list[dict] = []
        self.transform = transform
        self.declared = dict(class_names or {})
        self.slices_per_class = slices_per_class
        self.max_items = max_items
        self.seed = seed
        self.batch_size = batch_size
        self.progress = progress
        self.skip_errors = skip_errors
        self.allow_empty = allow_empty
        self.cache = {"cache_dir": cache_dir, "cache_mb": cache_mb}
        self.store = None if cache_dir is None else Store(cache_dir, cache_mb)
        self.settings = settings_fingerprint(transform, VERSION)
        self.items: list[SupportItem] = []
        self.errors: list[dict] = []
        self._hashes = FileHashes(self.store)
        self._listings: dict[str, Listing] = {}
        self._failed: dict[str, str] = {}
        self._scalings: list[tuple[str, Scaling]] = []
        # Held without a folder: pixels by the item's content, encodings by name.
        self._pixels: dict[str, Prepared] = {}
        self._encodings: dict[str, Tensors] = {}
        self.forget()
        self.reconcile(data)

    def __len__(self) -> int:
        return len(self.items)

    def forget(self) -> None:
        """Drop what was encoded, because the network has changed. What is on disk stays."""
        self.embedding: Tensor | None = None
        self.fingerprint: str | None = None
        self._network: SAM2SGP | None = None
        self._device = torch.device("cpu")
        self._pools: dict[str, _Pool] = {}
        self._outdated: dict[str, _Pool] = {}
        self._encodings.clear()

    def reconcile(self, data: list[dict]) -> Changes:
        """Bring the bank in line with a new list of cases: those added, removed, renamed and changed, also in place.

        Nothing that is unchanged is read or encoded again. The next `retrieve` uses the new state: it encodes new items
        with the network at hand. Numbers of items change.

        Raises:
            DataError: as at first; the bank then stays as it was.
        """
        found, errors, values, count = [], [], set(), 0
        order = np.random.default_rng(self.seed).permutation(len(data)) if self.max_items else range(len(data))
        bar = tqdm(total=len(data), desc="Reading the support set", unit="case", disable=not self.progress)
        with bar:
            for case, listing, digest, error in self._listed([data[i] for i in order]):
                bar.update()
                if error is not None:
                    errors.append({"name": case["name"], "source": _source(case), "error": error})
                    continue
                found.append((case, listing, digest))
                count += len(listing.items)
                values |= {value for value in listing.values if value}
                if self.max_items and count >= self.max_items:
                    break
        found = self._agreed_on_scaling(found)
        listings = {digest: listing for _, listing, digest in found}
        items = [item for entry in found for item in self._items(*entry)]
        present = {item.content for item in items}
        items = items[: self.max_items or None]
        if not items and not self.allow_empty:
            where = Path(data[0]["label"]).parent if data else "the support set"
            raise DataError(
                f"{where}: expected labelled images with at least one object, found {len(data)} without any; add pairs "
                "whose label is not empty."
            )
        before = [(item.id, item.content) for item in self.items]
        after = [(item.id, item.content) for item in items]
        changes = Changes(
            [identifier for identifier, _ in _without(after, before)],
            [identifier for identifier, _ in _without(before, after)],
        )
        if changes.added or changes.removed:
            scalings = [listing.scaling for _, listing, _ in found]
            log_scalings(logger, "Support set", [case["name"] for case, _, _ in found], scalings)
        self._scalings = [(case["group"], listing.scaling) for case, listing, _ in found]
        self.data, self._listings, self.errors = list(data), listings, errors
        class_names = complete_class_names(self.declared, values)
        same = before == after and class_names == getattr(self, "class_names", None)
        holds = self.holds if same else None
        self._set(items, class_names)
        if same:
            # What was learned from the items is known to be of them by this very table.
            self.holds = holds
        self._outdated |= self._pools
        self._pools = {}
        self._pixels = {content: pixels for content, pixels in self._pixels.items() if content in present}
        self._encodings = {name: value for name, value in self._encodings.items() if name.split(".")[0] in present}
        return changes

    def scaling(self, group: str | None = None) -> SupportScaling:
        """How the support set is scaled; where it holds cases of `group`, these."""
        of_group = [scaling for of, scaling in self._scalings if of == group]
        return SupportScaling.of(of_group or [scaling for _, scaling in self._scalings])

    def _agreed_on_scaling(self, found: list[tuple[dict, Listing, str]]) -> list[tuple[dict, Listing, str]]:
        """Cases with what they have, of which those whose scaling is open follow the others of their group."""
        by_group = defaultdict(list)
        for case, listing, _ in found:
            by_group[case["group"]].append(listing.scaling)
        common = {group: agreed(scalings) for group, scalings in by_group.items()}
        result = list(found)
        for number, (case, listing, _) in enumerate(found):
            if is_open(listing.scaling) and common[case["group"]]:
                followed = case | {"support_scaling": common[case["group"]]}
                ((_, listing, digest, error),) = self._listed([followed])
                if error is None:
                    result[number] = followed, listing, digest
        return result

    def part(self, index: Sequence[int]) -> "SupportBank":
        """A bank of some items, in memory and not encoded, which shares the items themselves."""
        part = copy(self)
        part.store = None
        part.progress = False
        part._encodings = {}
        part._set([self.items[i] for i in index], self.class_names)
        part.forget()
        return part

    def of_patients(self, patients: Sequence[str]) -> "SupportBank":
        """A bank of the same items, in memory and not encoded, with other names of the patient of each."""
        part = self.part(range(len(self)))
        items = [replace(item, patient=patient) for item, patient in zip(self.items, patients, strict=True)]
        part._set(items, self.class_names)
        return part

    def masks(self, items: list[SupportItem]) -> Tensor:
        """Binary masks (len(items), C, S, S) float32 of all classes."""
        labels = torch.stack([item.label for item in items])
        return torch.stack([labels == value for value in self.class_values], 1).float()

    def thumbnail(self, content: str) -> Tensor | None:
        """The thumbnail (H, W, 3) uint8 of the item with this content, if it is at hand.

        Any thread may ask for it while another one uses the bank.
        """
        if self.store is None:
            prepared = self._pixels.get(content)
            return None if prepared is None else prepared.drawn()
        tensors = self.store.peek(self._prepared_name(content))
        return None if tensors is None else tensors["thumbnail"]

    def encode(self, network: SAM2SGP, device: torch.device | str = "cpu") -> None:
        """Encode every item with the network as it is now; with a cache folder, every item that is not yet there.

        Under `torch.distributed` the processes start at different items, and each takes from the folder what another
        one has written by then. So that no item is encoded twice, let each call `encode_share` before.
        """
        self.forget()
        self._adopt(network, torch.device(device))
        self._pool(WHOLE)

    def encode_share(self, network: SAM2SGP, device: torch.device | str, number: int, count: int) -> None:
        """Encode the items of one of `count` processes that are not yet in the cache folder, for all of them.

        Each item belongs to one process, whatever is there already. Without a folder nothing is done.
        """
        if self.store is None:
            return
        self.forget()
        self._adopt(network, torch.device(device))
        # Items of the same content are one.
        first: dict[str, int] = {}
        for n, item in enumerate(self.items):
            first.setdefault(self._name(item, WHOLE), n)
        own = dict(list(first.items())[number::count])
        there = self._find(list(own))
        self._encode_all([n for name, n in own.items() if name not in there], WHOLE)

    def retrieve(
        self,
        network: SAM2SGP,
        features: ImageFeatures,
        sampler: SupportSampler,
        patient: str | None = None,
        group: str | None = None,
    ) -> list[Retrieved]:
        """Choose support items for encoded queries, for every class that has any.

        Args:
            features: of B query images.
            patient: items of this patient are not used.
            group: where the bank holds items of this group, only those are used.
        """
        return self._retrieve(network.retrieval_embedding(features), sampler, patient, group)

    def retrieve_for(self, number: int, sampler: SupportSampler) -> list[Retrieved]:
        """What `retrieve` would choose for an item as a query, of other patients."""
        item = self.items[number]
        return self._retrieve(self._encoded()[number : number + 1], sampler, item.patient, item.group)

    def _encoded(self) -> Tensor:
        """Embeddings (N, D) of the items as they are now."""
        if self.embedding is None:
            raise DataError("The support set is not encoded: call `encode` with the network first.")
        return self._pool(WHOLE).embedding

    def _retrieve(
        self, embedding: Tensor, sampler: SupportSampler, patient: str | None, group: str | None
    ) -> list[Retrieved]:
        """By embeddings (B, D)."""
        encoded = self._encoded()
        if not self.items:
            return []
        similarity = embedding @ encoded.T
        allowed = self._allowed(patient, group)
        eligible = (self.holds & allowed[:, None]).to(similarity.device)
        likely = self._likely(similarity, allowed.to(similarity.device), eligible)
        return [
            Retrieved(value, *sampler(similarity, eligible[:, column]), likely[:, column])
            for column, value in enumerate(self.class_values)
            if eligible[:, column].any()
        ]

    @staticmethod
    def _likely(similarity: Tensor, allowed: Tensor, eligible: Tensor) -> Tensor:
        """Which classes are worth looking for in each query, (B, C).

        Args:
            similarity: (B, N) to the items. allowed: (N,) items that may guide. eligible: (N, C) and hold a class.
        """
        shape = len(similarity), eligible.shape[1]
        if shape[1] <= FEW_CLASSES:
            return torch.ones(shape, dtype=torch.bool, device=similarity.device)
        similarity = similarity.masked_fill(~allowed, -torch.inf)
        nearest = similarity.topk(min(NEAREST_ITEMS, similarity.shape[1]), 1).indices
        likely = eligible[nearest].any(1)
        best = [similarity.masked_fill(~column, -torch.inf).amax(1) for column in eligible.unbind(1)]
        return likely.scatter(1, torch.stack(best, 1).topk(FEW_CLASSES, 1).indices, True)

    def select(self, retrieved: list[Retrieved]) -> SupportMemory:
        """Memory with leading dimensions (B, C, K) of classes that share one K."""
        index = torch.stack([entry.index for entry in retrieved], 1)
        return self._gather(WHOLE, index, [entry.value for entry in retrieved])

    def region_support(
        self,
        network: SAM2SGP,
        features: ImageFeatures,
        sampler: SupportSampler,
        column: int,
        patient: str | None = None,
        group: str | None = None,
    ) -> SupportMemory | None:
        """Memory (B, 1, K) of the items' regions around one class, for encoded regions of queries.

        The regions of a class are encoded at their first use.

        Args:
            column: number of the class in `class_values`.
            patient, group: as for `retrieve`.

        Returns:
            None where no item may be used.
        """
        if self._network is None:
            self._adopt(network, features.embedding.device)
        value = self.class_values[column]
        name = f"{VIEWS[self.is_thin(column)]}.{value}"
        pool = self._pool(name)
        eligible = self._allowed(patient, group)[pool.owner].to(pool.embedding.device)
        if not eligible.any():
            return None
        index, _ = sampler(network.retrieval_embedding(features) @ pool.embedding.T, eligible)
        return self._gather(name, index[:, None], [value])

    def is_thin(self, column: int) -> bool:
        """Whether a class is thin in most of its items, so that tiles of the image show it better than one region."""
        return self._thin[column]

    def tile_share(self, column: int, size: int) -> float | None:
        """Side of the tiles that a class is to be seen in at the network's size S, see `fingerprint.tile_share`.

        None: it is not thin in most of its items.
        """
        if not self.is_thin(column):
            return None
        return tile_share(self._targets[self.class_values[column]].thickness_share, size) or LARGEST_TILE

    @property
    def memory(self) -> SupportMemory | None:
        """Memory (P, 1) of all pairs of an item and a class it holds, in order; None before `encode`.

        It reads the whole bank: for tests and for looking inside.
        """
        if self.embedding is None:
            return None
        pairs = [(number, value) for number, item in enumerate(self.items) for value in item.facts.holds]
        parts = [self._gather(WHOLE, torch.tensor([[[number]]]), [value]) for number, value in pairs]
        return SupportMemory.concatenate(parts)

    def prune(self, keep: Iterable[str] = ()) -> list[str]:
        """Delete from the cache folder what other networks and preprocessings encoded.

        A process that still uses such an encoding makes it again.

        Args:
            keep: fingerprints whose encodings stay, next to the bank's own.

        Returns:
            The fingerprints deleted.
        """
        if self.store is None:
            return []
        kept = {*keep, self.fingerprint}
        folder = self.store.directory / ENCODED
        found = sorted(path.name for path in folder.iterdir() if path.name not in kept) if folder.is_dir() else []
        self.store.remove([f"{ENCODED}/{name}" for name in found], ENCODED)
        self.store.sweep()
        return found

    # The list of cases

    def _listed(self, cases: list[dict]) -> Iterator[tuple[dict, Listing | None, str, str | None]]:
        """Each case with what it has, the hash of its content, and what is wrong with it (None: nothing)."""
        new: dict[str, bytes] = {}
        coding = LabelCoding(self.declared)
        try:
            # With a limit, few cases may be enough: each is hashed when it is looked up.
            step = CASES_PER_LOOKUP if self.max_items is None else 1
            for start in range(0, len(cases), step):
                block = cases[start : start + step]
                self._hashes.prefetch(block)
                digests = [self._digest(case) for case in block]
                known = self._known(digests)
                for case, digest in zip(block, digests, strict=True):
                    listing, error = None, None
                    try:
                        if isinstance(digest, DataError):
                            raise digest
                        digest, listing = self._list(case, digest, known, new)
                        check_label_values(case["label"], listing.values, self.declared)
                        coding.check(case["label"], listing.values)
                    except Exception as raised:  # whatever a reader raises for one file must not end the others
                        cause = cause_of(raised)
                        if not self.skip_errors:
                            raise cause from None
                        error = str(cause)
                    yield case, listing, digest, error
                self._commit(new)
        finally:
            self._commit(new)

    def _digest(self, case: dict) -> str | DataError | None:
        """Hash of a case's content, or why there is none; None where the case has no files."""
        try:
            return self._hashes.of_case(case)
        except DataError as error:
            return error

    def _known(self, digests: list) -> dict[str, Listing]:
        """Listings from the folder by the hash of a case's content; without those at hand."""
        if self.store is None:
            return {}
        keys = {self._listing_key(d): d for d in digests if isinstance(d, str) and d not in self._listings}
        return {keys[key]: Listing.of_json(value) for key, value in self.store.facts(CASE, keys).items()}

    def _list(
        self, case: dict, digest: str | None, known: dict[str, Listing], new: dict[str, bytes]
    ) -> tuple[str, Listing]:
        """The hash of a case's content, and what the case has."""
        if digest in self._failed:
            raise DataError(self._failed[digest])
        listing = self._listings.get(digest) or known.get(digest)
        if listing is None:
            try:
                digest, listing = self._prepare(case)
            except Exception as error:
                # The same content fails again: only a changed file is worth reading again.
                if digest is not None and isinstance(cause := cause_of(error), DataError):
                    self._failed[digest] = str(cause)
                raise
            if self.store is not None:
                new[self._listing_key(digest)] = listing.to_json()
        return digest, listing

    def _listing_key(self, digest: str) -> str:
        return digest_of(digest, self.settings, self.slices_per_class)

    def _commit(self, new: dict[str, bytes]) -> None:
        self._hashes.flush()
        if self.store is not None:
            self.store.add_facts(CASE, new)
        new.clear()

    def _prepare(self, case: dict) -> tuple[str, Listing]:
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
        log_warnings(prepared)
        if prepared["label"].max() > MAX_VALUE:
            raise DataError(
                f"{case['label']}: expected class values up to {MAX_VALUE}, found {int(prepared['label'].max())}; "
                "number the classes again."
            )
        listing, items = prepare_items(prepared, self.slices_per_class)
        for facts, item in zip(listing.items, items, strict=True):
            content = digest_of(digest, facts.slice)
            if self.store is None:
                self._pixels[content] = item
            else:
                self.store.write(self._prepared_name(content), item.tensors())
        return digest, listing

    def _items(self, case: dict, listing: Listing, digest: str) -> list[SupportItem]:
        items = []
        for facts in listing.items:
            content = digest_of(digest, facts.slice)
            load = partial(self._load, content, case)
            if self.store is None:
                load = partial(_itself, self._pixels[content])
            items.append(
                SupportItem(
                    id=case["name"] if facts.slice is None else f"{case['name']}#{facts.slice}",
                    content=content,
                    source=_source(case),
                    patient=case["patient"],
                    group=case["group"],
                    case=case,
                    facts=facts,
                    load=load,
                )
            )
        return items

    def _prepared_name(self, content: str) -> str:
        return f"prepared/{self.settings}/{content}"

    def _load(self, content: str, case: dict) -> Prepared:
        """Pixels of an item from the folder, or else from the case's files."""
        name = self._prepared_name(content)
        tensors = self.store.read(name)
        if tensors is None:
            self._prepare(case)
            tensors = self.store.read(name)
        if tensors is None:
            raise DataError(
                f"{case['label']}: expected the label that the support set was built from, found another one; call "
                "`reconcile` with the present cases."
            )
        return Prepared.of_tensors(tensors)

    def _set(self, items: list[SupportItem], class_names: dict[int, str]) -> None:
        """Take over items, and make the tables that queries need."""
        self.items = items
        self.class_names = class_names
        self.class_values = sorted(class_names)
        columns = {value: column for column, value in enumerate(self.class_values)}
        self.holds = torch.zeros(len(items), len(columns), dtype=torch.bool)
        # Items that have regions, and tiles, by class.
        counts = np.zeros((len(VIEWS), len(columns)), dtype=int)
        for number, item in enumerate(items):
            self.holds[number, [columns[value] for value in item.facts.holds]] = True
            for kind, values in enumerate((item.facts.regions, item.facts.tiles)):
                # A class may be so small that it is only seen at the image's own size.
                counts[kind, [columns[value] for value in values if value in columns]] += 1
        self._thin = (2 * counts[1] > counts[0]).tolist()
        self._targets = fingerprint(items).targets
        self.patients, self._patient_of = _numbered([item.patient for item in items])
        self.groups, self._group_of = _numbered([item.group for item in items])

    def _allowed(self, patient: str | None, group: str | None) -> Tensor:
        """(N,) bool: items of other patients, and of the group where there are such."""
        allowed = self._patient_of != self.patients.get(patient, -1)
        of_group = allowed & (self._group_of == self.groups.get(group, -1))
        return of_group if bool(of_group.any()) else allowed

    # Encoding

    def _adopt(self, network: SAM2SGP, device: torch.device) -> None:
        """Encode with this network from now on, in the precision of the caller's autocast."""
        self._network, self._device = network, device
        self._precision = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        self.fingerprint = digest_of(network_fingerprint(network, device), self.settings)

    def _name_of(self, part: str) -> str:
        """The class whose views a part holds."""
        return self.class_names[int(part.partition(".")[2])]

    def _name(self, item: SupportItem, part: str) -> str:
        return f"{item.content}.{part}"

    def _folder(self) -> str:
        return f"{ENCODED}/{self.fingerprint}"

    def _pool(self, part: str) -> _Pool:
        """The encoded rows of a part, encoding what is missing."""
        if part not in self._pools:
            self._pools[part] = self._build(part)
            if part == WHOLE:
                self.embedding = self._pools[part].embedding
        return self._pools[part]

    def _build(self, part: str) -> _Pool:
        kind, _, value = part.partition(".")
        numbers = range(len(self.items))
        if part != WHOLE:
            numbers = self._viewed([n for n in numbers if int(value) in getattr(self.items[n].facts, kind)])
        names = [self._name(self.items[n], part) for n in numbers]
        first = dict(zip(reversed(names), reversed(numbers), strict=True))
        old = self._outdated.pop(part, None)
        found = {name: old.embedding[slice(*old.spans[name])] for name in first if name in old.spans} if old else {}
        found |= self._find([name for name in first if name not in found])
        missing = sorted(number for name, number in first.items() if name not in found)
        found |= self._encode_all(missing, part)
        spans, owner, place, stop = {}, [], [], 0
        parts = []
        for name, number in zip(names, numbers, strict=True):
            rows = len(found[name])
            spans[name] = stop, stop + rows
            stop += rows
            owner += [number] * rows
            place += range(rows)
            if rows:
                parts.append(found[name])
        embedding = torch.cat(parts).to(self._device) if parts else torch.zeros(0, 0, device=self._device)
        return _Pool(embedding, spans, torch.tensor(owner, dtype=torch.long), place)

    def _viewed(self, numbers: list[int]) -> list[int]:
        """At most so many of some items, by turns from each case; the same ones when others come or go."""
        most = max(LEAST_VIEWED, MAX_VIEWED // max(1, len(self.class_values)))
        if len(numbers) <= most:
            return numbers
        of_case: dict[str, int] = defaultdict(int)
        turns = []
        for number in sorted(numbers, key=lambda number: self.items[number].content):
            item = self.items[number]
            turns.append((of_case[item.source], item.content, number))
            of_case[item.source] += 1
        return sorted(number for *_, number in sorted(turns)[:most])

    def _find(self, names: list[str]) -> Tensors:
        """Embeddings (R, D) of those names that are encoded already."""
        if self.store is None:
            return {name: self._encodings[name]["embedding"] for name in names if name in self._encodings}
        folder = self._folder()
        there = self.store.names(folder)
        facts = self.store.facts(ENCODED, [f"{folder}/{name}" for name in names if f"{folder}/{name}" in there])
        found = {key.rpartition("/")[2]: safetensors.torch.load(value)["embedding"] for key, value in facts.items()}
        # A process that was killed leaves files without rows.
        unlisted = {}
        for name in names:
            if name not in found and f"{folder}/{name}" in there:
                encoding = self.store.read(f"{folder}/{name}")
                if encoding is not None:
                    unlisted[name] = encoding["embedding"]
        self._commit_embeddings(unlisted)
        return found | unlisted

    def _commit_embeddings(self, embeddings: Tensors) -> None:
        if self.store is not None:
            packed = {name: safetensors.torch.save({"embedding": value}) for name, value in embeddings.items()}
            self.store.add_facts(ENCODED, {f"{self._folder()}/{name}": value for name, value in packed.items()})

    def _encode_all(self, numbers: list[int], part: str) -> Tensors:
        """Encode items. Returns the embeddings (R, D) by name."""
        found: Tensors = {}
        unlisted: Tensors = {}
        batch = self.batch_size if self._device.type == "cuda" and part == WHOLE else 1
        start = len(numbers) * distributed.rank() // distributed.world_size()
        numbers = numbers[start:] + numbers[:start]
        whole = part == WHOLE
        what = "Encoding the support set" if whole else f"Encoding regions of {self._name_of(part)}"
        silent = not self.progress or not numbers
        bar = tqdm(desc=what, total=len(numbers), unit="item", leave=whole, disable=silent)
        try:
            with bar:
                for start in range(0, len(numbers), batch):
                    chosen = numbers[start : start + batch]
                    for name, encoding in self._encode(chosen, part).items():
                        found[name] = unlisted[name] = encoding["embedding"]
                    if len(unlisted) >= NAMES_PER_COMMIT:
                        self._commit_embeddings(unlisted)
                        unlisted = {}
                    if (start // batch + 1) % BATCHES_PER_TIDYING == 0:
                        give_back()
                    bar.update(len(chosen))
        finally:
            self._commit_embeddings(unlisted)
            give_back()
        return found

    def _encode(self, numbers: list[int], part: str) -> dict[str, Tensors]:
        """Encodings by name, as far as they are not there yet; they are kept."""
        names = {self._name(self.items[n], part): n for n in numbers}
        encodings = {}
        if self.store is not None:
            for name in names:
                encoding = self.store.read(f"{self._folder()}/{name}")
                if encoding is not None:
                    encodings[name] = encoding
        missing = [name for name in names if name not in encodings]
        if missing:
            items = [self.items[names[name]] for name in missing]
            made = self._encode_items(items) if part == WHOLE else [self._encode_views(items[0], part)]
            for name, encoding in zip(missing, made, strict=True):
                # Copies: a slice keeps the memory of the whole batch, and safetensors stores only contiguous tensors.
                encoding = {key: value.clone(memory_format=torch.contiguous_format) for key, value in encoding.items()}
                if self.store is None:
                    self._encodings[name] = encoding
                else:
                    encoding = {key: value.cpu() for key, value in encoding.items()}
                    self.store.write(f"{self._folder()}/{name}", encoding)
                encodings[name] = encoding
        return encodings

    def _encode_items(self, items: list[SupportItem]) -> list[Tensors]:
        """One row per item: memory for the classes it holds, in the order of `Facts.holds`."""
        held = sorted(set(chain.from_iterable(item.facts.holds for item in items)))
        masks = self.masks(items)[:, [self.class_values.index(value) for value in held]]
        embedding, memory = self._through_network([item.image for item in items], masks)
        if memory is None:
            return [{"embedding": row[None]} for row in embedding]
        encodings = []
        for row, item in enumerate(items):
            columns = [held.index(value) for value in item.facts.holds]
            fields = {name: getattr(memory, name) for name in (*OF_ITEM, *OF_CLASS)}
            encoding = {
                name: values[row : row + 1] if name in OF_ITEM else values[row : row + 1, columns]
                for name, values in fields.items()
                if values is not None
            }
            encoding["embedding"] = embedding[row : row + 1]
            encodings.append(encoding)
        return encodings

    def _encode_views(self, item: SupportItem, part: str) -> Tensors:
        """One row per region or tile that shows the class."""
        kind, _, value = part.partition(".")
        images, masks = getattr(item, kind)[int(value)]
        shown = masks.flatten(1).any(1)
        if not shown.any():
            return {"embedding": torch.zeros(0, 0)}
        embedding, memory = self._through_network(list(images[shown]), masks[shown][:, None].float())
        fields = {name: getattr(memory, name) for name in (*OF_ITEM, *OF_CLASS)}
        return {"embedding": embedding} | {name: values for name, values in fields.items() if values is not None}

    @torch.no_grad()
    def _through_network(self, images: list[Tensor], masks: Tensor) -> tuple[Tensor, SupportMemory | None]:
        """Embeddings (n, D) and memory (n, C) of images (C', S, S) with masks (n, C, S, S); None for C = 0."""
        enabled, dtype = self._precision
        image = torch.stack([to_three_channels(image.float()) for image in images]).to(self._device)
        with torch.autocast(self._device.type, dtype=dtype, enabled=enabled):
            features = self._network.encode(image)
            embedding = self._network.retrieval_embedding(features)
            memory = self._network.encode_support(features, masks.to(self._device)) if masks.shape[1] else None
            return embedding, memory

    def _encoding(self, number: int, part: str) -> Tensors:
        """The encoding of an item; made again if its file is gone."""
        name = self._name(self.items[number], part)
        found = self._encodings.get(name) if self.store is None else self.store.read(f"{self._folder()}/{name}")
        return self._encode([number], part)[name] if found is None else found

    def _gather(self, part: str, index: Tensor, values: list[int]) -> SupportMemory:
        """Memory (B, C, K) of rows `index` (B, C, K) of a part, for C classes. Reads each row once."""
        pool = self._pool(part)
        rows, row = index.unique(return_inverse=True)
        owners = pool.owner[rows.cpu()].tolist()
        encodings = [self._encoding(number, part) for number in owners]
        places = [pool.place[i] for i in rows.tolist()]
        classes = torch.arange(len(values), device=index.device)[None, :, None]
        pairs, pair = (row * len(values) + classes).unique(return_inverse=True)
        chosen = []
        for position, number in (divmod(number, len(values)) for number in pairs.tolist()):
            # A view shows one class, a whole item all that it holds.
            held = self.items[owners[position]].facts.holds if part == WHOLE else values
            chosen.append((encodings[position], places[position], held.index(values[number])))
        memory: dict[str, Tensor | None] = {}
        for name in (*OF_ITEM, *OF_CLASS):
            if name not in encodings[0]:
                memory[name] = None
            elif name in OF_ITEM:
                stack = torch.stack([e[name][place] for e, place in zip(encodings, places, strict=True)])
                memory[name] = stack.to(index.device)[row]
            else:
                stack = torch.stack([encoding[name][place, column] for encoding, place, column in chosen])
                memory[name] = stack.to(index.device)[pair]
        return SupportMemory(**memory)


def shared_support_bank(data: list[dict], cache_dir: str | Path | None = None, **settings) -> SupportBank:
    """The support bank of each of several processes; the processes of a machine read the cases together.

    With a cache folder, and without a limit of items, each process first prepares its share of the cases there. All
    processes call this at the same time.

    Args:
        data, cache_dir, settings: of `SupportBank`.
    """
    number, count = distributed.place_on_machine()
    if count > 1 and cache_dir is not None and settings.get("max_items") is None:
        # What is wrong with a case, the whole bank will say.
        share = settings | {"skip_errors": True, "allow_empty": True}
        SupportBank(data[number::count], cache_dir=cache_dir, **share)
    distributed.barrier()
    return SupportBank(data, cache_dir=cache_dir, **settings)


def _source(case: dict) -> str:
    """Path of a case's image; its name where it has tensors instead."""
    return str(case["image"]) if isinstance(case.get("image"), str | Path) else case["name"]


def _itself(value: Prepared) -> Prepared:
    return value


def _without(items: list[tuple[str, str]], others: list[tuple[str, str]]) -> list[tuple[str, str]]:
    gone = set(others)
    return [item for item in items if item not in gone]


def _numbered(names: list[str]) -> tuple[dict[str, int], Tensor]:
    """Number of each name in the order of their first appearance, and of every entry (N,)."""
    numbers: dict[str, int] = {}
    entries = [numbers.setdefault(name, len(numbers)) for name in names]
    return numbers, torch.tensor(entries, dtype=torch.long)
