"""A cache in memory that is bounded in bytes and forgets what was used longest ago. For one thread at a time."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

from sam2sgp.errors import ConfigError


class ByteLRU:
    """Values by key, of which the most recently used ones that fit are kept.

    Args:
        megabytes: bound of all values together, in MiB; 0 keeps nothing.

    Raises:
        ConfigError: the bound is not a number of at least 0.

    Example:
        >>> cache = ByteLRU(1)
        >>> cache.put("a", "value", 2**19)
        >>> cache.get("a"), cache.bytes
        ('value', 524288)
    """

    def __init__(self, megabytes: float) -> None:
        if isinstance(megabytes, bool) or not isinstance(megabytes, int | float) or not megabytes >= 0:
            raise ConfigError(f"The size of a cache is {megabytes!r}: expected a number of MiB, 0 for none.")
        self.capacity = int(megabytes * 2**20)
        self.bytes = 0
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> Any:
        """The value, which becomes the most recently used one; None where it is not kept."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def put(self, key: Hashable, value: Any, size: int) -> None:
        """Keep a value of `size` bytes in place of the least recently used ones; not if it alone is too large."""
        self.discard(key)
        if size > self.capacity:
            return
        self._values[key] = value, size
        self.bytes += size
        while self.bytes > self.capacity:
            _, (_, freed) = self._values.popitem(last=False)
            self.bytes -= freed

    def discard(self, key: Hashable) -> None:
        """Forget a value, if it is kept."""
        self.bytes -= self._values.pop(key, (None, 0))[1]

    def clear(self) -> None:
        """Forget all values."""
        self._values.clear()
        self.bytes = 0
