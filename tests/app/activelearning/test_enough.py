"""What is said of a curve: only what its numbers bear."""

import numpy as np
import pytest
from scipy.stats import ttest_ind

from lib.activelearning.enough import interval_of, verdict_of

NOISE = np.random.default_rng(0).normal(0, 0.02, 30)


@pytest.mark.parametrize(
    ("kind", "dice"),
    [
        ("few", [0.2] * 3 + [0.9] * 6),
        ("better", [0.2] * 10 + list(0.6 + NOISE[:10]) + list(0.8 + NOISE[10:20])),
        ("worse", [0.2] * 10 + list(0.8 + NOISE[:10]) + list(0.6 + NOISE[10:20])),
        ("level", [0.2] * 10 + list(0.8 + NOISE[:10]) + list(0.79 + NOISE[:10])),
        ("level", [1.0] * 12),
        ("better", [0.2] * 4 + [0.6, 0.7, 0.65, 0.6] + [1.0] * 4),
        ("open", [0.1, 0.9, 0.5] * 4),
    ],
)
def test_the_last_third_is_compared_with_the_third_before(kind, dice):
    assert verdict_of(dice).kind == kind


def test_the_sentence_gives_the_reason_with_the_interval():
    before, last = list(0.6 + NOISE[:5]), list(0.8 + NOISE[5:10])
    text = verdict_of([0.0] * 5 + before + last).text
    found = ttest_ind(last, before, equal_var=False).confidence_interval(0.95)
    gain = np.mean(last) - np.mean(before)
    assert f"{np.mean(last):.2f} over the last 5 labels and {np.mean(before):.2f} over the 5 before" in text
    assert f"a difference of {gain:+.2f} (95 % interval {found.low:+.2f} to {found.high:+.2f})" in text


def test_the_mean_of_one_image_is_known_to_nobody():
    assert interval_of([0.7]) == (0.0, 1.0)
    low, high = interval_of([0.5, 0.7, 0.9])
    assert low == pytest.approx(0.7 - 4.3027 * 0.2 / 3**0.5, abs=1e-3) and high == 1.0
