"""Whether new weights are better than old ones."""

import pytest

from lib.trainers.comparison import Comparison
from sam2sgp.errors import DataError


def test_a_gain_counts_that_exceeds_its_standard_error_over_the_patients_measured_with_both():
    before, after = {"a": 0.5, "b": 0.4, "c": 0.6, "gone": 0.0}, {"a": 0.6, "b": 0.5, "c": 0.9, "new": 1.0}
    found = Comparison.of(before, after)
    assert found.patients == 3 and found.before == pytest.approx(0.5) and found.after == pytest.approx(2 / 3)
    # Gains .1, .1, .3: standard deviation .1155.
    assert found.error == pytest.approx(0.11547 / 3**0.5, abs=1e-5) and found.exceeds(0.0)
    lucky = Comparison.of(before, {"a": 0.9, "b": 0.3, "c": 0.5})
    assert lucky.after > lucky.before and not lucky.exceeds(0.0)
    assert not Comparison.of(before, before).exceeds(0.0)
    # Better than weights whose adaptation gains as much it is not.
    assert found.exceeds(0.09) and not found.exceeds(0.11)
    with pytest.raises(DataError, match="at least 2 patients to judge .* found 1"):
        Comparison.of(before, {"a": 1.0})
