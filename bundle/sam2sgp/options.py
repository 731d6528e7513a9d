"""The options of a run: what each means, and a check of those that were given before any work begins.

In: the merged config of `python -m monai.bundle run`, overrides included. Out: nothing, or one `ConfigError` that names
the option, what was expected and the nearest valid name; for `--help`, the list of options.

Each setting is declared once, as a field of a pydantic model: what it means and what its value may be. Its default
stands in the JSON configs.
"""

import inspect
import json
import pydoc
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, reduce
from operator import or_
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from monai.bundle import ConfigParser
from monai.bundle.config_item import ConfigComponent
from monai.bundle.reference_resolver import ReferenceResolver
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, InstanceOf, TypeAdapter, ValidationError

from sam2sgp.errors import ConfigError
from sam2sgp.places import BUNDLE

CONFIGS = BUNDLE / "configs"
# Settings of MONAI itself, for its tracking of experiments.
FOREIGN = {"tracking_uri", "experiment_name", "run_name", "save_execute_config", "is_not_rank0"}
# What a value starts with that is computed when the run begins.
EXPRESSION_MARKS = ("$", "@", "%")

# What a value must be, in words.
WORDS: dict[object, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "None",
}


@dataclass(frozen=True)
class Expected:
    """Says of an annotated type, in words, what a value must be."""

    words: str


def _off(value: bool) -> bool:
    if value:
        raise ValueError("on")
    return value


def _ascending(values: Sequence[float]) -> Sequence[float]:
    if len(values) != 2 or not values[0] < values[1]:
        raise ValueError("not two ascending numbers")
    return values


def _three_shares(values: Sequence[float]) -> Sequence[float]:
    if len(values) != 3 or not sum(values):
        raise ValueError("not three shares")
    return values


Off = Annotated[bool, AfterValidator(_off), Expected("False")]
Axis = Annotated[Literal["auto"] | Annotated[int, Field(ge=0, le=2)], Expected("auto, 0, 1 or 2")]
PathText = Annotated[str, Expected("a path")]
Device = Annotated[str | InstanceOf[torch.device], Expected("a device such as cpu or cuda:0")]
Positive = Annotated[int, Field(ge=1), Expected("a whole number of at least 1")]
Count = Annotated[int, Field(ge=0), Expected("a whole number of at least 0")]
Seed = Annotated[int, Field(ge=0, lt=2**32), Expected("a whole number from 0 to 4294967295")]
Side = Annotated[int, Field(ge=32, multiple_of=32), Expected("a positive multiple of 32")]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False), Expected("a number of at least 0")]
Share = Annotated[float, Field(ge=0, le=1), Expected("a number from 0 to 1")]
Window = Annotated[
    list[float] | tuple[float, ...],
    AfterValidator(_ascending),
    Expected("a list of two numbers, the lower first, such as '[-160, 240]'"),
]
Percentage = Annotated[float, Field(ge=0, le=100)]
Percentiles = Annotated[
    list[Percentage] | tuple[Percentage, ...],
    AfterValidator(_ascending),
    Expected("a list of two numbers from 0 to 100, the lower first, such as '[0.5, 99.5]'"),
]
Shares = Annotated[
    list[Amount] | tuple[Amount, ...],
    AfterValidator(_three_shares),
    Expected("a list of three numbers of at least 0, not all 0, such as '[0.7, 0.15, 0.15]'"),
]
Entries = Annotated[list | tuple, Expected("a list")]
Group = Annotated[dict, Expected("a group such as \"{'r': 8, 'alpha': 16}\"")]


class OptionGroup(BaseModel):
    """Settings of a run: each with its type and its meaning, in one line. An alias is an id within a config."""


