"""A cache in memory that is bounded in bytes and forgets what was used longest ago. For one thread at a time."""

from collections.abc import Callable, Hashable
from typing import Any

from cachetools import LRUCache

from sam2sgp.errors import ConfigError


class ByteLRU(LRUCache):
    """Values by key, of which the most recently used ones that fit are kept; one that is too large by itself is not.

    Args:
        megabytes: bound of all values together, in MiB; 0 keeps nothing.
        size_of: bytes of a value.

    Raises:
        ConfigError: the bound is not a number of at least 0.

    Example:
        >>> cache = ByteLRU(1, len)
        >>> cache["a"] = bytes(2**19)
        >>> cache["b"] = bytes(2**20 + 1)
        >>> list(cache), cache.currsize
        (['a'], 524288)
    """

    def __init__(self, megabytes: float, size_of: Callable[[Any], int]) -> None:
        if isinstance(megabytes, bool) or not isinstance(megabytes, int | float) or not megabytes >= 0:
            raise ConfigError(f"The size of a cache is {megabytes!r}: expected a number of MiB, 0 for none.")
        super().__init__(int(megabytes * 2**20), size_of)

    def __setitem__(self, key: Hashable, value: Any) -> None:
        try:
            super().__setitem__(key, value)
        except ValueError:
            self.pop(key, None)
