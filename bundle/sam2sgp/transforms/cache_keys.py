"""What a preprocessing is made of, for caches of what it makes."""

import json
from collections.abc import Callable

from monai.transforms import Compose


def transform_fingerprint(transform: Callable) -> list:
    """What a (composed) transform is made of, as JSON types: class names and their settings."""
    steps = transform.transforms if isinstance(transform, Compose) else [transform]
    return [[type(step).__name__, json.loads(json.dumps(vars(step), default=str, sort_keys=True))] for step in steps]