class Data(OptionGroup):
    dataset_dir: PathText = Field(
        description="labelled data (training, evaluating) or the images to segment (inferring)"
    )
    support_dir: PathText | None = Field(
        description="labelled images that guide; evaluating: None takes the training section"
    )
    output_dir: PathText = Field(description="where results go")
    bundle_root: PathText = Field(description="folder of the bundle")
    ckpt_dir: PathText = Field(description="where training keeps its state and weights, and evaluating finds them")
    cache_dir: PathText = Field(description="prepared training images; may be deleted")
    patient_pattern: str = Field(description="regular expression that finds the patient in a file's stem")
    split: Shares = Field(description="shares of patients for train, val and test")
    split_seed: Seed = Field(description="seed of that draw")
    held_out: Entries = Field(description="pre-training: data sets that are not trained on")
    related: Entries = Field(description="pre-training: groups of data sets of the same persons")


class Images(OptionGroup):
    modality: str | None = Field(
        description="of images that don't state it themselves, such as CT or MR; decides the scaling"
    )
    ct_window: Window = Field(description="HU mapped to 0..1, for the network and in the report")
    percentiles: Percentiles = Field(
        description="of the intensities, mapped to 0..1 for all that is neither CT nor colour"
    )
    slice_axis: Axis = Field(
        description="how volumes are sliced: 0 sagittal, 1 coronal, 2 axial; auto: along a thick axis"
    )


class SupportSet(OptionGroup, title="Support set"):
    k: Positive = Field(description="support items per query slice and class")
    retrieval: Literal["similarity", "random"] = Field(description="which items: the most similar, or random ones")
    slices_per_class: Positive = Field(description="slices taken from each support volume for each class")
    support_max_items: Positive | None = Field(description="limit of the support set")
    support_seed: Seed = Field(description="seed of the choice of items, and of the run")
    support_cache_dir: PathText | None = Field(description="folder that keeps the encoded support set for the next run")
    support_cache_mb: Amount = Field(description="MiB of it held in memory")


class Segmenting(OptionGroup):
    val_batch_size: Positive = Field(description="slices at a time; lower it if memory runs out")
    region_below: Share = Field(description="objects below this share of the image get a second pass; 0 for never")
    three_d_memory: bool = Field(description="slices of a volume guide their neighbours")
    memory_frames: Positive = Field(description="how many of the last slices guide one")
    object_gate: bool = Field(description="a class with too little evidence in an image is not segmented there")
    one_piece: bool = Field(
        description="in volumes, only the largest part of a class that every labelled volume shows in one piece is kept"
    )
    mirror: bool | Literal["auto"] = Field(
        description="segment each image mirrored, too, and average: twice the time; auto: single images in doubt"
    )
    adapt_seconds: Amount = Field(description="first adapt the network to the support set for so long")
    adapt_steps: Count | None = Field(description="at most so many steps of it")
    adapt_seed: Seed = Field(description="seed of the adaptation")
    adapt_dir: PathText = Field(description="where the adapted weights are kept")


class Results(OptionGroup):
    resume: bool = Field(description="go on where an earlier run stopped")
    report_figures: Count = Field(description="cases with pictures in the report")
    segment_labelled: bool = Field(description="also segment the images of the support set")
    save_overlay: bool = Field(description="also write a PNG of the image with contours for each query")
    save_coloured: bool = Field(description="also write a coloured PNG of the class map for pictures")
    dicom_seg: bool = Field(description="also write a DICOM Segmentation object for DICOM queries")
    save_probability: bool = Field(description="also write the probabilities")
    save_uncertainty: bool = Field(description="also write the uncertainty")
    progress: bool = Field(description="show progress bars")
    export_file: PathText = Field(description="where the exported weights go")


