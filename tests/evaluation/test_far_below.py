"""Which cases are far below the others."""

import pytest

from sam2sgp.evaluation.far_below import far_below


@pytest.mark.parametrize(
    ("dice", "found"),
    [
        ([0.9, 0.8, 0.1, 0.93, 0.7], [2]),
        ([0.9, 0.8, 0.0, 0.93, 0.7, 0.05], [2, 5]),
        # A hard case, one of few, and one among cases that are hard.
        ([0.9, 0.8, 0.11, 0.93, 0.7], []),
        ([0.9, 0.8, 0.0, 0.93], []),
        ([0.6, 0.5, 0.0, 0.6, 0.5], []),
        ([], []),
    ],
)
def test_only_next_to_nothing_among_good_ones_is_far_below(dice, found):
    assert far_below(dice) == found
