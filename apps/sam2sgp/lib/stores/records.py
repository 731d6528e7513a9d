"""What is known about images and labels: which of it may be stored, and how much of a stored record can be used.

In: dictionaries that clients send with an image or a label, or that an index file holds. Out: plain JSON of bounded
size and depth in which the keys that the app reads have their types. Other keys are kept as they come, because viewers
keep notes of their own there.

A record that is to be stored is refused as a whole (`checked`). Of one that is stored already, as by an older version,
only the keys that can't be used are dropped (`readable`), so that one bad value costs nothing else.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any

from monailabel.interfaces.datastore import DefaultLabelTag
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lib.checks import LARGEST_CLASS, RequestError, check_label_info

# A record takes so many bytes as JSON at most. The largest records of viewers name a thousand classes.
MOST_BYTES = 256 << 10
# Objects and lists within each other. What viewers send has four levels, what is stored with a prediction five.
DEEPEST = 16
LONGEST_KEY = 256
LARGEST_NUMBER = 1 << 63
# Items of each class that are stored with a prediction; the answer to its request lists more.
ITEMS_KEPT = 10
# The tag of approved labels.
FINAL = DefaultLabelTag.FINAL.value
# How an approved label came about.
UNCHANGED, CORRECTED = "unchanged", "corrected"

ShortText = Annotated[str, Field(max_length=1024, strict=True)]
Seconds = Annotated[float, Field(ge=0, le=1e12, strict=True)]


class BadRecord(RequestError):
    """Something to be known about an image or a label can't be stored."""

    status = 422


class Record(BaseModel):
    """What the app reads of any record. `ts`: when it was made, in seconds since 1970; `name`: of the file."""

    model_config = ConfigDict(extra="allow")

    ts: Seconds | None = None
    name: ShortText | None = None
    user: ShortText | None = None
    client_id: ShortText | None = None


class ImageRecord(Record):
    """What is known about an image; what DICOM says of its patient and scanner is used to choose what may guide it."""

    Modality: ShortText | None = None
    PatientID: ShortText | None = None


class ClassEntry(BaseModel):
    """A class of a label, as 3D Slicer and OHIF send it."""

    model_config = ConfigDict(extra="allow")

    idx: Annotated[int, Field(ge=0, le=LARGEST_CLASS, strict=True)]
    name: str | int | float | None = None


class LabelRecord(Record):
    """What is known about a label.

    `label_info`: its classes; `params`: of the request that made it, and what was found.
    """

    model: ShortText | None = None
    label_info: list[ClassEntry] | None = None
    params: dict[str, Any] | None = None


def checked(kind: type[Record], record: Mapping[str, Any] | None, what: str) -> dict[str, Any]:
    """A record as plain JSON, to be stored.

    Args:
        kind: of the record.
        record: as a client sent it; None for an empty one.
        what: what it is about, for the error.

    Returns:
        The record. Entries of its `label_info` that are no classes are left out.

    Raises:
        BadRecord: it is no JSON object, too large or too deep, or a key that is read has another type.
        RequestError: a class has a name or a value that some viewer can't hold.
    """
    kept, faults = _plain_parts({} if record is None else record)
    if not faults:
        check_label_info(kept.get("label_info"))
        _leave_classes(kept)
        faults = list(_mistyped(kind, kept).values())
    if faults:
        raise BadRecord(f"{what}: {'; '.join(faults)[:1000]}; correct it and send it again.")
    return kept


def readable(kind: type[Record], record: Any) -> tuple[dict[str, Any], list[str]]:
    """What can be used of a stored record, and a clause on each key that can't."""
    kept, faults = _plain_parts(record)
    left_out = _leave_classes(kept)
    if left_out:
        faults.append(f"label_info: expected classes, found {left_out} entries that are none")
    for key, fault in _mistyped(kind, kept).items():
        del kept[key]
        faults.append(fault)
    return kept, faults


