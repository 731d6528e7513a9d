"""How clear a sign of a class an image gives, next to what the labelled images give of it.

In: SAM2's object scores. Out: which of the classes found may not be there at all.

The network was mostly shown images that hold the class, so it finds something in most others, too, and its
probabilities are as high there. Its object score is lower, but by how much differs from task to task. So some support
images are segmented like queries, each guided by other patients: an image with a score clearly below all of theirs
shows less sign of the class than any labelled image does. What was found there is not taken away, because it may be a
faint object; it is said. Measured by `benchmarks/false_spots.py`, see docs/results.md.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sam2sgp.support.bank import Retrieved, SupportBank
from sam2sgp.support.sampler import SupportSampler

# Support images judged, at most, each of another patient; with fewer patients nothing is known.
MAX_JUDGED = 8
MIN_PATIENTS = 3
# How far below the lowest score of a support image, in logits, a score has to be.
MARGIN = 0.75

# (number of an item, what guides it) -> object scores (C,).
Judge = Callable[[int, list[Retrieved]], Tensor]


class LeastSigns:
    """The lowest object scores that the items of an encoded support bank have; learned again when it has changed.

    Args:
        bank: the support bank. sampler: chooses the items that guide an item as a query.
    """

    def __init__(self, bank: SupportBank, sampler: SupportSampler) -> None:
        self.bank = bank
        self.sampler = sampler
        self.forget()

    def forget(self) -> None:
        """Forget what was learned, because the network has changed."""
        self._least: dict[str | None, Tensor] = {}
        self._version: int | None = None
        # Scores of items by what they depend on: of this version of the bank, and of the one before.
        self._judged: dict[tuple, Tensor] = {}
        self._judged_before: dict[tuple, Tensor] = {}

    def __call__(self, judge: Judge, group: str | None = None) -> Tensor:
        """Scores (C,) on the CPU below which an image shows less sign of a class than any labelled image; minus
        infinity for a class that fewer than `MIN_PATIENTS` of the patients judged hold.

        Args:
            judge: segments an item as a query.
            group: where the bank holds items of this group, only those count.
        """
        if self._version != self.bank.version:
            self._version, self._least = self.bank.version, {}
            self._judged, self._judged_before = {}, self._judged
        group = group if group in self.bank.groups else None
        if group not in self._least:
            self._least[group] = self._learn(judge, self._chosen(group))
        return self._least[group]

    def _chosen(self, group: str | None) -> list[int]:
        """Of each patient the item with the most classes, the largest of these; of many patients an even choice."""
        bank = self.bank
        best: dict[str, tuple[int, float, int]] = {}
        for number, item in enumerate(bank.items):
            if group is None or item.group == group:
                area = sum(target.area_share for target in item.measures.targets.values())
                worth = int(bank.holds[number].sum()), area, -number
                best[item.patient] = max(best.get(item.patient, worth), worth)
        numbers = sorted(-worth[-1] for worth in best.values())
        if len(numbers) < MIN_PATIENTS:
            return []
        places = torch.linspace(0, len(numbers) - 1, min(MAX_JUDGED, len(numbers))).round().long().tolist()
        return [numbers[place] for place in places]

    def _learn(self, judge: Judge, numbers: Sequence[int]) -> Tensor:
        bank = self.bank
        least = torch.full((len(bank.class_values),), -torch.inf)
        if not numbers:
            return least
        scores = []
        for number in numbers:
            retrieved = bank.retrieve_for(number, self.sampler)
            guides = ((entry.value, *(bank.items[i].content for i in entry.index[0])) for entry in retrieved)
            key = bank.items[number].content, tuple(bank.class_values), *guides
            known = self._judged.get(key)
            if known is None:
                known = self._judged_before.get(key)
            self._judged[key] = judge(number, retrieved).cpu() if known is None else known
            scores.append(self._judged[key])
        holds = bank.holds[list(numbers)]
        lowest = torch.stack(scores).masked_fill(~holds, torch.inf).amin(0) - MARGIN
        return torch.where(holds.sum(0) >= MIN_PATIENTS, lowest, least)
