"""Which classes are one piece: told by the largest connected part of each in the labelled volumes.

In: support items of volumes, which know how much of each class lies in its largest part. Out: class values. What that
changes in a query: `sam2sgp.inferers.one_piece`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sam2sgp.support.items import SupportItem

# A class is one piece where at least so many patients' volumes hold it, each with so much of it in its largest part:
# specks of a label that was drawn slice by slice don't count.
PIECE_PATIENTS = 3
MAIN_SHARE = 0.95


@dataclass(frozen=True, eq=False)
class LabelledVolumes:
    """The V labelled volumes of a support set of N items and C classes.

    class_values: of the classes. first: (V,) number of the first item of each volume. main_shares: (V, C) share of a
    class, in (0, 1], that lies in its largest part, NaN where the volume does not hold it.
    """

    class_values: Sequence[int]
    first: Tensor
    main_shares: Tensor

    @classmethod
    def of(cls, items: Sequence[SupportItem], class_values: Sequence[int]) -> "LabelledVolumes":
        """Those of support items; items of one volume are of one case."""
        first: dict[int, int] = {}
        for number, item in enumerate(items):
            if item.main_shares:
                first.setdefault(id(item.case), number)
        numbers = list(first.values())
        shares = [[items[number].main_shares.get(value, torch.nan) for value in class_values] for number in numbers]
        table = torch.tensor(shares, dtype=torch.float64).reshape(len(numbers), len(class_values))
        return cls(class_values, torch.tensor(numbers, dtype=torch.long), table)

    def one_piece(self, allowed: Tensor, patient_of: Tensor) -> list[int]:
        """Values of the classes that each of some volumes shows in one piece, of enough patients.

        Args:
            allowed: (N,) bool, items whose volumes count. patient_of: (N,) number of each item's patient.
        """
        counts = allowed[self.first]
        shares, owner = self.main_shares[counts], patient_of[self.first[counts]]
        held = ~shares.isnan()
        is_one = ((shares >= MAIN_SHARE) | ~held).all(0).tolist()
        patients = [len(owner[own].unique()) for own in held.unbind(1)]
        found = zip(self.class_values, is_one, patients, strict=True)
        return [value for value, one, number in found if one and number >= PIECE_PATIENTS]
