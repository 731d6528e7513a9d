"""What a preprocessing is made of, for caches of what it makes."""

import json
from collections.abc import Callable

from monai.transforms import Compose

# This is raised when the readers of `sam2sgp.data` or the transforms, with the same settings, would make something else
# of the same files, or refuse them: so that nothing is used that an older version prepared or segmented.
READERS_VERSION = 4


def transform_fingerprint(transform: Callable) -> list:
    """What a (composed) transform is made of, as JSON types: `READERS_VERSION`, class names and their settings."""
    steps = transform.transforms if isinstance(transform, Compose) else [transform]
    settings = [json.loads(json.dumps(vars(step), default=str, sort_keys=True)) for step in steps]
    return [READERS_VERSION, *([type(step).__name__, own] for step, own in zip(steps, settings, strict=True))]
