"""Other weights are put in use beside those that serve: a thread builds all that is needed, then both are exchanged.

In: the version in use, and the one that serves. Out: a `LoadedNetwork` of the former, given to `take_over`.
"""

import logging
import threading
from collections.abc import Callable

from lib.priority import give_way
from lib.serving.loaded_network import LoadedNetwork
from lib.serving.published_weights import Version
from sam2sgp.errors import cause_of

logger = logging.getLogger(__name__)


class WeightsExchange:
    """Exchanges the weights that serve, one version at a time; one that fails is not tried again.

    Args:
        build: makes a network of a version, ready to serve; in a thread of its own.
        take_over: puts it in the place of the one that serves.

    Attributes:
        rebuilding: name of the version that is being built; None if none is.
        problem: why the version in use does not serve; None if nothing is wrong.
    """

    def __init__(self, build: Callable[[Version], LoadedNetwork], take_over: Callable[[LoadedNetwork], None]) -> None:
        self.rebuilding: str | None = None
        self.problem: str | None = None
        self._build = build
        self._take_over = take_over
        self._thread: threading.Thread | None = None
        self._failed: str | None = None

    def want(self, active: Version, serving: Version) -> None:
        """Exchange `serving` for `active`, if these differ; nobody waits for it."""
        if active.name == serving.name:
            self.problem = None
        elif self.rebuilding is None and active.name != self._failed:
            self.rebuilding = active.name
            self._thread = threading.Thread(target=self._exchange, args=(active,), daemon=True, name="sam2sgp-rebuild")
            self._thread.start()

    def wait(self) -> None:
        """Return when none is being built."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def _exchange(self, version: Version) -> None:
        give_way()
        try:
            fresh = self._build(version)
            self.problem = self._failed = None
            self._take_over(fresh)
        except Exception as error:
            # The old weights go on serving, whatever is wrong with the new ones.
            cause = cause_of(error)
            logger.exception("The weights %r can't be put in use", version.name)
            self.problem = f"The weights {version.name!r} can't be put in use, the old ones serve: {cause}"
            self._failed = version.name
        finally:
            self.rebuilding = None
