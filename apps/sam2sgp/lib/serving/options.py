"""What a client may send: every option of every request, declared once.

In: JSON bodies, JSON in form fields, and the requests that tasks get. Out: models with checked values, or an error of
one sentence. A name that is not declared here is refused, so it never reaches a task: neither MONAI Label's own options
(`bundle_path`, `session`, `result_path`, …) nor keys of a config.

Viewers send options back as they were listed and as their widgets hold them: of a list of choices the first counts,
numbers and flags may be text, and "" stands for no choice.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from monailabel.utils.others.generic import device_list
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from lib.checks import LONGEST_ID, MOST_CLASSES, RequestError, check_label_info, check_tag
from lib.serving.result_files import EXTENSIONS
from lib.settings import WORDS
from sam2sgp.support.sampler import Mode

# The option `classes` may say so.
ALL = "all"
MAX_K = 64
MOST_EPOCHS = 10_000
MOST_EPISODES = 1_000_000
MOST_SECONDS = 3600
ADAPT_SECONDS = 60.0
MOST_IMAGES = 100_000
MOST_NOTES = 64
LONGEST_TEXT = 1024
DEEPEST = 8
# In one JSON object: each name too many is an error of its own to pydantic, and 50,000 of them keep all others waiting.
MOST_NAMES = 1024
DEVICE = re.compile(r"cpu|mps|cuda(:\d{1,2})?")
PLACE = re.compile(r"\w+")
PARTS = ("body", "query", "path")
NUMBER = re.compile(r"[+-]?\d{1,18}")
TRAIN, ROLL_BACK = "train", "roll_back"
# What was expected, by pydantic's types of errors, whose context fills in the limits.
EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "an object of names and values",
    "extra_forbidden": "a declared option",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "int_type": "a whole number",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "missing": "a value",
    "model_attributes_type": "an object of names and values",
    "model_type": "an object of names and values",
    "string_too_long": "at most {max_length} characters",
    "string_type": "text",
    "too_long": "at most {max_length} entries",
}
# Names of the server's own notes, and of what it answers beside them.
SERVERS_OWN = {"id", "ts", "name", "path", "image", "label", "strategy", "model", "params", "user", "checksum"}


# What clients write


def first(value: Any) -> Any:
    """The first of a list of choices, which is how viewers show options; anything else as it is. "" is None."""
    value = (value[0] if value else None) if isinstance(value, list | tuple) else value
    return None if value == "" else value


def _whole(value: Any) -> Any:
    value = first(value)
    return int(value) if isinstance(value, str) and NUMBER.fullmatch(value.strip()) else value


def _number(value: Any) -> Any:
    value = first(value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _unless_empty(parse: Callable[[Any], Any], default: Any) -> Callable[[Any], Any]:
    """`parse`, whose None is the default."""

    def parsed(value: Any) -> Any:
        found = parse(value)
        return default if found is None else found

    return parsed


def _flag(value: Any) -> Any:
    value = first(value)
    if isinstance(value, str):
        return WORDS.get(value.strip().lower(), {"0": False, "1": True}.get(value.strip(), value))
    return value


def _classes(value: Any) -> Any:
    """Class names from a list, a text with commas or a single value; () for all of them."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(part, str | int | None) for part in parts):
        raise ValueError("expected names or values of classes, found something else; correct it.")
    names = tuple(str(part).strip() for part in parts if part is not None and str(part).strip())
    return () if ALL in names else names


def _device(value: str) -> str:
    if not DEVICE.fullmatch(value) and value not in device_list():
        raise ValueError(f"expected a device such as 'cpu' or 'cuda', found {ascii(value)[:80]}; correct it.")
    return value


def _extension(value: str) -> str:
    if value not in EXTENSIONS:
        raise ValueError(f"expected one of {', '.join(EXTENSIONS)}, found {ascii(value)[:80]}; choose one of them.")
    return value


def _class_entries(value: Any) -> Any:
    check_label_info(value)
    return value


Flag = Annotated[bool, BeforeValidator(_flag)]
Text = Annotated[str, Field(max_length=LONGEST_TEXT)]
Device = Annotated[str, Field(max_length=LONGEST_TEXT), AfterValidator(_device)]
Tag = Annotated[str, AfterValidator(check_tag)]
Note = Text | bool | Annotated[int, Field(ge=-(1 << 53), le=1 << 53)] | Annotated[float, Field(allow_inf_nan=False)]


