"""Decisions about labels: one after the other for each image, and each of them whole or not at all.

    approve, restore   a label gets the tag `final`
    remove             an approved label gets the tag `removed`
    reject             a prediction is deleted
    submit, predict    a label is saved under a tag
    correct            a label that somebody made of others is saved under a tag

Datastores derive from `Decisions` and hold `deciding` for the image whenever one of its labels comes, goes or gets
another tag, whoever asks for it. So what a decision was checked against is still there when it is carried out, and what
was answered is what is stored. The lock holds between the threads of a server and between the processes of an app
(server, batch inference); decisions about other images go on meanwhile. It is never taken by readers, and never while a
lock of the segmenter is held.
"""

import logging
import os
import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

from filelock import FileLock, Timeout
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag

from lib.checks import Conflict, Forbidden, RequestError, check_tag, supported_suffix
from lib.stores.audit import Audit, current_user
from lib.stores.history import History
from lib.stores.image_identity import is_of_another
from lib.stores.records import FINAL, UNCHANGED, LabelRecord, author_of, checked, origin_of
from sam2sgp.errors import DataError

logger = logging.getLogger(__name__)

REMOVED, DRAFT = "removed", "draft"
ORIGINAL = DefaultLabelTag.ORIGINAL.value
# Images share this many locks, so that their files don't grow in number with the datastore.
LOCKS = 1024
# Checking a label takes as long as reading its image; a lock held for longer belongs to a process that hangs.
PATIENCE = 60.0
POLL = 0.01
OF_ANOTHER = "that was made of another image under this name; segment this one, or correct the label on it."
SEGMENTED = "the image that was segmented, found another one under its id; segment it again."


class Busy(RequestError):
    """Something else is being done that has to end first."""

    status = 503


class FairLock:
    """A lock that threads get in the order in which they asked for it.

    With Python's own, those that come while it is given back may be first time and again, and one may wait for long.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held = False
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._lock:
            if not self._held:
                self._held = True
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        turn.acquire()

    def __exit__(self, *_error: object) -> None:
        with self._lock:
            # It stays held for the one whose turn it is.
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._held = False


class ImageLocks:
    """One lock for each image, between threads and processes.

    Args:
        folder: of the lock files; made when first needed.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._threads = [threading.Lock() for _ in range(LOCKS)]

    @contextmanager
    def hold(self, image_id: str) -> Iterator[None]:
        """Hold the lock of an image for the block; a thread may hold one at a time.

        Where the lock file can't be made, as on a read-only disk, only threads are kept apart; the datastore still
        compares the label with the one that was checked before it changes it.

        Raises:
            Busy: another decision about the image takes longer than `PATIENCE`.
        """
        number = crc32(image_id.encode("utf-8", "replace")) % LOCKS
        end = time.monotonic() + PATIENCE
        if not self._threads[number].acquire(timeout=PATIENCE):
            raise _busy(image_id)
        file = FileLock(self._folder / f"{number:04}.lock")
        try:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                file.acquire(timeout=max(end - time.monotonic(), 0), poll_interval=POLL)
            except Timeout as error:
                raise _busy(image_id) from error
            except OSError as error:
                logger.warning("Decisions aren't locked against other processes: %s", error)
            yield
        finally:
            file.release()
            self._threads[number].release()


