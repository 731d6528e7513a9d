"""Which of several cases agree with what is expected so much less than the others that something else may be wrong."""

from collections.abc import Sequence
from statistics import median

# With fewer cases, none shows what is usual. The others agree well, and this one hardly.
LEAST_CASES, USUAL_DICE, HARDLY = 5, 0.7, 0.1


def far_below(dice: Sequence[float]) -> list[int]:
    """Numbers of the cases whose Dice is next to nothing while that of the others is good.

    Example:
        >>> far_below([0.9, 0.8, 0.02, 0.93, 0.7])
        [2]
        >>> far_below([0.9, 0.8, 0.02, 0.93]), far_below([0.5, 0.4, 0.02, 0.6, 0.5])
        ([], [])
    """
    found = []
    for number, own in enumerate(dice):
        others = [*dice[:number], *dice[number + 1 :]]
        if own <= HARDLY and len(dice) >= LEAST_CASES and median(others) >= USUAL_DICE:
            found.append(number)
    return found
