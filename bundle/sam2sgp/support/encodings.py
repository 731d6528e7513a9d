"""What a network makes of support items: items in, tensors out.

    items ─ adopt a network ─ encode what is missing ─ pool of embeddings, by cut ─ gather memory of some rows

A cut is the whole of an item, or its crops of one class. What is encoded depends on the item's content, on the
preprocessing and on the network: weights, LoRA, switches, precision. On a CPU an item is encoded by itself, so that
its encoding depends on nothing else, not even in the last bit; then results are the same with and without a folder, in
one go or after an interruption.

With a store, encodings are on disk, and only embeddings are held; memory is read when it is asked for, through the
store's cache of bounded size. Without one everything is held in memory.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain

import safetensors.torch
import torch
from torch import Tensor

from sam2sgp import distributed
from sam2sgp.heap import give_back
from sam2sgp.networks import SAM2SGP, SupportMemory
from sam2sgp.progress import Bar
from sam2sgp.support.content import digest_of, network_fingerprint
from sam2sgp.support.items import SupportItem
from sam2sgp.support.tensor_store import Tensors, TensorStore
from sam2sgp.transforms.array import to_three_channels

ENCODED = "encoded"
NAMES_PER_COMMIT = 64
# After how many batches memory that is not used goes back to the system.
BATCHES_PER_TIDYING = 8
# Items whose regions are encoded, over all classes, and of each class at least: a set of many classes in many slices
# would encode thousands of regions before its first result.
MAX_CROPPED, LEAST_CROPPED = 480, 8
# Memory of an item by itself and by class; some are missing where the network has no prior.
OF_ITEM, OF_CLASS = ("prior_key", "gram"), ("tokens", "prior_mask", "gram_foreground")
# Called with how many more slices were looked at.
Step = Callable[[int], None]


@dataclass(frozen=True)
class Cut:
    """What of each item is encoded: the whole of it, or its regions or tiles of one class.

    kind: "item", or one of `CROPS`. value: of the class, where there is one. As a string it is part of names of files.
    """

    kind: str
    value: int | None = None

    def __str__(self) -> str:
        return self.kind if self.value is None else f"{self.kind}.{self.value}"


WHOLE = Cut("item")


@dataclass
class Pool:
    """Encoded rows of one cut of the items.

    embedding: (R, D). spans: first and past-the-last row of each encoding, by its name. owner: (R,) number of the item
    that a row is of. place: per row, its number within the item's encoding.
    """

    embedding: Tensor
    spans: dict[str, tuple[int, int]]
    owner: Tensor
    place: list[int]


class Encodings:
    """Encodings of items, made on demand and kept.

    Args:
        store: where they are kept; None: in memory.
        settings: hash of the preprocessing that items went through.
        batch_size: images encoded at a time on a GPU; on a CPU it is one.
        progress: show bars.

    Attributes:
        items: the support items. class_names: by value; class_values: of the C classes, sorted.
        embedding: (N, D) L2-normalised embeddings; None where nothing is encoded.
        fingerprint: hash of network and preprocessing that the encoding is of; None where nothing is encoded.
        network: that encodes; None: none yet.
    """

    def __init__(self, store: TensorStore | None, settings: str, batch_size: int = 8, progress: bool = True) -> None:
        self.store = store
        self.settings = settings
        self.batch_size = batch_size
        self.progress = progress
        self.items: list[SupportItem] = []
        self.class_names: dict[int, str] = {}
        self.class_values: list[int] = []
        # Without a store, encodings by name.
        self._held: dict[str, Tensors] = {}
        self.forget()

    def forget(self) -> None:
        """Drop what was encoded, because the network has changed. What is on disk stays."""
        self.embedding: Tensor | None = None
        self.fingerprint: str | None = None
        self.network: SAM2SGP | None = None
        self._device = torch.device("cpu")
        self._precision = False, torch.get_autocast_dtype("cpu")
        self._pools: dict[Cut, Pool] = {}
        self._outdated: dict[Cut, Pool] = {}
        self._held.clear()

    def set_items(self, items: list[SupportItem], class_names: dict[int, str]) -> None:
        """Other items, or other numbers of them: what is known of the old ones is used for the new ones."""
        self.items = items
        self.class_names = class_names
        self.class_values = sorted(class_names)
        self._outdated |= self._pools
        self._pools = {}

    def keep_only(self, contents: set[str]) -> None:
        """Without a store, drop the encodings of other items than those with these contents."""
        self._held = {name: value for name, value in self._held.items() if name.split(".")[0] in contents}

    def adopt(self, network: SAM2SGP, device: torch.device) -> None:
        """Encode with this network from now on, in the precision of the caller's autocast."""
        self.network, self._device = network, device
        self._precision = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        self.fingerprint = digest_of(network_fingerprint(network, device), self.settings)

    def masks(self, items: list[SupportItem]) -> Tensor:
        """Binary masks (len(items), C, S, S) float32 of all classes."""
        # A byte equals a value 256 higher in PyTorch.
        labels = torch.stack([item.label for item in items]).int()
        return torch.stack([labels == value for value in self.class_values], 1).float()

    def encode_share(self, number: int, count: int) -> None:
        """Encode the items of one of `count` processes that are not yet in the store, for all of them.

        Each item belongs to one process, whatever is there already.
        """
        # Items of the same content are one.
        first: dict[str, int] = {}
        for n, item in enumerate(self.items):
            first.setdefault(self._name(item, WHOLE), n)
        own = dict(list(first.items())[number::count])
        there = self._find(list(own))
        self._encode_all([n for name, n in own.items() if name not in there], WHOLE)

    def pool(self, cut: Cut, step: Step | None = None) -> Pool:
        """The encoded rows of a cut, encoding what is missing; `step` as of `SupportBank.encode`."""
        if cut not in self._pools:
            self._pools[cut] = self._build(cut, step)
            if cut == WHOLE:
                self.embedding = self._pools[cut].embedding
        return self._pools[cut]

    def gather(self, cut: Cut, index: Tensor, values: list[int]) -> SupportMemory:
        """Memory (B, C, K) of rows `index` (B, C, K) of a cut, for C classes. Reads each row once."""
        pool = self.pool(cut)
        rows, row = index.unique(return_inverse=True)
        owners = pool.owner[rows.cpu()].tolist()
        encodings = [self._encoding(number, cut) for number in owners]
        places = [pool.place[i] for i in rows.tolist()]
        classes = torch.arange(len(values), device=index.device)[None, :, None]
        pairs, pair = (row * len(values) + classes).unique(return_inverse=True)
        chosen = []
        for position, number in (divmod(number, len(values)) for number in pairs.tolist()):
            # A region or tile shows one class, a whole item all that it holds.
            held = self.items[owners[position]].info.holds if cut == WHOLE else values
            chosen.append((encodings[position], places[position], held.index(values[number])))
        memory: dict[str, Tensor | None] = {}
        for name in (*OF_ITEM, *OF_CLASS):
            if name not in encodings[0]:
                memory[name] = None
            elif name in OF_ITEM:
                stack = torch.stack([e[name][place] for e, place in zip(encodings, places, strict=True)])
                memory[name] = stack.to(index.device)[row]
            else:
                stack = torch.stack([encoding[name][place, class_index] for encoding, place, class_index in chosen])
                memory[name] = stack.to(index.device)[pair]
        return SupportMemory(**memory, item=index)

    def prune(self, keep: Iterable[str] = ()) -> list[str]:
        """Delete from the store what other networks and preprocessings encoded, see `SupportBank.prune`."""
        if self.store is None:
            return []
        kept = {*keep, self.fingerprint}
        folder = self.store.directory / ENCODED
        found = sorted(path.name for path in folder.iterdir() if path.name not in kept) if folder.is_dir() else []
        self.store.remove([f"{ENCODED}/{name}" for name in found], ENCODED)
        self.store.sweep()
        return found

    def _name(self, item: SupportItem, cut: Cut) -> str:
        return f"{item.content}.{cut}"

    def _folder(self) -> str:
        return f"{ENCODED}/{self.fingerprint}"

    def _build(self, cut: Cut, step: Step | None) -> Pool:
        numbers = list(range(len(self.items)))
        if cut != WHOLE:
            numbers = self._cropped([n for n in numbers if cut.value in getattr(self.items[n].info, cut.kind)])
        names = [self._name(self.items[n], cut) for n in numbers]
        first = dict(zip(reversed(names), reversed(numbers), strict=True))
        old = self._outdated.pop(cut, None)
        found = {name: old.embedding[slice(*old.spans[name])] for name in first if name in old.spans} if old else {}
        found |= self._find([name for name in first if name not in found])
        missing = sorted(number for name, number in first.items() if name not in found)
        found |= self._encode_all(missing, cut, step)
        spans: dict[str, tuple[int, int]] = {}
        owner: list[int] = []
        place: list[int] = []
        parts, stop = [], 0
        for name, number in zip(names, numbers, strict=True):
            rows = len(found[name])
            spans[name] = stop, stop + rows
            stop += rows
            owner += [number] * rows
            place += range(rows)
            if rows:
                parts.append(found[name])
        embedding = torch.cat(parts).to(self._device) if parts else torch.zeros(0, 0, device=self._device)
        return Pool(embedding, spans, torch.tensor(owner, dtype=torch.long), place)

    def _cropped(self, numbers: list[int]) -> list[int]:
        """Choose the items that are cropped, by turns from each case; the same ones when others come or go."""
        most = max(LEAST_CROPPED, MAX_CROPPED // max(1, len(self.class_values)))
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
            return {name: self._held[name]["embedding"] for name in names if name in self._held}
        folder = self._folder()
        there = self.store.names(folder)
        known = self.store.metadata(ENCODED, [f"{folder}/{name}" for name in names if f"{folder}/{name}" in there])
        found = {key.rpartition("/")[2]: safetensors.torch.load(value)["embedding"] for key, value in known.items()}
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
            self.store.add_metadata(ENCODED, {f"{self._folder()}/{name}": value for name, value in packed.items()})

    def _encode_all(self, numbers: list[int], cut: Cut, step: Step | None = None) -> Tensors:
        """Encode items. Returns the embeddings (R, D) by name."""
        found: Tensors = {}
        unlisted: Tensors = {}
        batch = self.batch_size if self._device.type == "cuda" and cut == WHOLE else 1
        start = len(numbers) * distributed.rank() // distributed.world_size()
        numbers = numbers[start:] + numbers[:start]
        what = "Encoding the support set" if cut.value is None else f"Encoding regions of {self.class_names[cut.value]}"
        silent = not self.progress or not numbers
        bar = Bar(desc=what, total=len(numbers), unit="item", leave=cut == WHOLE, disable=silent)
        try:
            with bar:
                for start in range(0, len(numbers), batch):
                    if step is not None:
                        step(0)
                    chosen = numbers[start : start + batch]
                    for name, encoding in self._encode(chosen, cut).items():
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

    def _encode(self, numbers: list[int], cut: Cut) -> dict[str, Tensors]:
        """Encodings by name, as far as they are not there yet; they are kept."""
        names = {self._name(self.items[n], cut): n for n in numbers}
        encodings = {}
        if self.store is not None:
            for name in names:
                encoding = self.store.read(f"{self._folder()}/{name}")
                if encoding is not None:
                    encodings[name] = encoding
        missing = [name for name in names if name not in encodings]
        if missing:
            items = [self.items[names[name]] for name in missing]
            made = self._encode_items(items) if cut == WHOLE else [self._encode_crops(items[0], cut)]
            for name, encoding in zip(missing, made, strict=True):
                # Copies: a slice keeps the memory of the whole batch, and safetensors stores only contiguous tensors.
                encoding = {key: value.clone(memory_format=torch.contiguous_format) for key, value in encoding.items()}
                if self.store is None:
                    self._held[name] = encoding
                else:
                    encoding = {key: value.cpu() for key, value in encoding.items()}
                    self.store.write(f"{self._folder()}/{name}", encoding)
                encodings[name] = encoding
        return encodings

    def _encode_items(self, items: list[SupportItem]) -> list[Tensors]:
        """One row per item: memory for the classes it holds, in the order of `ItemInfo.holds`."""
        held = sorted(set(chain.from_iterable(item.info.holds for item in items)))
        masks = self.masks(items)[:, [self.class_values.index(value) for value in held]]
        embedding, memory = self._through_network([item.image for item in items], masks)
        if memory is None:
            return [{"embedding": row[None]} for row in embedding]
        encodings = []
        for row, item in enumerate(items):
            own = [held.index(value) for value in item.info.holds]
            fields = {name: getattr(memory, name) for name in (*OF_ITEM, *OF_CLASS)}
            encoding = {
                name: values[row : row + 1] if name in OF_ITEM else values[row : row + 1, own]
                for name, values in fields.items()
                if values is not None
            }
            encoding["embedding"] = embedding[row : row + 1]
            encodings.append(encoding)
        return encodings

    def _encode_crops(self, item: SupportItem, cut: Cut) -> Tensors:
        """One row per region or tile that shows the class."""
        images, masks = getattr(item, cut.kind)[cut.value]
        shown = masks.flatten(1).any(1)
        if not shown.any():
            return {"embedding": torch.zeros(0, 0)}
        embedding, memory = self._through_network(list(images[shown]), masks[shown][:, None].float())
        fields = {name: getattr(memory, name) for name in (*OF_ITEM, *OF_CLASS)}
        return {"embedding": embedding} | {name: values for name, values in fields.items() if values is not None}

    @torch.no_grad()
    def _through_network(self, images: list[Tensor], masks: Tensor) -> tuple[Tensor, SupportMemory | None]:
        """Embeddings (n, D) and memory (n, C) of images (C', S, S) with masks (n, C, S, S); None for C = 0."""
        network = self.network
        assert network is not None, "nothing is encoded before a network is adopted"
        enabled, dtype = self._precision
        image = torch.stack([to_three_channels(image.float()) for image in images]).to(self._device)
        with torch.autocast(self._device.type, dtype=dtype, enabled=enabled):
            features = network.encode(image)
            embedding = network.retrieval_embedding(features)
            memory = network.encode_support(features, masks.to(self._device)) if masks.shape[1] else None
            return embedding, memory

    def _encoding(self, number: int, cut: Cut) -> Tensors:
        """The encoding of an item; made again if its file is gone."""
        name = self._name(self.items[number], cut)
        found = self._held.get(name) if self.store is None else self.store.read(f"{self._folder()}/{name}")
        return self._encode([number], cut)[name] if found is None else found
