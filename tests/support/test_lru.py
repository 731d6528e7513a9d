"""A cache bounded in bytes forgets what was used longest ago."""

import pytest

from sam2sgp.errors import ConfigError
from sam2sgp.support.lru import ByteLRU
from tests.helpers.pairs import bank


def test_the_least_recently_used_values_leave_first():
    recent = ByteLRU(3 / 2**20, len)
    for key in "abc":
        recent[key] = key.upper()
    recent.get("a")
    recent["d"] = "D"
    assert [recent.get(key) for key in "abcd"] == ["A", None, "C", "D"]
    recent["large"] = "four"
    assert recent.get("large") is None and len(recent) == 3
    recent["a"] = "all"
    assert recent.get("a") == "all" and recent.currsize == 3 and len(recent) == 1
    recent["a"] = "four"
    assert "a" not in recent and recent.currsize == 0


@pytest.mark.parametrize("size", [-1, None, "much", True, float("nan")])
def test_an_impossible_size_is_refused(folder, cache, size):
    with pytest.raises(ConfigError, match="MiB"):
        bank(folder, cache, megabytes=size)
