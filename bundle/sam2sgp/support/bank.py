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
from sam2sgp.transforms.array import to_three_channels


@dataclass
class SupportItem:
    """One 2D image or one slice of a volume with its label.

    image: (C, S, S) float16 in [0, 1]. label: (S, S) uint8 class map. slice: its index, None for a 2D image.
    """

    id: str
    image: Tensor
    label: Tensor
    patient: str
    group: str
    slice: int | None


@dataclass
class Retrieved:
    """Support of one class for B queries: item numbers (B, K), cosine similarities (B, K) and their memory."""

    value: int
    index: Tensor
    similarity: Tensor


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
        self.embedding: Tensor | None = None
        self.memory: SupportMemory | None = None

    @staticmethod
    def _items(case: dict, prepared: dict, slices_per_class: int) -> list[SupportItem]:
        label = prepared["label"]
        flat = label.flatten(1)
        chosen: set[int] = set()
        for value in torch.unique(label).tolist():
            if value:
                chosen |= set(choose_slices((flat == value).sum(1).numpy(), slices_per_class))
        volume = len(label) > 1
        return [
            SupportItem(
                id=f"{case['name']}#{index}" if volume else case["name"],
                image=prepared["image"][index].half(),
                label=label[index].to(torch.uint8),
                patient=case["patient"],
                group=case["group"],
                slice=index if volume else None,
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
        parts = zip(*((m.tokens, m.prior_key, m.prior_mask) for m in memories), strict=True)
        self.memory = SupportMemory(*(None if part[0] is None else torch.cat(part) for part in parts))

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
        allowed = torch.tensor([patient is None or item.patient != patient for item in self.items])
        of_group = torch.tensor([item.group == group for item in self.items])
        if bool((of_group & allowed).any()):
            allowed &= of_group
        retrieved = []
        for column, value in enumerate(self.class_values):
            eligible = (self.holds[:, column] & allowed).to(similarity.device)
            if eligible.any():
                retrieved.append(Retrieved(value, *sampler(similarity, eligible)))
        return retrieved

    def select(self, retrieved: list[Retrieved]) -> SupportMemory:
        """Memory with leading dimensions (B, C, K) of classes that share one K."""
        index = torch.stack([entry.index for entry in retrieved], 1)
        columns = torch.tensor([self.class_values.index(entry.value) for entry in retrieved], device=index.device)
        return self.memory.select(index, columns)