class Decisions(Datastore):
    """MONAI Label's interface of datastores, with decisions.

    A datastore has to set `history`, `_image_locks` and `_audit`, and to define what is called while the image is held.
    """

    # Earlier states of labels that were replaced, or deleted by a decision.
    history: History
    _image_locks: ImageLocks
    _audit: Audit | None
    # Whether somebody may approve a label that he made or changed last: the setting of this name.
    approve_own = True

    @abstractmethod
    def _save_label(
        self, image_id: str, label_filename: str, name: str, tag: str, info: dict[str, Any], action: str = ""
    ) -> str:
        """Put a label in place, and the one before it out of it. The image's id.

        Args:
            name: the file's, for errors.
            action: what the audit log is to say of a label that isn't approved; "" for nothing.
        """

    @abstractmethod
    def _remove_label(self, label_id: str, tag: str) -> None:
        """Delete a label. Raises NotFound where there is none."""

    @abstractmethod
    def _change_tag(self, image_id: str, old: str, new: str) -> None:
        """Give a label another tag, in place of the label that has it; `final` only to one that fits its image."""

    def deciding(self, image_id: str):
        """A block in which no other label of an image comes, goes or changes: see `ImageLocks.hold`."""
        return self._image_locks.hold(image_id)

    def tags(self) -> dict[str, list[str]]:
        """The tags of each image's labels, by the image's id."""
        return {image_id: list(self.get_labels_by_image_id(image_id)) for image_id in self.list_images()}

    def records(self) -> dict[str, dict[str, dict[str, Any]]]:
        """What is known about each image's labels, by the image's id and the label's tag; not to be changed."""
        return {
            image_id: {tag: self.get_label_info(image_id, tag) for tag in tags}
            for image_id, tags in self.tags().items()
        }

    def path_of_label(self, image_id: str, tag: str) -> str:
        """Where an image's label with a tag is; "" where there is none."""
        return self.get_label_uri(image_id, tag) if tag in self.get_labels_by_image_id(image_id) else ""

    def state_of_label(self, image_id: str, tag: str) -> str:
        """`state_of` an image's label with a tag; "" where there is none."""
        path = self.path_of_label(image_id, tag)
        return (state_of(path) or "") if path else ""

    def is_of_another_image(self, image_id: str, tag: str) -> bool:
        """Whether the label with a tag was made of an image that had this id before, see `image_identity`."""
        label = self.path_of_label(image_id, tag)
        return bool(label) and is_of_another(self.get_label_info(image_id, tag), self.get_image_uri(image_id), label)

    def correct(
        self,
        image_id: str,
        label_filename: str,
        tag: str,
        info: Mapping[str, Any],
        image_seen: str,
        seen: Mapping[str, str],
    ) -> str:
        """Save a label that somebody made of others; what it replaces goes to the history.

        Args:
            image_id: of its image.
            label_filename: of a file that this server wrote on the image's grid.
            tag: that it gets; `final` approves it, where people may approve what they made.
            info: what is to be known about it.
            image_seen: `state_of` the image that was looked at.
            seen: `state_of` the labels that it was made of, or takes the place of, by tag; "" for none.

        Returns:
            The tag that it got, see `tag_of_own`.

        Raises:
            Conflict: the image or one of these labels is another one now.
            BadLabel: it can't be approved.
            RequestError: an unknown image, a full disk, a record that can't be stored.
        """
        record = checked(LabelRecord, info, f"label of {image_id}")
        name = image_id + supported_suffix(label_filename)
        if self.tag_of_own(tag) != tag:
            # What it takes the place of then is another label, which nobody has looked at unless it was made of that.
            tag = self.tag_of_own(tag)
            seen = {tag: "", **seen}
        with self.deciding(image_id):
            self._check_image(image_id, image_seen, "the image that was shown, found another one; load it again.")
            for other, state in seen.items():
                self._check_unchanged(image_id, other, state)
            self._keep_earlier(image_id, tag)
            self._save_label(image_id, label_filename, name, tag, record, "correct")
        return tag

    def _check_unchanged(self, image_id: str, tag: str, seen: str) -> None:
        """Raise Conflict where a label with a tag is another one than was seen, or came or went."""
        if self.state_of_label(image_id, tag) != seen:
            raise Conflict(
                f"{image_id}: expected its label {tag!r} as it was shown, found another one; look at that one first."
            )

    def _keep_earlier(self, image_id: str, tag: str) -> None:
        """Put a label that is about to be replaced or deleted into the history, if there is one."""
        path = self.path_of_label(image_id, tag)
        if path:
            self.history.keep(image_id, tag, path, self.get_label_info(image_id, tag))

    def _keep_replaced(self, image_id: str, tag: str) -> None:
        """The same of a label in whose place another one is submitted, unless it is a prediction.

        Predictions are not kept, because they can be made again; a label that a person submitted under the tag
        `original` is.
        """
        if tag != ORIGINAL or origin_of(self.get_label_info(image_id, tag)) != UNCHANGED:
            self._keep_earlier(image_id, tag)

    def approve(self, image_id: str, tag: str, seen: str = "") -> None:
        """Give a label the tag `final`, in place of an earlier label with that tag.

        Args:
            image_id: of its image.
            tag: that it has now.
            seen: `state_of` the label that was decided about; "" for whatever is there.

        Raises:
            Conflict: the label is another one than was seen, or was made of an image that had this id before.
            DataError: there is no such label, or it doesn't fit its image.
        """
        self._decide(image_id, tag, FINAL, seen)

    def remove(self, image_id: str, tag: str = FINAL, seen: str = "") -> None:
        """Give a label the tag `removed`; arguments and errors as of `approve`."""
        self._decide(image_id, tag, REMOVED, seen)

    def reject(self, image_id: str, tag: str, seen: str = "") -> None:
        """Delete a prediction; arguments and errors as of `approve`, and DataError for a label that was approved."""
        if check_tag(tag) in (FINAL, REMOVED):
            raise DataError(f"{image_id}: only a prediction can be rejected; an approved label can be removed.")
        with self.deciding(image_id):
            self._check_seen(image_id, tag, seen)
            self._keep_earlier(image_id, tag)
            self._remove_label(image_id, tag)

    def _check_image(self, image_id: str, seen: str, expected: str = SEGMENTED) -> None:
        """Raise Conflict where a label is of another image than there is now; "" fits every image."""
        if seen and state_of(self.get_image_uri(image_id)) != seen:
            raise Conflict(f"image {image_id}: expected {expected}")

    def _decide(self, image_id: str, tag: str, new: str, seen: str) -> None:
        if check_tag(tag) == new:
            raise DataError(f"{image_id}: its label has the tag {new!r} already; load the page again.")
        with self.deciding(image_id):
            self._check_seen(image_id, tag, seen)
            if new == FINAL:
                self._check_author(image_id, tag)
                if self.is_of_another_image(image_id, tag):
                    raise Conflict(f"{image_id}: expected a label of this image, found one {OF_ANOTHER}")
            self._keep_earlier(image_id, new)
            self._change_tag(image_id, tag, new)

    def _check_seen(self, image_id: str, tag: str, seen: str) -> None:
        state = self.state_of_label(image_id, tag)
        if not state:
            raise DataError(f"{image_id}: expected a label with the tag {tag!r}, found none; load the page again.")
        if seen and seen != state:
            raise Conflict(
                f"{image_id}: expected the label that was shown, found a newer one; load the page and look at it."
            )

    def tag_of_own(self, tag: str) -> str:
        """The tag of a label that somebody made and wants to save with this one: what he can't approve is a draft."""
        return tag if self.approve_own or tag != FINAL else DRAFT

    def _check_author(self, image_id: str, tag: str) -> None:
        """Raise Forbidden where who asks made or changed a label last, and so may not approve it.

        A prediction has no author, and whoever looks at it is the first.
        """
        user, author = current_user.get(), author_of(self.get_label_info(image_id, tag))
        if self.approve_own or (user is not None and user != author):
            return
        found = "nobody by name" if user is None else f"{user!r}, who made or changed it last"
        raise Forbidden(
            f"{image_id}: expected somebody else than its author to approve this label, found {found}; ask another "
            "approver."
        )


def state_of(path: str | Path) -> str | None:
    """What changes with every save of a file, or with every file that comes to a folder; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return f"{found.st_ino}-{found.st_mtime_ns}"


def _busy(image_id: str) -> Busy:
    return Busy(
        f"image {image_id}: expected to decide about it within {PATIENCE:.0f} s, found another decision at work; try "
        "again in a minute."
    )
