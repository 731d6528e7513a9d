"""From which image a label was made, so that one is told from another that came under its name.

In: paths of images, and what is known about labels. Out: a claim, which the datastore stores with each label that it
saves, and whether the image that is there now is another one. A claim holds the image's content, not only its time:
files are copied, touched and restored. A DICOM series is told by the names of its files, which are its instances' UIDs.
Labels without a claim, which were copied into the folder or come from an archive, say nothing of their image.
"""

from collections.abc import Mapping
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from lib.stamps import image_stamp
from lib.stores.audit import content_hash

# The key in a label's record.
KEY = "made_of"
# More than the images of a large datastore: all of them may have been touched, and are looked at one after the other.
HASHES_KEPT = 1 << 16


def claim(image: str | Path, label: str = "") -> dict[str, Any]:
    """What is to be known about a label of an image as it is now.

    Args:
        image: path of a file, or of a series' folder.
        label: hash of the label's file, where people may put another one in its place; "" where nobody does.
    """
    return {KEY: {"stamp": _stamp(image), "content": _content(image), "label": label}}


def claim_in(record: Mapping[str, Any]) -> dict[str, Any]:
    """What is known about the image that a label was made of: `stamp`, `content` and `label`; {} for nothing."""
    made_of = record.get(KEY)
    return made_of if isinstance(made_of, dict) else {}


def is_of_another(record: Mapping[str, Any], image: str | Path, label: str | Path) -> bool:
    """Whether a label was made of another image than there is now.

    False where nothing is known about it, as when people have put another label in its place. Costs a stat where the
    image is as it was, and reads it once where only its time is another one.

    Args:
        record: what is known about the label.
        image, label: paths.
    """
    made_of = claim_in(record)
    if not made_of or made_of.get("stamp") == _stamp(image):
        return False
    try:
        before, now = made_of.get("content"), _content(image)
        if not before or not now or before == now:
            return False
        return not made_of.get("label") or made_of["label"] == content_hash(label)
    except OSError:
        # One of them has gone meanwhile.
        return False


def _stamp(image: str | Path) -> str:
    return sha256(repr(image_stamp(image)).encode()).hexdigest()


def _content(image: str | Path) -> str:
    """What tells an image's content; "" where it is gone."""
    stamp = image_stamp(image)
    if not stamp:
        return ""
    if Path(image).is_dir():
        return f"names:{sha256(repr([name for name, _ in stamp]).encode()).hexdigest()}"
    return _content_of(str(image), stamp)


@lru_cache(maxsize=HASHES_KEPT)
def _content_of(image: str, stamp: tuple) -> str:
    """The hash of an image file; `stamp` changes with the file."""
    return content_hash(image)
