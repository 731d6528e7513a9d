"""How far segmentations have got, for whoever looks on meanwhile."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(eq=False)
class _Segmentation:
    image: str | None
    total: int
    done: int = 0


class Underway:
    """The segmentations that are being made. Any thread may tell and ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: list[_Segmentation] = []

    @contextmanager
    def segmenting(self, image: str | None, total: int) -> Iterator[Callable[[int], None]]:
        """A block that segments an image; it gets what it has to tell of each few slices.

        Args:
            image: its id; None: nobody can ask for it.
            total: what the numbers told will add up to.
        """
        entry = _Segmentation(image, total)
        with self._lock:
            self._running.append(entry)
        try:
            yield lambda slices: self._advance(entry, slices)
        finally:
            with self._lock:
                self._running.remove(entry)

    def _advance(self, entry: _Segmentation, slices: int) -> None:
        with self._lock:
            # A segmentation that runs out of memory begins again.
            entry.done = min(entry.done + slices, entry.total)

    def told(self, image: str) -> dict[str, int]:
        """`done` of `total` looks at slices, of the segmentation that began last; 0 of 0 where the image isn't being
        segmented, or has to wait for others."""
        with self._lock:
            entry = next((entry for entry in reversed(self._running) if entry.image == image), None)
            return {"done": entry.done, "total": entry.total} if entry else {"done": 0, "total": 0}
