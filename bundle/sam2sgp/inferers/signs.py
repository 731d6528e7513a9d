"""How clear a sign of a class an image gives, next to what the labelled images give of it.

In: SAM2's object scores. Out: which of the classes found may not be there at all.

The network was mostly shown images that hold the class, so it finds something in most others, too, and its
probabilities are as high there. Its object score is lower, but by how much differs from task to task. So some support
images are segmented like queries, each guided by other patients: an image with a score clearly below all of theirs
shows less sign of the class than any labelled image does. What was found there is not taken away, because it may be a
faint object; it is said. Measured by `benchmarks/false_spots.py`, see docs/results.md.
"""

import torch
from torch import Tensor

from sam2sgp.inferers.items_as_queries import Judge, TaughtByItems

# Support images judged, at most, each of another patient; with fewer patients nothing is known.
MAX_JUDGED = 8
MIN_PATIENTS = 3
# How far below the lowest score of a support image, in logits, a score has to be.
MARGIN = 0.75


class LeastSigns(TaughtByItems[Tensor]):
    """Scores (C,) on the CPU below which an image shows less sign of a class than any labelled image; minus infinity
    for a class that fewer than `MIN_PATIENTS` of the patients judged hold."""

    def _learn(self, judge: Judge, members: list[int]) -> Tensor:
        bank = self.bank
        least = torch.full((len(bank.class_values),), -torch.inf)
        numbers = self._chosen(members)
        if not numbers:
            return least
        holds = bank.holds[numbers]
        lowest = self.items(judge, numbers).score.masked_fill(~holds, torch.inf).amin(0) - MARGIN
        return torch.where(holds.sum(0) >= MIN_PATIENTS, lowest, least)

    def _chosen(self, members: list[int]) -> list[int]:
        """The item of each patient with the most classes, the largest of these; an even choice of many patients.

        Patients of whom no item has a class say nothing of its signs.
        """
        bank = self.bank
        best: dict[str, tuple[int, float, int]] = {}
        for number in members:
            item = bank.items[number]
            area = sum(target.area_share for target in item.measures.targets.values())
            worth = int(bank.holds[number].sum()), area, -number
            best[item.patient] = max(best.get(item.patient, worth), worth)
        numbers = sorted(-worth[-1] for worth in best.values() if worth[0])
        if len(numbers) < MIN_PATIENTS:
            return []
        places = torch.linspace(0, len(numbers) - 1, min(MAX_JUDGED, len(numbers))).round().long().tolist()
        return [numbers[place] for place in places]
