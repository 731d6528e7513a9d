"""The support bank: labelled slices, and what the network makes of them.

    data ─ catalogue ─ items: prepared pixels ─ encodings ─ embedding and memory ─ retrieve, select ─ support of a query

The truth is the data; all else is a cache of two layers. *Prepared* is what preprocessing makes of an item, see
`sam2sgp.support.catalogue`; *encoded* is what the network makes of that, see `sam2sgp.support.encodings`. With a cache
folder both layers are on disk (`sam2sgp.support.tensor_store`), otherwise in memory. A query costs the same however
large the bank is, but for the cosine similarities.

A bank is for one thread at a time, but for `thumbnail`: `reconcile`, `encode` and `forget` renumber or drop items, so
none of them may be called while a query that has retrieved is still being segmented. Any number of processes may share
a cache folder; each has a bank of its own and encodes what it does not find there.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sam2sgp import distributed
from sam2sgp.errors import DataError
from sam2sgp.networks import SAM2SGP, ImageFeatures, SupportMemory
from sam2sgp.support.catalogue import Catalogue, ItemRules
from sam2sgp.support.encodings import WHOLE, Cut, Encodings, Step
from sam2sgp.support.fingerprint import fingerprint, tile_share
from sam2sgp.support.items import CROPS, SupportItem
from sam2sgp.support.pieces import LabelledVolumes
from sam2sgp.support.sampler import SupportSampler
from sam2sgp.support.tensor_store import TensorStore
from sam2sgp.transforms.acquired import Acquired
from sam2sgp.transforms.scaling import SupportScaling

logger = logging.getLogger(__name__)

# Up to this many classes are looked for in every image. Of more classes, an image is searched for those that one of the
# most similar items holds, and for as many of those whose own items are the most similar.
FEW_CLASSES = 8
NEAREST_ITEMS = 8


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


class SupportBank:
    """Support items of a data folder, encoded on demand.

    Args:
        data: labelled cases, dicts with `image`, `label`, `patient`, `group` and `name`.
        transform: preprocessing of a case (image and label). With a cache folder it should be a MONAI transform or a
            `Compose` of such, whose settings are part of the key.
        class_names: declared names by value; {} names the values found `class_1`, ….
        rules: which items cases have; cases that are left out are listed in `errors`.
        store: where both layers are kept; None holds them in memory.
        batch_size: images encoded at a time on a GPU; on a CPU it is one.
        progress: show bars.

    Attributes:
        data: the cases.
        items: of type `SupportItem`. class_names: by value; class_values: of the C classes, sorted.
        version: counts up whenever items, classes or the network that encodes change, and numbers of items with them.
        holds: (N, C) bool, which item holds which class.
        patients, groups: who has items here, and of which groups; numbers by name.
        errors: cases left out, dicts with `name`, `source` (path of the image) and `error`.
        warnings: sentences on what may be wrong with the others.

    Raises:
        DataError: there is no labelled image, or none with an object; a label has an undeclared value.
    """

    def __init__(
        self,
        data: list[dict],
        transform: Callable,
        class_names: dict[int, str] | None = None,
        rules: ItemRules = ItemRules(),
        store: TensorStore | None = None,
        batch_size: int = 8,
        progress: bool = True,
    ) -> None:
        self.catalogue = Catalogue(transform, store, dict(class_names or {}), rules, progress)
        self.encodings = Encodings(store, self.catalogue.settings, batch_size, progress)
        self.version = 0
        # The bank of the mirrored items, and the version of this one when it got them.
        self._mirrored: SupportBank | None = None
        self._mirrored_version = 0
        self.data: list[dict] = []
        self.errors: list[dict] = []
        self.warnings: list[str] = []
        # What was found out of the items since they were read, and what was logged of that.
        self._found_out: list[str] = []
        self._told: set[str] = set()
        self.items: list[SupportItem] = []
        self.class_names: dict[int, str] = {}
        self.reconcile(data)

    def __len__(self) -> int:
        return len(self.items)

    # Which items there are

    @property
    def transform(self) -> Callable:
        """Preprocessing of a case."""
        return self.catalogue.transform

    @property
    def settings(self) -> str:
        """Hash of the preprocessing."""
        return self.catalogue.settings

    @property
    def store(self) -> TensorStore | None:
        """Where both layers are kept; None: in memory."""
        return self.encodings.store

    def reconcile(self, data: list[dict], declared: dict[int, str] | None = None) -> Changes:
        """Bring the bank in line with a new list of cases: those added, removed, renamed and changed, also in place.

        Nothing that is unchanged is read or encoded again. The next `retrieve` uses the new state: it encodes new items
        with the network at hand. Numbers of items change.

        Args:
            declared: names of classes by value; None: as before.

        Raises:
            DataError: as at first; the bank then stays as it was.
        """
        if declared is not None:
            self.catalogue.declared = dict(declared)
        found = self.catalogue.read(data)
        before = [(item.id, item.content) for item in self.items]
        after = [(item.id, item.content) for item in found.items]
        changes = Changes(
            [identifier for identifier, _ in _without(after, before)],
            [identifier for identifier, _ in _without(before, after)],
        )
        if changes.added or changes.removed:
            found.log_scalings()
        self._found = found
        if _table(found.items) != _table(self.items) or found.class_names != self.class_names:
            self.version += 1
            self._found_out = []
        self.data, self.errors, self.warnings = list(data), found.errors, [*found.warnings, *self._found_out]
        self._set(found.items, found.class_names)
        self.encodings.keep_only(found.contents)
        return changes

    def scaling(self, group: str | None = None) -> SupportScaling:
        """How the support set is scaled; where it holds cases of `group`, these."""
        return self._found.scaling(group)

    def sliced_along(self, group: str | None = None) -> set[int]:
        """Axes along which volumes are sliced, see `Geometry.slice_axis`; where it holds some of `group`, theirs."""
        return self._found.sliced_along(group)

    def acquisitions(self, group: str | None = None) -> list[Acquired]:
        """What DICOM headers say of how the images were acquired; where it holds cases of `group`, of these."""
        return self._found.acquisitions(group)

    def warn(self, sentences: Iterable[str]) -> None:
        """Add to `warnings`, and log, what has been found out since the cases were read."""
        for sentence in sentences:
            if sentence not in self.warnings:
                self.warnings.append(sentence)
                self._found_out.append(sentence)
            if sentence not in self._told:
                self._told.add(sentence)
                logger.warning("%s", sentence)

    def of_patients(self, patients: Sequence[str]) -> "SupportBank":
        """A bank of the same items, in memory and not encoded, with other names of the patient of each."""
        return self._of([replace(item, patient=patient) for item, patient in zip(self.items, patients, strict=True)])

    def mirrored(self) -> "SupportBank":
        """A bank of the same items mirrored left to right; its encodings are kept where this one's are.

        It is not encoded at first. It is the same one each time, and has the items as they are by then, until this bank
        forgets what was encoded.
        """
        if self._mirrored is None:
            own = self.encodings
            encodings = Encodings(self.store, self.settings, own.batch_size, own.progress)
            self._mirrored = self._of([item.mirrored() for item in self.items], encodings)
        elif self._mirrored_version != self.version:
            items = [item.mirrored() for item in self.items]
            self._mirrored.version += 1
            self._mirrored._set(items, self.class_names)
            self._mirrored.encodings.keep_only({item.content for item in items})
        self._mirrored_version = self.version
        return self._mirrored

    def _of(self, items: list[SupportItem], encodings: Encodings | None = None) -> "SupportBank":
        """A bank of the same cases, with other items of them and encodings of its own; None: in memory.

        What is known of the cases, as how they are scaled, stays right.
        """
        bank = copy(self)
        bank._mirrored = None
        bank.warnings, bank._found_out, bank._told = list(self.warnings), list(self._found_out), set(self._told)
        bank.encodings = encodings or Encodings(None, self.settings, self.encodings.batch_size, progress=False)
        bank._set(items, self.class_names)
        return bank

    def thumbnail(self, content: str) -> Tensor | None:
        """The thumbnail (H, W, 3) uint8 of the item with this content, if it is at hand.

        Any thread may ask for it while another one uses the bank.
        """
        return self.catalogue.thumbnail(content)

    def _set(self, items: list[SupportItem], class_names: dict[int, str]) -> None:
        """Take over items, and make the tables that queries need."""
        self.items, self.class_names = items, class_names
        self.encodings.set_items(items, class_names)
        self.class_values = self.encodings.class_values
        index_of = {value: class_index for class_index, value in enumerate(self.class_values)}
        self.holds = torch.zeros(len(items), len(index_of), dtype=torch.bool)
        # Items that have regions, and tiles, by class.
        counts = np.zeros((len(CROPS), len(index_of)), dtype=int)
        for number, item in enumerate(items):
            self.holds[number, [index_of[value] for value in item.info.holds]] = True
            for kind, values in enumerate((item.info.regions, item.info.tiles)):
                # A class may be so small that it is only seen at the image's own size.
                counts[kind, [index_of[value] for value in values if value in index_of]] += 1
        self._have_tiles = (2 * counts[1] > counts[0]).tolist()
        self._targets = fingerprint(items).targets
        self._volumes = LabelledVolumes.of(items, self.class_values)
        self.patients, self._patient_of = _numbered([item.patient for item in items])
        self.groups, self._group_of = _numbered([item.group for item in items])

    # What the network makes of them

    @property
    def embedding(self) -> Tensor | None:
        """(N, D) L2-normalised embeddings; None where nothing is encoded."""
        return self.encodings.embedding

    @property
    def fingerprint(self) -> str | None:
        """Hash of network and preprocessing that the encoding is of; None where nothing is encoded."""
        return self.encodings.fingerprint

    def forget(self) -> None:
        """Drop what was encoded, because the network has changed. What is on disk stays."""
        self.version += 1
        self._mirrored = None
        self.encodings.forget()

    def encode(self, network: SAM2SGP, device: torch.device | str = "cpu", step: Step | None = None) -> None:
        """Encode every item with the network as it is now; with a cache folder, every item that is not yet there.

        Under `torch.distributed` the processes start at different items, and each takes from the folder what another
        one has written by then. So that no item is encoded twice, let each call `encode_share` before.

        `step` is told of 0 slices before each item. What it raises ends the encoding; with a cache folder, the next one
        goes on from there.
        """
        self.forget()
        self.encodings.adopt(network, torch.device(device))
        self.encodings.pool(WHOLE, step)

    def encode_missing(self, network: SAM2SGP, device: torch.device | str = "cpu", step: Step | None = None) -> None:
        """As `encode`, but once that is done, only the items that came since, by the same network."""
        if self.embedding is None:
            self.encode(network, device, step)
        else:
            self.encodings.pool(WHOLE, step)

    def encode_share(self, network: SAM2SGP, device: torch.device | str, number: int, count: int) -> None:
        """Encode the items of one of `count` processes that are not yet in the cache folder, for all of them.

        Each item belongs to one process, whatever is there already. Without a folder nothing is done.
        """
        if self.store is None:
            return
        self.forget()
        self.encodings.adopt(network, torch.device(device))
        self.encodings.encode_share(number, count)

    def prune(self, keep: Iterable[str] = ()) -> list[str]:
        """Delete from the cache folder what other networks and preprocessings encoded.

        A process that still uses such an encoding makes it again.

        Args:
            keep: fingerprints whose encodings stay, next to the bank's own.

        Returns:
            The fingerprints deleted.
        """
        return self.encodings.prune(keep)

    def masks(self, items: list[SupportItem]) -> Tensor:
        """Binary masks (len(items), C, S, S) float32 of all classes."""
        return self.encodings.masks(items)

    @property
    def memory(self) -> SupportMemory | None:
        """Memory (P, 1) of all pairs of an item and a class it holds, in order; None before `encode`.

        It reads the whole bank: for tests and for looking inside.
        """
        if self.embedding is None:
            return None
        pairs = [(number, value) for number, item in enumerate(self.items) for value in item.info.holds]
        parts = [self.encodings.gather(WHOLE, torch.tensor([[[number]]]), [value]) for number, value in pairs]
        return SupportMemory.concatenate(parts)

    # Which of them guide a query

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
        return self.encodings.pool(WHOLE).embedding

    def _retrieve(
        self, embedding: Tensor, sampler: SupportSampler, patient: str | None, group: str | None
    ) -> list[Retrieved]:
        """As `retrieve`, by embeddings (B, D) of the queries."""
        encoded = self._encoded()
        if not self.items:
            return []
        similarity = embedding @ encoded.T
        allowed = self._allowed(patient, group)
        eligible = (self.holds & allowed[:, None]).to(similarity.device)
        likely = self._likely(similarity, allowed.to(similarity.device), eligible)
        return [
            Retrieved(value, *sampler(similarity, eligible[:, class_index]), likely[:, class_index])
            for class_index, value in enumerate(self.class_values)
            if eligible[:, class_index].any()
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
        best = [similarity.masked_fill(~held, -torch.inf).amax(1) for held in eligible.unbind(1)]
        return likely.scatter(1, torch.stack(best, 1).topk(FEW_CLASSES, 1).indices, True)

    def _allowed(self, patient: str | None, group: str | None) -> Tensor:
        """(N,) bool: items of other patients, and of the group where some of these hold a class."""
        allowed = self._patient_of != self.patients.get(patient, -1)
        of_group = allowed & (self._group_of == self.groups.get(group, -1))
        return of_group if bool(self.holds[of_group].any()) else allowed

    def one_piece(self, patient: str | None = None, group: str | None = None) -> list[int]:
        """Values of the classes that each labelled volume shows in one piece, see `sam2sgp.support.pieces`.

        Args:
            patient, group: as for `retrieve`.
        """
        return self._volumes.one_piece(self._allowed(patient, group), self._patient_of)

    def select(self, retrieved: list[Retrieved]) -> SupportMemory:
        """Memory with leading dimensions (B, C, K) of classes that share one K."""
        index = torch.stack([entry.index for entry in retrieved], 1)
        return self.encodings.gather(WHOLE, index, [entry.value for entry in retrieved])

    def region_support(
        self,
        network: SAM2SGP,
        features: ImageFeatures,
        sampler: SupportSampler,
        class_index: int,
        patient: str | None = None,
        group: str | None = None,
    ) -> SupportMemory | None:
        """Memory (B, 1, K) of the items' regions around one class, for encoded regions of queries.

        The regions of a class are encoded at their first use.

        Args:
            class_index: number of the class in `class_values`.
            patient, group: as for `retrieve`.

        Returns:
            None where no item may be used: so too where the class is seen in tiles and all items with such are the
            patient's own, because the others' regions show it in another size.
        """
        if self.encodings.network is None:
            self.encodings.adopt(network, features.embedding.device)
        value = self.class_values[class_index]
        regions, tiles = CROPS
        cut = Cut(regions if self.tile_share(class_index, network.image_size) is None else tiles, value)
        pool = self.encodings.pool(cut)
        eligible = self._allowed(patient, group)[pool.owner].to(pool.embedding.device)
        if not eligible.any():
            return None
        index, _ = sampler(network.retrieval_embedding(features) @ pool.embedding.T, eligible)
        return self.encodings.gather(cut, index[:, None], [value])

    def tile_share(self, class_index: int, size: int) -> float | None:
        """Side of the tiles that a class is to be seen in at the network's size S, see `fingerprint.tile_share`.

        None: one region around it shows it better, or most of its items have no tiles.
        """
        if not self._have_tiles[class_index]:
            return None
        target = self._targets[self.class_values[class_index]]
        return tile_share(target.thickness_share, target.count, target.part_share, size)


def shared_support_bank(
    data: list[dict], rules: ItemRules = ItemRules(), store: TensorStore | None = None, **arguments
) -> SupportBank:
    """The support bank of each of several processes; the processes of a machine read the cases together.

    With a store, and without a limit of items, each process first prepares its share of the cases there. All processes
    call this at the same time.

    Args:
        data, rules, store, arguments: of `SupportBank`.
    """
    number, count = distributed.place_on_machine()
    if count > 1 and store is not None and rules.max_items is None:
        # What is wrong with a case, the whole bank will say.
        lenient = replace(rules, skip_errors=True, allow_empty=True)
        SupportBank(data[number::count], rules=lenient, store=store, **arguments)
    distributed.barrier()
    return SupportBank(data, rules=rules, store=store, **arguments)


def _without(items: list[tuple[str, str]], others: list[tuple[str, str]]) -> list[tuple[str, str]]:
    gone = set(others)
    return [item for item in items if item not in gone]


def _table(items: list[SupportItem]) -> list[tuple[str, str, str, str]]:
    """What retrieval knows of items, next to their encodings."""
    return [(item.id, item.content, item.patient, item.group) for item in items]


def _numbered(names: Sequence[str | None]) -> tuple[dict[str | None, int], Tensor]:
    """Number of each name in the order of their first appearance, and of every entry (N,)."""
    numbers: dict[str | None, int] = {}
    entries = [numbers.setdefault(name, len(numbers)) for name in names]
    return numbers, torch.tensor(entries, dtype=torch.long)
