"""What a request may choose, read from what viewers and other clients send: text, numbers, lists of choices.

In: a request's values. Out: `Options`, or an error of one sentence.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lib.checks import RequestError
from lib.settings import WORDS
from sam2sgp.support.sampler import MODES

# Of the option `classes`.
ALL = "all"
MAX_K = 64


@dataclass(frozen=True)
class Options:
    """What a request may choose. None: as in inference.json.

    Attributes:
        k: support items per class, 1 to `MAX_K`.
        classes: names or values of the classes wanted; () for all.
        retrieval: "similarity" or "random".
        three_d_memory: whether the slices of a volume guide each other.
        uncertainty: whether the normalised entropy is put out too.
    """

    k: int | None = None
    classes: tuple[str, ...] = ()
    retrieval: str | None = None
    three_d_memory: bool | None = None
    uncertainty: bool = False

    @classmethod
    def of_request(cls, request: Mapping[str, Any]) -> "Options":
        """From a request, in which a list of choices counts as its first. Raises RequestError for an ill value."""
        k = first(request.get("k"))
        if k is not None:
            try:
                k = int(str(k))
            except ValueError:
                k = 0
            if not 1 <= k <= MAX_K:
                raise RequestError(f"k: expected a whole number from 1 to {MAX_K}, found {request['k']!r}.")
        retrieval = first(request.get("retrieval"))
        if retrieval is not None and retrieval not in MODES:
            raise RequestError(f"retrieval: expected one of {', '.join(MODES)}, found {retrieval!r}.")
        return cls(
            k,
            _classes(request.get("classes")),
            retrieval,
            flag(request, "three_d_memory"),
            bool(flag(request, "uncertainty")),
        )


def first(value: Any) -> Any:
    """The first of a list of choices, which is how viewers show options; anything else as it is. "" is None."""
    value = (value[0] if value else None) if isinstance(value, list | tuple) else value
    return None if value == "" else value


def flag(request: Mapping[str, Any], key: str) -> bool | None:
    """True or false, as clients write them; None where nothing is given. Raises RequestError for anything else."""
    value = first(request.get(key))
    if value is None or isinstance(value, bool):
        return value
    known = WORDS.get(str(value).strip().lower(), {"0": False, "1": True}.get(str(value).strip()))
    if known is None:
        raise RequestError(f"{key}: expected true or false, found {value!r}.")
    return known


def _classes(value: Any) -> tuple[str, ...]:
    """Class names from a list or a text with commas; () for all of them."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    names = tuple(str(part).strip() for part in parts if part is not None and str(part).strip())
    return () if ALL in names else names
