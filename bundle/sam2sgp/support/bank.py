"""The support bank: labelled slices, and what the network makes of them.

The truth is the data; the encoded part is a cache. It is computed once by `encode`, after which a query costs the same
however large the bank is, but for the cosine similarities.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sam2sgp.data.folders import check_label_values, choose_slices, complete_class_names
from sam2sgp.errors import DataError
from sam2sgp.networks import SAM2SGP, ImageFeatures, SupportMemory
from sam2sgp.support.sampler import SupportSampler
from sam2sgp.transforms.array import Region, pixel_size, thickness, to_three_channels

# Mean thickness in network pixels below which a structure gets lost at the network's size.
THIN = 3.0


@dataclass
class SupportItem:
    """One 2D image or one slice of a volume with its label.

    image: (C, S, S) float16 in [0, 1]. label: (S, S) uint8 class map. slice: its index, None for a 2D image.
    regions: {class value: images (1, C, S, S) float16 and masks (1, S, S) bool}, the item around each of its classes.
    tiles: likewise (4, C, S, S) and (4, S, S), its tiles, for those of its classes that are thin here.
    """

    id: str
    image: Tensor
    label: Tensor
    patient: str
    group: str
    slice: int | None
    regions: dict[int, tuple[Tensor, Tensor]]
    tiles: dict[int, tuple[Tensor, Tensor]]


@dataclass
class Retrieved:
    """Support of one class for B queries: item numbers (B, K), cosine similarities (B, K) and their memory."""

    value: int
    index: Tensor
    similarity: Tensor

    def rows(self, rows: slice | Tensor) -> "Retrieved":
        """The same for some of the queries."""
        return Retrieved(self.value, self.index[rows], self.similarity[rows])


class SupportBank:
    """Support items of a data folder, encoded on demand.

    Args:
        data: labelled cases, dicts with `image`, `label`, `patient`, `group` and `name`.
        transform: preprocessing of a case (image and label), or a `CaseCache`-like mapping of cases.
        class_names: declared names by value; {} names the values found `class_1`, ….
        slices_per_class: slices taken from each volume for each class.
        max_items: keep at most this many items, drawn evenly over the cases with `seed`; None keeps all.
        seed: of that choice.
        batch_size: images encoded at a time.
        progress: show bars.

    Raises:
        DataError: there is no labelled image, or none with an object; a label has an undeclared value.
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
    ) -> None:
        self.batch_size = batch_size
        self.progress = progress
        self.items: list[SupportItem] = []
        order = np.random.default_rng(seed).permutation(len(data)) if max_items else range(len(data))
        values: set[int] = set()
        bar = tqdm([data[i] for i in order], desc="Reading the support set", unit="case", disable=not progress)
        for case in bar:
            if max_items and len(self.items) >= max_items:
                break
            prepared = transform(case)
            found = torch.unique(prepared["label"]).tolist()
            check_label_values(case["label"], found, class_names or {})
            new = self._items(case, prepared, slices_per_class)
            self.items += new[: max_items - len(self.items)] if max_items else new
            values |= {value for value in found if value}
        if not self.items:
            where = Path(data[0]["label"]).parent if data else "the support set"
            raise DataError(
                f"{where}: expected labelled images with at least one object, found {len(data)} without any; add pairs "
                "whose label is not empty."
            )
        self.class_names = complete_class_names(class_names or {}, sorted(values))
        self.class_values = sorted(self.class_names)
        held = [[bool((item.label == value).any()) for value in self.class_values] for item in self.items]
        self.holds = torch.tensor(held)
        self.forget()

    def forget(self) -> None:
        """Drop what was encoded, because the network has changed."""
        self.embedding: Tensor | None = None
        self.memory: SupportMemory | None = None
        self._regions: dict[int, tuple[Tensor, SupportMemory, list[int]]] = {}

    @staticmethod
    def _items(case: dict, prepared: dict, slices_per_class: int) -> list[SupportItem]:
        label = prepared["label"]
        flat = label.flatten(1)
        chosen: set[int] = set()
        for value in torch.unique(label).tolist():
            if value:
                chosen |= set(choose_slices((flat == value).sum(1).numpy(), slices_per_class))
        volume = len(label) > 1
        pixel = pixel_size(prepared["geometry"].spacing)
        size = prepared["image"].shape[-1]

        def closely(index: int) -> dict[str, dict[int, tuple[Tensor, Tensor]]]:
            image, label = prepared["image_full"][index][None], prepared["label_full"][index]
            found: dict[str, dict] = {"regions": {}, "tiles": {}}
            for value in torch.unique(label[label > 0]).tolist():
                mask = label == value
                views = {"regions": [Region.around(mask, size, pixel, below=torch.inf)]}
                if thickness(prepared["label"][index] == value) < THIN:
                    views["tiles"] = Region.tiles(tuple(label.shape), size, pixel)
                for kind, rectangles in views.items():
                    images = torch.cat([rectangle.apply(image) for rectangle in rectangles]).half()
                    masks = [rectangle.apply_label(mask[None].to(torch.uint8)) > 0 for rectangle in rectangles]
                    found[kind][value] = images, torch.cat(masks)
            return found

        return [
            SupportItem(
                id=f"{case['name']}#{index}" if volume else case["name"],
                image=prepared["image"][index].half(),
                label=label[index].to(torch.uint8),
                patient=case["patient"],
                group=case["group"],
                slice=index if volume else None,
                **closely(index),
            )
            for index in sorted(chosen)
        ]

    def __len__(self) -> int:
        return len(self.items)

    def masks(self, items: list[SupportItem]) -> Tensor:
        """Binary masks (len(items), C, S, S) float32 of all classes."""
        labels = torch.stack([item.label for item in items])
        return torch.stack([labels == value for value in self.class_values], 1).float()

    @torch.no_grad()
    def encode(self, network: SAM2SGP, device: torch.device | str = "cpu") -> None:
        """Encode every item with the network as it is now."""
        embeddings, memories = [], []
        bar = tqdm(desc="Encoding the support set", total=len(self), unit="item", disable=not self.progress)
        with bar:
            for start in range(0, len(self), self.batch_size):
                items = self.items[start : start + self.batch_size]
                image = torch.stack([to_three_channels(item.image.float()) for item in items]).to(device)
                features = network.encode(image)
                embeddings.append(network.retrieval_embedding(features))
                memories.append(network.encode_support(features, self.masks(items).to(device)))
                bar.update(len(items))
        self.embedding = torch.cat(embeddings)
        self.memory = SupportMemory.concatenate(memories)

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
        if self.embedding is None:
            raise DataError("The support set is not encoded: call `encode` with the network first.")
        similarity = network.retrieval_embedding(features) @ self.embedding.T
        allowed = self._allowed(patient, group)
        retrieved = []
        for column, value in enumerate(self.class_values):
            eligible = (self.holds[:, column] & allowed).to(similarity.device)
            if eligible.any():
                retrieved.append(Retrieved(value, *sampler(similarity, eligible)))
        return retrieved

    def _allowed(self, patient: str | None, group: str | None) -> Tensor:
        """(N,) bool: items of other patients, and of the group where there are such."""
        allowed = torch.tensor([patient is None or item.patient != patient for item in self.items])
        of_group = torch.tensor([item.group == group for item in self.items])
        return allowed & of_group if bool((of_group & allowed).any()) else allowed

    @torch.no_grad()
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
        if column not in self._regions:
            self._regions[column] = self._encode_regions(network, column, features.embedding.device)
        embedding, memory, owner = self._regions[column]
        eligible = self._allowed(patient, group)[owner].to(embedding.device)
        if not eligible.any():
            return None
        index, _ = sampler(network.retrieval_embedding(features) @ embedding.T, eligible)
        return memory.select(index[:, None])

    def is_thin(self, column: int) -> bool:
        """Whether a class is thin in most of its items, so that tiles of the image show it better than one region."""
        value = self.class_values[column]
        holders = [item for item in self.items if value in item.regions]
        return 2 * sum(value in item.tiles for item in holders) > len(holders)

    def _encode_regions(
        self, network: SAM2SGP, column: int, device: torch.device
    ) -> tuple[Tensor, SupportMemory, list[int]]:
        """Embedding and memory of all regions (or tiles) of a class, and the number of the item each is of."""
        value, kind = self.class_values[column], "tiles" if self.is_thin(column) else "regions"
        views = [
            (image, mask, number)
            for number, item in enumerate(self.items)
            if value in getattr(item, kind)
            for image, mask in zip(*getattr(item, kind)[value], strict=True)
            if mask.any()
        ]
        embeddings, memories = [], []
        for start in range(0, len(views), self.batch_size):
            images, masks, _ = zip(*views[start : start + self.batch_size], strict=True)
            encoded = network.encode(torch.stack([to_three_channels(image.float()) for image in images]).to(device))
            embeddings.append(network.retrieval_embedding(encoded))
            memories.append(network.encode_support(encoded, torch.stack(masks)[:, None].float().to(device)))
        return torch.cat(embeddings), SupportMemory.concatenate(memories), [number for _, _, number in views]

    def select(self, retrieved: list[Retrieved]) -> SupportMemory:
        """Memory with leading dimensions (B, C, K) of classes that share one K."""
        index = torch.stack([entry.index for entry in retrieved], 1)
        columns = torch.tensor([self.class_values.index(entry.value) for entry in retrieved], device=index.device)
        return self.memory.select(index, columns)