class Network(OptionGroup):
    backbone: str = Field(description="image encoder; chosen by an overlay in configs/backbones")
    model_file: PathText = Field(description="weights to segment with")
    weights: PathText | None | Off = Field(description="what training starts from; False for random weights")
    checkpoint: PathText | None = Field(description="SAM 2.1 checkpoint that training starts from")
    image_size: Side = Field(description="side in pixels of the network's input, a multiple of 32")
    freeze_encoder: bool = Field(description="train nothing of the encoder but LoRA")
    lora: Group | None = Field(description="LoRA on the encoder")
    lora_r: Positive = Field(description="rank", alias="lora::r")
    lora_alpha: Amount = Field(description="scale", alias="lora::alpha")
    lora_dropout: Share = Field(description="share of inputs dropped in training", alias="lora::dropout")
    pmg: Group = Field(description="generation of the pseudo-mask")
    pmg_prior: bool = Field(description="the support prior", alias="pmg::prior")
    pmg_regression: bool = Field(description="the support regression", alias="pmg::regression")
    pma: Group = Field(description="guidance by the pseudo-mask")
    pma_box: bool = Field(description="its box as a prompt", alias="pma::box")
    pma_attention: bool = Field(description="it guides the second decoder's attention", alias="pma::attention")
    pma_dense: bool = Field(description="it is a dense prompt", alias="pma::dense")
    refinement: bool = Field(description="correct the mask at the finest grid")
    memory_pool: Positive | None = Field(description="side of the square of memory tokens averaged into one")


class Computing(OptionGroup):
    device: Device = Field(description="what is computed on")
    precision: Literal["fp32", "bf16", "fp16"] = Field(description="number format")
    num_workers: Count = Field(description="processes that load training data")
    gradient_checkpointing: bool = Field(description="training in half the memory, a fifth slower")
    feature_cache: bool = Field(description="training: a frozen encoder runs once per image")
    feature_cache_dir: PathText = Field(description="where its features are kept")
    feature_cache_mb: Amount = Field(description="MiB of them held in memory")


class Training(OptionGroup):
    seed: Seed = Field(description="of all random choices")
    max_epochs: Positive = Field(description="epochs")
    episodes_per_epoch: Positive = Field(description="episodes in an epoch")
    episodes_per_step: Positive = Field(description="episodes in a batch, per GPU")
    images_per_episode: Positive = Field(description="images of one class in an episode")
    min_k: Positive = Field(description="least support images of a query")
    max_k: Positive = Field(description="most support images of a query")
    accumulation_steps: Positive = Field(description="batches per optimiser step")
    learning_rate: Amount = Field(description="highest learning rate")
    weight_decay: Amount = Field(description="of AdamW")
    warmup_steps: Count = Field(description="steps in which the learning rate rises")
    decay_steps: Positive = Field(description="pre-training: last steps, in which it falls to zero")
    trunk_rate: Amount = Field(
        description="pre-training: learning rate of a pretrained trunk, as a share of the others'"
    )
    frozen_levels: Count = Field(description="pre-training: first levels of a pretrained trunk that are not trained")
    max_gradient_norm: Amount = Field(description="gradients are clipped to it")
    ema_decay: Share = Field(description="of the moving average of the weights")
    loss_kind: Literal["dice_ce", "dice_focal"] = Field(description="loss")
    invert_probability: Share = Field(description="share of episodes whose target is all but the class")
    union_probability: Share = Field(description="share of episodes whose target is two classes")
    empty_fraction: Share = Field(description="share of images without the target")
    clip_probability: Share = Field(description="share of episodes of volumes that consist of clips")
    clip_length: Positive = Field(description="slices of a clip")
    clip_stride: Positive = Field(description="distance between two slices of a clip")
    augmentation_variants: Positive | None = Field(
        description="forms in which each slice comes; None: a new one each time"
    )
    synthetic_probability: Share = Field(description="share of episodes of invented anatomies")
    superpixel_probability: Share = Field(description="share of episodes of superpixels")
    threshold_probability: Share = Field(description="share of episodes of bands of intensity")
    label_operation_probability: Share = Field(description="share of targets that are changed")
    region_probability: Share = Field(description="share of images cut to a region around the target")
    crop_probability: Share = Field(description="share of images cut at random")
    val_interval: Positive = Field(description="epochs between validations")
    val_max_cases: Positive | None = Field(description="cases in a validation")
    val_episodes_per_group: Positive = Field(description="pre-training: episodes of a group in a validation")
    patience: Count = Field(description="stop after so many epochs without a better Dice; 0 never does")
    keep_best: bool = Field(description="write the weights of the best epoch, not of the last")
    federated_rounds: Positive = Field(description="rounds of a federated training")