class Declared(BaseModel):
    """Options by name; a name that is not declared is refused, and so is a value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    @classmethod
    def described(cls) -> dict[str, Any]:
        """The JSON schema of the options that tasks use: of each its type, limits, choices and meaning."""
        schema = cls.model_json_schema()
        used = {name: entry for name, entry in schema["properties"].items() if name not in FromClients.model_fields}
        return {**schema, "properties": used}

    @classmethod
    def of_request(cls, request: Mapping[str, Any]) -> Self:
        """From the request of a task, of which only the declared options are looked at.

        Raises:
            RequestError: a value that can't be used.
        """
        try:
            return cls.model_validate({key: request[key] for key in cls.model_fields if key in request})
        except ValidationError as error:
            raise RequestError(sentence(error.errors())) from error

    def given(self) -> dict[str, Any]:
        """The options that were sent and that tasks use, as JSON values."""
        return self.model_dump(mode="json", exclude_unset=True, exclude=set(FromClients.model_fields))


class FromClients(Declared):
    """What MONAI Label's viewers and clients add to every request; nothing here depends on it."""

    client_id: Text | None = None
    gpus: Annotated[Text | None, BeforeValidator(first)] = None
    multi_gpu: Flag | None = None
    max_workers: Annotated[int | None, BeforeValidator(_whole)] = None
    logging: Annotated[Text | None, BeforeValidator(first)] = None
    result_dtype: Text | None = None
    result_compress: Flag | None = None
    restore_label_idx: Flag | None = None


# Options of tasks


class LabelClass(Declared):
    """A class of a label, as viewers name it."""

    idx: int | None = None
    name: Text | float | None = None
    color: Annotated[list[float], Field(max_length=4, fail_fast=True)] | None = None
    description: Text | None = None


LabelClasses = Annotated[
    list[LabelClass], Field(max_length=MOST_CLASSES, fail_fast=True), BeforeValidator(_class_entries)
]


class Options(Declared):
    """How an image is to be segmented. None: as in inference.json."""

    k: Annotated[int | None, Field(ge=1, le=MAX_K), BeforeValidator(_whole)] = None
    """Support items per class."""

    classes: Annotated[tuple[Text, ...], Field(max_length=MOST_CLASSES, fail_fast=True), BeforeValidator(_classes)] = ()
    """Names or values of the classes wanted; none for all."""

    retrieval: Annotated[Mode | None, BeforeValidator(first)] = None
    """Which support items: the most similar, or random ones."""

    three_d_memory: Annotated[bool | None, BeforeValidator(_flag)] = None
    """Whether the slices of a volume guide each other."""

    uncertainty: Annotated[bool, BeforeValidator(lambda value: _flag(value) or False)] = False
    """Whether the normalised entropy is put out too."""


class InferParams(Options, FromClients):
    """`params` of an inference."""

    save_label: Annotated[bool | None, BeforeValidator(_flag)] = None
    """Whether the result of a datastore's image is saved."""

    label_tag: Annotated[Tag | None, BeforeValidator(first)] = None
    """Under which tag; `final` approves it."""

    result_extension: Annotated[Annotated[str, AfterValidator(_extension)] | None, BeforeValidator(first)] = None
    """Format of the result."""

    device: Annotated[Device | None, BeforeValidator(first)] = None
    """Has no effect: there is one network, on one device."""

    label_info: LabelClasses | None = None
    """Has no effect: the classes are those of the support set."""


class BatchParams(InferParams):
    """The body of a batch inference."""

    images: (
        Literal["all", "labeled", "unlabeled", "unannotated"]
        | Annotated[
            list[Annotated[str, Field(min_length=1, max_length=LONGEST_ID)]],
            Field(max_length=MOST_IMAGES, fail_fast=True),
        ]
    ) = "all"
    """Which images of the datastore: a kind of them, or their ids. "unlabeled" are those without an approved label,
    "unannotated" those that have no label at all, or only a prediction of weights that aren't in use any more."""

    max_batch_size: Annotated[int, Field(ge=0, le=MOST_IMAGES), BeforeValidator(_unless_empty(_whole, 0))] = 0
    """At most so many images; 0 for all."""


class AnyTrainParams(FromClients):
    """What the body of every training may hold."""

    action: Annotated[Literal["train", "roll_back"] | None, BeforeValidator(first)] = None
    """Train, or go back to the weights before."""


