"""Whether there are enough labels, said in one sentence with its reason.

In: Dice between each prediction that was shown and the label that was approved in its place, in the order of approval.
Out: a verdict, of the last third against the third before, with the 95 % interval of the difference (Welch's, for two
samples of unequal variance).
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

MIN_LABELS = 10
# A gain in Dice that is worth labelling on.
WORTH = 0.03


@dataclass(frozen=True)
class Verdict:
    """What is said.

    Attributes:
        kind: "few", "better", "level", "open" or "worse". text: the sentence.
    """

    kind: str
    text: str


def verdict_of(dice: Sequence[float]) -> Verdict:
    """Whether predictions still get better."""
    if len(dice) < MIN_LABELS:
        return Verdict(
            "few",
            f"Too few labels to say: {len(dice)} of at least {MIN_LABELS} approved labels can be compared with the "
            "prediction that was shown.",
        )
    count = len(dice) // 3
    last, before = dice[-count:], dice[-2 * count : -count]
    gain = statistics.mean(last) - statistics.mean(before)
    margin = _margin(last, before)
    low, high = gain - margin, gain + margin
    reason = (
        f"Dice was {statistics.mean(last):.2f} over the last {count} labels and {statistics.mean(before):.2f} over the "
        f"{count} before, a difference of {gain:+.2f} (95 % interval {low:+.2f} to {high:+.2f})."
    )
    if low > 0:
        return Verdict("better", f"Not yet: predictions still get better. {reason}")
    if high < 0:
        return Verdict(
            "worse",
            f"Not clear: predictions got worse, so the newer images may be of another kind, or a label wrong. {reason}",
        )
    if high <= WORTH:
        return Verdict("level", f"Probably: more labels of this kind would hardly make predictions better. {reason}")
    return Verdict("open", f"It can't be told yet. {reason}")


def interval_of(values: Sequence[float]) -> tuple[float, float]:
    """The mean's 95 % interval, within [0, 1]; of one value all that."""
    if len(values) < 2:
        return 0.0, 1.0
    mean, error = statistics.mean(values), math.sqrt(statistics.variance(values) / len(values))
    margin = error * float(stdtrit(len(values) - 1, 0.975))
    return max(mean - margin, 0.0), min(mean + margin, 1.0)


def _margin(first: Sequence[float], second: Sequence[float]) -> float:
    """Half the 95 % interval of the difference between two means."""
    parts = [statistics.variance(values) / len(values) for values in (first, second)]
    total = sum(parts)
    if not total:
        return 0.0
    freedom = total**2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, (first, second), strict=True))
    return math.sqrt(total) * float(stdtrit(freedom, 0.975))