@dataclass(frozen=True)
class Option:
    """A setting of a run, as an `OptionGroup` declares it."""

    hint: Any
    """Its type."""

    meaning: str
    """In one line."""

    @property
    def expected(self) -> str:
        return _expected(self.hint)

    def allows(self, value: object) -> bool:
        return _allows(self.hint, value)


def _options(group: type[OptionGroup]) -> dict[str, Option]:
    hints = get_type_hints(group, include_extras=True)
    return {
        field.alias or name: Option(hints[name], field.description or "") for name, field in group.model_fields.items()
    }


GROUPS = (Data, Images, SupportSet, Segmenting, Results, Network, Computing, Training)
OPTIONS = {group.model_config.get("title") or group.__name__: _options(group) for group in GROUPS}
ALL = {name: option for options in OPTIONS.values() for name, option in options.items()}


def check(parser: ConfigParser | None = None) -> None:
    """Check the options of a run; for `--help`, list them and end the process.

    Args:
        parser: with the merged config; None: the one that evaluates the expression from which this is called.

    Raises:
        ConfigError: an option that nothing in the run reads, or a value of the wrong kind.
    """
    parser = parser or _calling_parser()
    config = parser.config
    if config.get("help") or config.get("h"):
        print(help_text(config))
        raise SystemExit(0)
    for name in config:
        _check_name(name, config)
    for name, option in ALL.items():
        value = _value(config, name)
        if value is not _MISSING and not _is_expression(value) and not option.allows(value):
            raise ConfigError(f"--{name}: expected {option.expected}, found {value!r}.{_spelled(option, value)}")
    least, most = _value(config, "min_k"), _value(config, "max_k")
    if isinstance(least, int) and isinstance(most, int) and least > most:
        raise ConfigError(f"--min_k: expected at most max_k, found {least}, which is more than {most}.")
    for identifier, arguments in _components(config):
        _check_arguments(identifier, arguments, parser)


def refuse_generic_app() -> None:
    """What MONAI Label's app for any bundle runs into when it starts: it asks each bundle for `displayable_configs`.

    Raises:
        ConfigError: always; no support set could guide that app, and its labels would never join one.
    """
    raise ConfigError(
        "MONAI Label: expected the app of this bundle, found the generic monaibundle app, which knows no support set; "
        "run `sam2sgp serve STUDIES`, or start_server with --app apps/sam2sgp."
    )


def check_places(config: Mapping, names: Iterable[str]) -> None:
    """Check that nested ids, such as `train::dataset::episodes`, lead into groups that a merged config has.

    MONAI looks for the group when it takes over an override, before `check` can be called.

    Raises:
        ConfigError: with the nearest id.
    """
    ids = dict(_ids(config))
    groups = [name for name, value in ids.items() if isinstance(value, Mapping | list)]
    for name in names:
        group, _, last = ReferenceResolver.normalize_id(name).rpartition("::")
        if not group or group in groups:
            continue
        below = [f"{known}::{last}" for known in get_close_matches(group, groups, 1)]
        near = get_close_matches(name, ids, 1, 0.75) or below
        hint = f"did you mean --{near[0]}?" if near else "--help lists the options."
        raise ConfigError(f"--{name}: expected an option of this run, found no group {group!r} in it; {hint}")


def _ids(value: object, above: str = "") -> Iterator[tuple[str, object]]:
    """Ids of all that a config holds, as `train::dataset::episodes`, and their values."""
    entries = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        name = f"{above}::{key}" if above else str(key)
        yield name, entry
        yield from _ids(entry, name)