class TrainParams(AnyTrainParams):
    """The body of a fine-tuning: see `FineTuning`. None: as in the bundle's configs."""

    max_epochs: Annotated[int | None, Field(ge=1, le=MOST_EPOCHS), BeforeValidator(_whole)] = None
    """Epochs."""

    episodes_per_epoch: Annotated[int | None, Field(ge=1, le=MOST_EPISODES), BeforeValidator(_whole)] = None
    """Episodes in an epoch."""

    learning_rate: Annotated[float | None, Field(gt=0, le=10, allow_inf_nan=False), BeforeValidator(_number)] = None
    """Highest learning rate."""

    device: Annotated[Device | None, BeforeValidator(first)] = None
    """Taken only where the setting `allow_overrides` says so."""


class AdaptParams(AnyTrainParams):
    """The body of an adaptation: see `AdaptTask`."""

    seconds: Annotated[float, Field(ge=10, le=MOST_SECONDS), BeforeValidator(_unless_empty(_number, ADAPT_SECONDS))] = (
        ADAPT_SECONDS
    )
    """How long it may take."""


class AllTrainParams(FromClients):
    """The body of a training of all models: options by model, as OHIF's panel sends them."""

    finetune: TrainParams = TrainParams()
    adapt: AdaptParams = AdaptParams()


class SampleParams(FromClients):
    """The body of a request for the next image. A strategy has no options."""


class ScoringParams(FromClients):
    """The body of a scoring, which has no options."""


# What comes with images and labels


class ImageParams(Declared):
    """`params` of an uploaded image."""

    client_id: Text | None = None


class LabelParams(Declared):
    """`params` of a submitted label."""

    client_id: Text | None = None
    label_info: LabelClasses | None = None
    """Which value stands for which class."""


class Notes(BaseModel):
    """What people note about an image: names of their own with short values."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    __pydantic_extra__: dict[Annotated[str, Field(min_length=1, max_length=64)], Note | None] = Field(init=False)

    @model_validator(mode="after")
    def _is_short(self) -> Self:
        if len(self.model_extra or {}) > MOST_NOTES:
            raise ValueError(f"expected at most {MOST_NOTES} notes, found more; send fewer.")
        for name in SERVERS_OWN & (self.model_extra or {}).keys():
            raise ValueError(f"expected names other than the server's own, found {name!r}; leave it out.")
        return self


class LabelNotes(Notes):
    """What people note about a label, and its classes."""

    label_info: LabelClasses | None = None


# JSON


def parse_object(text: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object; {} for an empty text or null.

    Raises:
        RequestError: anything else, a name that comes twice, a number that is none, more than `DEEPEST` levels or
            `MOST_NAMES` names of an object.
    """

    def refuse(name: str) -> None:
        raise ValueError(name)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(pairs) > MOST_NAMES:
            raise RequestError(
                f"{what}: expected at most {MOST_NAMES} names in a JSON object, found {len(pairs)}; send fewer."
            )
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name twice")
        return found

    if not text.strip():
        return {}
    try:
        content = json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"{what}: expected a JSON object with each name once, found another content; correct it."
        ) from error
    if not isinstance(content, dict | None):
        raise RequestError(f"{what}: expected a JSON object, found another kind of value; correct it.")
    if _is_deeper(content, DEEPEST):
        raise RequestError(f"{what}: expected at most {DEEPEST} levels of JSON, found more; correct it.")
    return content or {}


def in_form(text: Any) -> Any:
    """For fields of forms that hold JSON. An upload is none, although it has attributes to read."""
    if not isinstance(text, str):
        raise ValueError("expected JSON, found a file; send it as text.")
    return parse_object(text, "params")


def _is_deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(entry, levels - 1) for entry in inner)


# Errors


def sentence(errors: Sequence[Any]) -> str:
    """The first of pydantic's errors as a sentence for the client."""
    error = errors[0]
    # FastAPI says first in which part of the request it is, and pydantic which type of several it tried.
    place = [str(part) for part in error["loc"] if PLACE.fullmatch(str(part)) and part not in PARTS]
    name = ascii(".".join(place))[1:-1][:80] or "body"
    kind, context = error["type"], error.get("ctx", {})
    if kind == "value_error":
        return f"{name}: {context['error']}"
    expected = EXPECTED.get(kind, error["msg"].removeprefix("Input should be ")).format_map(context)
    if kind == "missing":
        return f"{name}: expected {expected}, found none; add it."
    if kind == "extra_forbidden":
        return f"{name}: expected {expected}, found an unknown name; leave it out."
    return f"{name}: expected {expected}, found {ascii(error['input'])[:80]}; correct it."
