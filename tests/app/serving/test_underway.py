"""How far segmentations have got."""

import pytest

from lib.serving.underway import Underway


def test_the_one_that_began_last_is_told_and_none_of_what_ended_or_failed():
    underway = Underway()
    with underway.segmenting("a", 30) as first:
        first(10)
        with pytest.raises(ValueError), underway.segmenting("a", 60) as second:
            second(45)
            assert underway.told("a") == {"done": 45, "total": 60}
            raise ValueError
        assert underway.told("a") == {"done": 10, "total": 30}
        # One that had to begin again, for lack of memory.
        first(25)
        assert underway.told("a") == {"done": 30, "total": 30}
    assert underway.told("a") == {"done": 0, "total": 0}
