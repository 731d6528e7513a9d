"""Whether new weights are better than old ones, by the Dice of patients on whom neither was trained.

In: Dice by patient with both. Out: their means, the standard error of the gain, and a verdict: with few patients a gain
is often luck, and weights that are only luckier can be much worse on the next images.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sam2sgp.errors import DataError

MIN_JUDGED = 2


@dataclass(frozen=True)
class Comparison:
    """Mean Dice before and after, in [0, 1], standard error of the paired difference, and over how many patients."""

    before: float
    after: float
    error: float
    patients: int

    @classmethod
    def of(cls, before: Mapping[str, float], after: Mapping[str, float]) -> "Comparison":
        """Compare over the patients that were measured with both.

        Raises:
            DataError: there are fewer than two.
        """
        judged = sorted(before.keys() & after.keys())
        if len(judged) < MIN_JUDGED:
            raise DataError(
                f"Fine-tuning expected objects in readable labels of at least {MIN_JUDGED} patients to judge new "
                f"weights by, found {len(judged)}; approve labels with objects of more patients, then train again. "
                "The weights stay as they are."
            )
        old, new = (np.array([dice[patient] for patient in judged]) for dice in (before, after))
        error = np.std(new - old, ddof=1) / math.sqrt(len(judged))
        return cls(float(old.mean()), float(new.mean()), float(error), len(judged))

    def exceeds(self, gain: float) -> bool:
        """Whether the gain is larger than another one by more than its standard error."""
        return self.after - self.before - gain > self.error

    @property
    def metrics(self) -> dict[str, float]:
        """For logs and status."""
        return {
            "start_metric": self.before,
            "new_metric": self.after,
            "gain_error": self.error,
            "judged": self.patients,
        }

    def __str__(self) -> str:
        return (
            f"Mean Dice of {self.patients} patients, each judged by weights not trained on it: {self.before:.4f} "
            f"before, {self.after:.4f} after, a gain of {self.after - self.before:.4f} with a standard error of "
            f"{self.error:.4f}."
        )
