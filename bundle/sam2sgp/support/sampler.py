"""Which support items guide which query.

`SupportSampler` serves inference: per class, among the items that hold the class, the most similar ones (or random
ones). `EpisodeSupportSampler` serves training, where a batch is its own pool: never the query, never its patient.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from sam2sgp.errors import ConfigError, DataError

Mode = Literal["similarity", "random"]
MODES = get_args(Mode)


@dataclass(frozen=True)
class SupportSampler:
    """Choose K support items per query and class.

    Raises:
        ConfigError: unknown mode, or k below 1.
    """

    mode: str = "similarity"
    """"similarity" takes the K items of the highest cosine similarity, ties by their number; "random" draws without
    replacement, the same for every query of a call."""

    k: int = 8
    """Items per query and class, at least 1; fewer where fewer are eligible."""

    seed: int = 0
    """Seed of the random mode."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"retrieval is {self.mode!r}: expected one of {', '.join(MODES)}.")
        if self.k < 1:
            raise ConfigError(f"k is {self.k}: expected at least one support item per query.")

    def __call__(self, similarity: Tensor, eligible: Tensor) -> tuple[Tensor, Tensor]:
        """Choose for one class.

        Args:
            similarity: (B, N) cosine similarity of queries and items, in [-1, 1].
            eligible: (N,) bool, items that may be used.

        Returns:
            Indices (B, K) into the N items, best first, and their similarities (B, K); K = min(k, eligible items).
        """
        count = min(self.k, int(eligible.sum()))
        if self.mode == "random":
            generator = torch.Generator().manual_seed(self.seed)
            candidates = torch.nonzero(eligible.cpu())[:, 0]
            chosen = candidates[torch.randperm(len(candidates), generator=generator)[:count]]
            index = chosen.to(similarity.device).expand(len(similarity), -1)
            return index, similarity.gather(1, index)
        ranked = similarity.masked_fill(~eligible, -torch.inf)
        # A stable sort, unlike topk, resolves ties the same way on every device.
        values, order = ranked.sort(dim=1, descending=True, stable=True)
        return order[:, :count], values[:, :count]


class EpisodeSupportSampler:
    """Choose the support of every image of a batch of episodes among the other images of its episode.

    Args:
        min_k, max_k: bounds of K, drawn for each batch.

    Raises:
        ConfigError: the bounds are not 1 <= min_k <= max_k.
    """

    def __init__(self, min_k: int = 1, max_k: int = 5) -> None:
        if not 1 <= min_k <= max_k:
            raise ConfigError(f"min_k, max_k are {min_k}, {max_k}: expected 1 <= min_k <= max_k.")
        self.min_k = min_k
        self.max_k = max_k

    def __call__(self, patient: Tensor, holds: Tensor, seed: int) -> Tensor:
        """Choose.

        Args:
            patient: (E, G) number of the patient of each image.
            holds: (E, G) bool, images whose mask is not empty.
            seed: of the choice; the same seed gives the same choice.

        Returns:
            Indices (E * G, 1, K) into the flattened batch of E * G images. Images are drawn without replacement where
            enough are eligible. Where every image of another patient is empty, those are used.

        Raises:
            DataError: an episode holds images of one patient only.
        """
        generator = torch.Generator().manual_seed(seed)
        episodes, images = patient.shape
        k = int(torch.randint(self.min_k, self.max_k + 1, (1,), generator=generator))
        rows = []
        for episode in range(episodes):
            for query in range(images):
                others = (patient[episode] != patient[episode, query]).cpu()
                full = others & holds[episode].cpu()
                candidates = torch.nonzero(full if full.any() else others)[:, 0]
                if not len(candidates):
                    raise DataError("An episode of training expected images of at least two patients, found one.")
                order = torch.randperm(len(candidates), generator=generator)
                chosen = candidates[order.repeat(-(-k // len(order)))[:k]]
                rows.append(chosen + episode * images)
        return torch.stack(rows)[:, None].to(patient.device)