def help_text(config: Mapping) -> str:
    """The options that a merged config has, by group, with their values and meanings."""
    lines = ['Options of this run, as --name value; values are Python literals, as True, None or "[0, 1]":', ""]
    for group, options in OPTIONS.items():
        shown = {name: _value(config, name) for name in options}
        shown = {name: value for name, value in shown.items() if value is not _MISSING}
        if not shown:
            continue
        lines.append(group)
        for name, value in shown.items():
            default = "computed" if _is_expression(value) else repr(value)
            kind = "" if options[name].hint is bool else f"; {options[name].expected}"
            text = f"  --{name:<22} {options[name].meaning}{kind} [{default}]"
            lines += textwrap.wrap(text, 118, subsequent_indent=" " * 27, drop_whitespace=True)
        lines.append("")
    lines.append("Anything else in the config is overridden by its id, as --train::dataset::episodes 10.")
    return "\n".join(lines)


class _Missing:
    pass


_MISSING = _Missing()


def _calling_parser() -> ConfigParser:
    """MONAI hands no parser to the expressions of a config, but it is the one that evaluates them."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, ConfigParser):
            return owner
        frame = frame.f_back
    raise ConfigError("options: expected to be called by an expression of a config, found no parser.")


def _value(config: Mapping, name: str) -> object:
    value: object = config
    for key in name.split("::"):
        if not isinstance(value, Mapping) or key not in value:
            return _MISSING
        value = value[key]
    return value


def _is_expression(value: object) -> bool:
    if isinstance(value, str):
        return value.startswith(EXPRESSION_MARKS)
    if isinstance(value, Mapping):
        return "_target_" in value or any(map(_is_expression, value.values()))
    return isinstance(value, list | tuple) and any(map(_is_expression, value))


def _check_name(name: str, config: Mapping) -> None:
    """An id that nothing refers to, that computes nothing and that is no option of this run, is a mistake."""
    value = config[name]
    if name.startswith("_") or name in FOREIGN or name == "imports" or _is_expression(value):
        return
    if name not in _references(config) and not _is_declared(name, config):
        raise _unknown(name, config)
    if isinstance(value, Mapping) and any(other.startswith(f"{name}::") for other in ALL):
        for key in value:
            if f"{name}::{key}" not in ALL:
                raise _unknown(f"{name}::{key}", config)


def _is_declared(name: str, config: Mapping) -> bool:
    """Whether an option is one of this run, though perhaps an overlay made it idle."""
    if "train" in config:
        return name in ALL
    return name in _shipped("inference.json") | _shipped(f"backbones/{config.get('backbone')}.json")


@cache
def _shipped(name: str) -> frozenset[str]:
    path = CONFIGS / name
    return frozenset(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else frozenset()


def _references(config: Mapping) -> set[str]:
    """Ids on the top level that some value refers to."""
    found: set[str] = set()

    def walk(value: object) -> None:
        if isinstance(value, str) and value.startswith(EXPRESSION_MARKS):
            for reference in ReferenceResolver.match_refs_pattern(ReferenceResolver.normalize_id(value)):
                found.add(reference.split("::")[0])
        elif isinstance(value, Mapping):
            for name, entry in value.items():
                if name != "_meta_":
                    walk(entry)
        elif isinstance(value, list | tuple):
            for entry in value:
                walk(entry)

    walk(config)
    return found


def _unknown(name: str, config: Mapping) -> ConfigError:
    if name in ALL:
        return ConfigError(f"--{name}: expected an option of this run, found one of training; leave it out.")
    known = [other for other in ALL if _value(config, other) is not _MISSING]
    known += [other for other in _references(config) if other not in known and other in config]
    by_spelling = {other.lower().replace("-", "_"): other for other in reversed(known)}
    # A member of a group may be called by its own name.
    by_spelling = {other.rsplit("::")[-1]: other for other in known if "::" in other} | by_spelling
    wanted = name.lower().replace("-", "_")
    near = get_close_matches(wanted, by_spelling, 1) or get_close_matches(wanted.rsplit("::")[-1], by_spelling, 1)
    hint = f"did you mean --{by_spelling[near[0]]}?" if near else "no option has a name like it."
    return ConfigError(f"--{name}: expected an option of this run, found an unknown one; {hint} --help lists them all.")


def _spelled(option: Option, value: object) -> str:
    """How to write what was probably meant."""
    text = str(value).strip().lower()
    if option.allows(False):
        meant = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        if text in meant:
            return f" Write {meant[text]}, with a capital letter."
    if option.allows(None) and text in ("none", "null"):
        return " Write None, with a capital letter."
    near = get_close_matches(text, [str(word) for word in _literals(option.hint) if isinstance(word, str)], 1)
    return f" Did you mean {near[0]}?" if near else ""


def _components(value: object, identifier: str = "") -> Iterator[tuple[str, Mapping]]:
    """All that the config makes by a `_target_`, by its id."""
    entries: Iterable[tuple[object, object]]
    if isinstance(value, Mapping):
        if isinstance(value.get("_target_"), str) and not _is_expression(value["_target_"]):
            yield identifier, value
        entries = value.items()
    elif isinstance(value, list | tuple):
        entries = enumerate(value)
    else:
        return
    for name, entry in entries:
        if name != "_meta_":
            yield from _components(entry, f"{identifier}::{name}" if identifier else str(name))


def _check_arguments(identifier: str, component: Mapping, parser: ConfigParser) -> None:
    """A component's arguments are those of its class or function, and plain values are of the annotated types."""
    target = ConfigComponent(dict(component), identifier, parser.locator).resolve_module_name()
    made: Any = pydoc.locate(target) if isinstance(target, str) else target
    try:
        parameters = inspect.signature(made).parameters
    except (TypeError, ValueError):
        return  # of compiled code, which does not say
    is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for name, value in component.items():
        if name.startswith("_"):
            continue
        if name in parameters:
            hint = _plain_type(made, parameters[name])
            if hint is not None and not _is_expression(value) and not _allows(hint, value):
                raise ConfigError(f"--{identifier}::{name}: expected {_expected(hint)}, found {value!r}.")
        elif not is_open:
            near = get_close_matches(name, parameters, 1)
            hint = f"did you mean --{identifier}::{near[0]}?" if near else f"expected one of {', '.join(parameters)}."
            raise ConfigError(f"--{identifier}::{name}: {component['_target_']} has no such argument; {hint}")