def of_prediction(model: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a label that a model made, from the result parameters: without maps and the tail of long lists."""
    kept = {key: value for key, value in params.items() if key != "uncertainty"}
    kept["support"] = {name: items[:ITEMS_KEPT] for name, items in params["support"].items()}
    label_info = [{"name": name, "idx": value} for name, value in params["label_names"].items()]
    return {"model": model, "label_info": label_info, "params": kept}


def origin_of(record: Mapping[str, Any]) -> str | None:
    """How an approved label came about: a prediction `UNCHANGED`, or `CORRECTED` on the page; None for others,
    such as those drawn by hand."""
    if not record.get("model"):
        return None
    return CORRECTED if voxels_corrected(record) else UNCHANGED


def voxels_corrected(record: Mapping[str, Any]) -> int:
    """How many voxels of a label were changed on the page, from save to save."""
    corrected = record.get("corrected")
    voxels = corrected.get("voxels") if isinstance(corrected, dict) else 0
    return voxels if isinstance(voxels, int) else 0


def time_of(record: Mapping[str, Any]) -> float:
    """When a label was saved, in seconds since 1970; 0 where nothing tells."""
    when = record.get("ts")
    return float(when) if isinstance(when, int | float) and when == when else 0.0


def author_of(record: Mapping[str, Any]) -> str | None:
    """Who made a label, or changed it last; None for a prediction as it was made, whoever asked for it."""
    is_prediction = record.get("model") and "corrected" not in record
    return None if is_prediction else record.get("user")


def _plain_parts(record: Any) -> tuple[dict[str, Any], list[str]]:
    """The values that are JSON of bounded size and depth, and a clause on each other one."""
    if not isinstance(record, Mapping):
        return {}, [f"expected an object, found a {type(record).__name__}"]
    kept, faults, size = {}, [], 0
    for key, value in record.items():
        try:
            plain, length = _plain(key, value)
            size += length
            if size > MOST_BYTES:
                raise ValueError(f"expected at most {MOST_BYTES >> 10} KiB in all, found more")
            kept[key] = plain
        except ValueError as error:
            faults.append(f"{ascii(key)[:80]}: {error}")
    return kept, faults


def _mistyped(kind: type[Record], record: dict[str, Any]) -> dict[str, str]:
    """Keys with a value of another type than is read, and a clause on each."""
    try:
        kind.model_validate(record)
    except ValidationError as error:
        return {
            str(found["loc"][0]): f"{'.'.join(map(str, found['loc']))}: {found['msg'][:200]}"
            for found in error.errors(include_url=False, include_input=False)
        }
    return {}


def _leave_classes(record: dict[str, Any]) -> int:
    """Drop entries of `label_info` that are no classes; their number."""
    entries = record.get("label_info")
    if not isinstance(entries, list):
        return 0
    record["label_info"] = [entry for entry in entries if _is_class(entry)]
    return len(entries) - len(record["label_info"])


def _is_class(entry: Any) -> bool:
    try:
        check_label_info([entry])
        ClassEntry.model_validate(entry)
    except (RequestError, ValidationError):
        return False
    return True


def _plain(key: Any, value: Any) -> tuple[Any, int]:
    """A value of JSON and the length of its text. Raises ValueError for what JSON, UTF-8 or a reader can't hold."""
    if not isinstance(key, str) or len(key) > LONGEST_KEY:
        raise ValueError(f"expected a key of up to {LONGEST_KEY} characters")
    _check_depth(value)
    try:
        text = json.dumps({key: value}, allow_nan=False, ensure_ascii=False, default=str)
        length = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError("expected text, found bytes that aren't any") from None
    except (TypeError, ValueError):
        raise ValueError("expected JSON, found a value that isn't any") from None
    return json.loads(text)[key], length


def _check_depth(value: Any) -> None:
    """Without recursion, which deep values are there to exhaust."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"expected at most {DEEPEST} levels, found more")
        inner: list[Any] = []
        for entry in level:
            if isinstance(entry, Mapping):
                inner += entry.values()
            elif isinstance(entry, list | tuple):
                inner += entry
            elif isinstance(entry, int) and abs(entry) >= LARGEST_NUMBER:
                raise ValueError("expected numbers of up to 63 bits, found a larger one")
        level = inner
