"""What the trainings have in common: one at a time, followed by a `Status`, and weights that change at the very end.

MONAI Label runs a training in a process of its own. The weights in use change in one step and only for better ones, so
it may be stopped or killed at any moment.

Concurrency: one training at a time, of whatever kind and whatever the number of servers with the same state folder; a
lock file sees to it.
"""

import errno
import logging
import traceback
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock, Timeout
from monailabel.interfaces.tasks.train import TrainTask

from lib.checks import Conflict, StorageError
from lib.serving.options import ROLL_BACK, AnyTrainParams
from lib.serving.published_weights import Weights
from lib.trainers.status import STOPPED, Status
from sam2sgp.errors import Sam2SgpError, cause_of

logger = logging.getLogger(__name__)

PUBLISHED, KEPT, FAILED, ROLLED_BACK = "published", "kept", "failed", "rolled_back"
STAY = "The weights stay as they are."


class Publishing(TrainTask):
    """A train task that may publish weights, or roll them back.

    Args:
        description: for the panels of viewers.
        state_dir: the app's; everything is written below `training/`.
        weights: where weights come from and go to.
        audit: called with an action and its details when a training begins and when the weights in use change.
    """

    params: ClassVar[type[AnyTrainParams]]
    """What a request may hold."""

    def __init__(
        self,
        description: str,
        state_dir: Path,
        weights: Weights,
        audit: Callable[..., None] = lambda action, **details: None,
    ) -> None:
        super().__init__(description)
        self.folder = Path(state_dir) / "training"
        self.weights = weights
        self.audit = audit
        self.status = Status(self.folder / "status.json")

    @abstractmethod
    def _make_weights(self, request: Mapping[str, Any], history: Sequence[Mapping]) -> None:
        """Train, compare, publish or keep; `history` is that of the training before, with which this one may go on."""

    def info(self) -> dict[str, Any]:
        """As MONAI Label's, with `options`, the schema of a request."""
        return {**super().info(), "options": self.params.described()}

    def stats(self) -> dict[str, Any]:
        """Progress and outcome of the last training, whatever its kind, and which weights are in use.

        Costs two stats.
        """
        stats = self.status.read()
        try:
            active = self.weights.active()
            if stats.get("state") == STOPPED and stats.get("start_weights", active.name) != active.name:
                stats["message"] = f"The training was stopped, but its weights {active.name!r} are in use already."
            stats["weights"] = {
                "version": active.name,
                "published": active.published,
                "metrics": dict(active.metrics),
                "before": active.replaced,
            }
        except Sam2SgpError as error:
            stats["weights"] = {"error": str(error)}
        return stats

    def __call__(self, request: Mapping[str, Any], datastore: object) -> dict[str, Any]:
        """Train, or roll back, and return the stats.

        Raises:
            Sam2SgpError: an option that can't work, too few labels, a training that runs already; the stats say so too.
        """
        action = self.params.of_request(request).action
        before = self._in_use()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock", timeout=0):
                if action == ROLL_BACK:
                    self._roll_back()
                else:
                    self._train(request, before)
        except Timeout:
            raise Conflict(
                "A training is running already: wait until it has ended, or stop it (DELETE /train), then try again."
            ) from None
        except OSError as error:
            raise no_storage(error.strerror or str(error), self._since(before)) from error
        return self.stats()

    def _in_use(self) -> str | None:
        """Name of the weights in use; None where that can't be told."""
        try:
            return self.weights.active().name
        except Sam2SgpError:
            return None

    def _since(self, before: str | None) -> str:
        """What is true of the weights when something failed, in a sentence."""
        now = self._in_use()
        return STAY if now == before else f"The weights {now!r} are in use already, in the place of {before!r}."

    def _roll_back(self) -> None:
        before = self.weights.active().name
        version = self.weights.roll_back()
        self.audit("roll_back", weights=version.name, replaced=before)
        self.status.start("Rolling back.")
        self.status.finish(ROLLED_BACK, f"The weights {version.name!r} are in use again, in the place of {before!r}.")

    def _train(self, request: Mapping[str, Any], before: str | None) -> None:
        history = self.status.read().get("history", [])
        self.status.start("Reading the approved labels.")
        try:
            self._make_weights(request, history)
        except Exception as error:
            cause, since = cause_of(error), self._since(before)
            if reason := _storage_problem(error):
                cause = no_storage(reason, since)
                _close_files(error)
            said = str(cause).split("\n")[0] or type(cause).__name__
            if since != STAY and since not in said:
                said += f" {since}"
            try:
                self.status.finish(FAILED, said)
            except OSError:
                # To other processes it reads as stopped when this one has ended, which is true as well.
                logger.exception("The outcome of the training can't be written: %s", cause)
            if isinstance(cause, Sam2SgpError) and cause is not error:
                raise cause from error
            raise


def _storage_problem(error: BaseException | None) -> str | None:
    """Why a file could not be written, if that is among the causes of an error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            return error.strerror
        # torch has no type for it.
        if isinstance(error, RuntimeError) and "inline_container" in str(error):
            return "that a file can't be written"
        error = error.__cause__ or error.__context__
    return None


def _close_files(error: BaseException | None) -> None:
    """Let go of what the calls that failed hold: a half-written file takes its space for as long as it is open."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def no_storage(reason: str, weights: str = STAY) -> StorageError:
    """The error of a training that can't write, for a reason; with a sentence on the weights in use."""
    return StorageError(
        f"training: expected to write to the state folder, found {reason}; free some space or correct the permissions, "
        f"then train again. {weights}"
    )