def _plain_type(made: Any, parameter: inspect.Parameter) -> Any:
    """The type that an argument may have, if its annotation names plain ones only; else None."""
    hint = parameter.annotation
    if isinstance(hint, str):
        try:
            function = inspect.getattr_static(made, "__init__") if isinstance(made, type) else made
            hint = get_type_hints(function)[parameter.name]
        except Exception:  # annotations may name what is only imported for type checkers
            return None
    # A configuration holds no tensors.
    types = [kind for kind in _members(hint) if kind is not torch.Tensor]
    return reduce(or_, types) if types and all(kind in WORDS for kind in types) else None


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type that there is."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _literals(hint: Any) -> list[Any]:
    """The values that a type names one by one."""
    return [value for kind in _members(hint) if get_origin(kind) is Literal for value in get_args(kind)]


def _expected(hint: Any) -> str:
    """What a value of a type must be, in words."""
    for mark in getattr(hint, "__metadata__", ()):
        if isinstance(mark, Expected):
            return mark.words
    if get_origin(hint) is Literal:
        *others, last = map(str, get_args(hint))
        return f"{', '.join(others)} or {last}" if others else last
    members = _members(hint)
    return WORDS[hint] if len(members) == 1 else ", or ".join(map(_expected, members))


def _allows(hint: Any, value: object) -> bool:
    """Whether a value is of a type as it stands: no text counts as a number, and no number as True or False."""
    try:
        TypeAdapter(hint, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError:
        return False
    return True
