"""The options of a run: what each means, and a check of those that were given before any work begins.

In: the merged config of `python -m monai.bundle run`, overrides included. Out: nothing, or one `ConfigError` that names
the option, what was expected and the nearest valid name; for `--help`, the list of options.

`OPTIONS` says what each setting means and what its value may be; its default stands in the JSON configs.
"""

import inspect
import json
import pydoc
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from types import UnionType
from typing import Union, get_args, get_origin, get_type_hints

from monai.bundle import ConfigParser
from monai.bundle.config_item import ConfigComponent
from monai.bundle.reference_resolver import ReferenceResolver
from torch import Tensor

from sam2sgp.errors import ConfigError
from sam2sgp.places import BUNDLE

CONFIGS = BUNDLE / "configs"
# Of MONAI itself: its tracking of experiments.
FOREIGN = {"tracking_uri", "experiment_name", "run_name", "save_execute_config", "is_not_rank0"}
# What a value starts with that is computed when the run begins.
EXPRESSION_MARKS = ("$", "@", "%")

KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "switch": ((bool,), "True or False"),
    "count": ((int,), "a whole number"),
    "number": ((int, float), "a number"),
    "text": ((str,), "a word or text"),
    "path": ((str,), "a path"),
    "device": ((str, object), "a device such as cpu or cuda:0"),
    "axis": ((int, str), "auto, 0, 1 or 2"),
    "numbers": ((list, tuple), "a list of numbers such as '[-160, 240]'"),
    "list": ((list, tuple), "a list"),
    "group": ((dict,), "a group such as \"{'r': 8, 'alpha': 16}\""),
}


@dataclass(frozen=True)
class Option:
    """A setting of a run.

    Attributes:
        kind: a key of `KINDS`, or the words to choose from with "|" between them.
        meaning: in one line.
        optional: None is a value too. off: False is one too.
    """

    kind: str
    meaning: str
    optional: bool = False
    off: bool = False

    @property
    def expected(self) -> str:
        words = KINDS[self.kind][1] if self.kind in KINDS else " or ".join(self.kind.split("|"))
        return words + ", or None" * self.optional + ", or False" * self.off

    def allows(self, value: object) -> bool:
        if value is None:
            return self.optional
        if self.off and value is False:
            return True
        if self.kind not in KINDS:
            return value in self.kind.split("|")
        types = KINDS[self.kind][0]
        if isinstance(value, bool) and bool not in types and object not in types:
            return False
        return isinstance(value, types)


OPTIONS: dict[str, dict[str, Option]] = {
    "Data": {
        "dataset_dir": Option("path", "labelled data (training, evaluating) or the images to segment (inferring)"),
        "support_dir": Option("path", "labelled images that guide; evaluating: None takes the training section", True),
        "output_dir": Option("path", "where results go"),
        "bundle_root": Option("path", "folder of the bundle"),
        "ckpt_dir": Option("path", "where training keeps its state and weights, and evaluating finds them"),
        "cache_dir": Option("path", "prepared training images; may be deleted"),
        "patient_pattern": Option("text", "regular expression that finds the patient in a file's stem"),
        "split": Option("numbers", "shares of patients for train, val and test"),
        "split_seed": Option("count", "seed of that draw"),
        "held_out": Option("list", "pre-training: data sets that are not trained on"),
        "related": Option("list", "pre-training: groups of data sets of the same persons"),
    },
    "Images": {
        "modality": Option(
            "text", "of images that don't state it themselves, such as CT or MR; decides the scaling", True
        ),
        "ct_window": Option("numbers", "HU mapped to 0..1, for the network and in the report"),
        "percentiles": Option("numbers", "of the intensities, mapped to 0..1 for all that is neither CT nor colour"),
        "slice_axis": Option(
            "axis", "how volumes are sliced: 0 sagittal, 1 coronal, 2 axial; auto: along a thick axis"
        ),
    },
    "Support set": {
        "k": Option("count", "support items per query slice and class"),
        "retrieval": Option("similarity|random", "which items: the most similar, or random ones"),
        "slices_per_class": Option("count", "slices taken from each support volume for each class"),
        "support_max_items": Option("count", "limit of the support set", True),
        "support_seed": Option("count", "seed of the choice of items, and of the run"),
        "support_cache_dir": Option("path", "folder that keeps the encoded support set for the next run", True),
        "support_cache_mb": Option("number", "MiB of it held in memory"),
    },
    "Segmenting": {
        "val_batch_size": Option("count", "slices at a time; lower it if memory runs out"),
        "region_below": Option("number", "objects below this share of the image get a second pass; 0 for never"),
        "three_d_memory": Option("switch", "slices of a volume guide their neighbours"),
        "memory_frames": Option("count", "how many of the last slices guide one"),
        "object_gate": Option("switch", "a class with too little evidence in an image is not segmented there"),
        "adapt_seconds": Option("number", "first adapt the network to the support set for so long"),
        "adapt_steps": Option("count", "at most so many steps of it", True),
        "adapt_seed": Option("count", "seed of the adaptation"),
        "adapt_dir": Option("path", "where the adapted weights are kept"),
    },
    "Results": {
        "resume": Option("switch", "go on where an earlier run stopped"),
        "report_figures": Option("count", "cases with pictures in the report"),
        "segment_labelled": Option("switch", "also segment the images of the support set"),
        "save_overlay": Option("switch", "also write a PNG of the image with contours for each query"),
        "save_coloured": Option("switch", "also write a coloured PNG of the class map for pictures"),
        "dicom_seg": Option("switch", "also write a DICOM Segmentation object for DICOM queries"),
        "save_probability": Option("switch", "also write the probabilities"),
        "save_uncertainty": Option("switch", "also write the uncertainty"),
        "progress": Option("switch", "show progress bars"),
        "export_file": Option("path", "where the exported weights go"),
    },
    "Network": {
        "backbone": Option("text", "image encoder; chosen by an overlay in configs/backbones"),
        "model_file": Option("path", "weights to segment with"),
        "weights": Option("path", "what training starts from; False for random weights", True, True),
        "checkpoint": Option("path", "SAM 2.1 checkpoint that training starts from", True),
        "image_size": Option("count", "side in pixels of the network's input, a multiple of 32"),
        "freeze_encoder": Option("switch", "train nothing of the encoder but LoRA"),
        "lora": Option("group", "LoRA on the encoder", True),
        "lora::r": Option("count", "rank"),
        "lora::alpha": Option("number", "scale"),
        "lora::dropout": Option("number", "share of inputs dropped in training"),
        "pmg": Option("group", "generation of the pseudo-mask"),
        "pmg::prior": Option("switch", "the support prior"),
        "pmg::regression": Option("switch", "the support regression"),
        "pma": Option("group", "guidance by the pseudo-mask"),
        "pma::box": Option("switch", "its box as a prompt"),
        "pma::attention": Option("switch", "it guides the second decoder's attention"),
        "pma::dense": Option("switch", "it is a dense prompt"),
        "refinement": Option("switch", "correct the mask at the finest grid"),
        "memory_pool": Option("count", "side of the square of memory tokens averaged into one", True),
    },
    "Computing": {
        "device": Option("device", "what is computed on"),
        "precision": Option("fp32|bf16|fp16", "number format"),
        "compile": Option("switch", "torch.compile of the image encoder"),
        "runtime": Option("eager|onnxruntime", "what runs the network"),
        "graphs_dir": Option("path", "folder of exported graphs"),
        "num_workers": Option("count", "processes that load training data"),
        "gradient_checkpointing": Option("switch", "training in half the memory, a fifth slower"),
        "feature_cache": Option("switch", "training: a frozen encoder runs once per image"),
        "feature_cache_dir": Option("path", "where its features are kept"),
        "feature_cache_mb": Option("number", "MiB of them held in memory"),
    },
    "Training": {
        "seed": Option("count", "of all random choices"),
        "max_epochs": Option("count", "epochs"),
        "episodes_per_epoch": Option("count", "episodes in an epoch"),
        "episodes_per_step": Option("count", "episodes in a batch, per GPU"),
        "images_per_episode": Option("count", "images of one class in an episode"),
        "min_k": Option("count", "least support images of a query"),
        "max_k": Option("count", "most support images of a query"),
        "accumulation_steps": Option("count", "batches per optimiser step"),
        "learning_rate": Option("number", "highest learning rate"),
        "weight_decay": Option("number", "of AdamW"),
        "warmup_steps": Option("count", "steps in which the learning rate rises"),
        "decay_steps": Option("count", "pre-training: last steps, in which it falls to zero"),
        "trunk_rate": Option("number", "pre-training: learning rate of a pretrained trunk, as a share of the others'"),
        "frozen_levels": Option("count", "pre-training: first levels of a pretrained trunk that are not trained"),
        "max_gradient_norm": Option("number", "gradients are clipped to it"),
        "ema_decay": Option("number", "of the moving average of the weights"),
        "loss_kind": Option("dice_ce|dice_focal", "loss"),
        "invert_probability": Option("number", "share of episodes whose target is all but the class"),
        "union_probability": Option("number", "share of episodes whose target is two classes"),
        "empty_fraction": Option("number", "share of images without the target"),
        "clip_probability": Option("number", "share of episodes of volumes that consist of clips"),
        "clip_length": Option("count", "slices of a clip"),
        "clip_stride": Option("count", "distance between two slices of a clip"),
        "augmentation_variants": Option("count", "forms in which each slice comes; None: a new one each time", True),
        "synthetic_probability": Option("number", "share of episodes of invented anatomies"),
        "superpixel_probability": Option("number", "share of episodes of superpixels"),
        "threshold_probability": Option("number", "share of episodes of bands of intensity"),
        "label_operation_probability": Option("number", "share of targets that are changed"),
        "region_probability": Option("number", "share of images cut to a region around the target"),
        "crop_probability": Option("number", "share of images cut at random"),
        "val_interval": Option("count", "epochs between validations"),
        "val_max_cases": Option("count", "cases in a validation", True),
        "val_episodes_per_group": Option("count", "pre-training: episodes of a group in a validation"),
        "patience": Option("count", "stop after so many epochs without a better Dice; 0 never does"),
        "keep_best": Option("switch", "write the weights of the best epoch, not of the last"),
        "federated_rounds": Option("count", "rounds of a federated training"),
    },
}
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
            text = f"  --{name:<22} {options[name].meaning} [{default}]"
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
    for part in name.split("::"):
        if not isinstance(value, Mapping) or part not in value:
            return _MISSING
        value = value[part]
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
    # Of a group, a member may be called by its own name.
    by_spelling = {other.rsplit("::")[-1]: other for other in known if "::" in other} | by_spelling
    wanted = name.lower().replace("-", "_")
    near = get_close_matches(wanted, by_spelling, 1) or get_close_matches(wanted.rsplit("::")[-1], by_spelling, 1)
    hint = f"did you mean --{by_spelling[near[0]]}?" if near else "no option has a name like it."
    return ConfigError(f"--{name}: expected an option of this run, found an unknown one; {hint} --help lists them all.")


def _spelled(option: Option, value: object) -> str:
    """How to write what was probably meant."""
    text = str(value).strip().lower()
    if option.kind == "switch" or option.off:
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
    if option.optional and text in ("none", "null"):
        return " Write None, with a capital letter."
    near = get_close_matches(text, option.kind.split("|"), 1) if "|" in option.kind else []
    return f" Did you mean {near[0]}?" if near else ""


def _components(value: object, identifier: str = "") -> Iterator[tuple[str, Mapping]]:
    """All that the config makes by a `_target_`, by its id."""
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
    made = pydoc.locate(target) if isinstance(target, str) else target
    try:
        parameters = inspect.signature(made).parameters
    except (TypeError, ValueError):
        return  # of compiled code, which does not say
    is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for name, value in component.items():
        if name.startswith("_"):
            continue
        if name in parameters:
            types = _plain_types(made, parameters[name])
            if types and not _is_expression(value) and not _fits(value, types):
                expected = " or ".join(_NAMES[kind] for kind in types)
                raise ConfigError(f"--{identifier}::{name}: expected {expected}, found {value!r}.")
        elif not is_open:
            near = get_close_matches(name, parameters, 1)
            hint = f"did you mean --{identifier}::{near[0]}?" if near else f"expected one of {', '.join(parameters)}."
            raise ConfigError(f"--{identifier}::{name}: {component['_target_']} has no such argument; {hint}")


_NAMES = {bool: "True or False", int: "a whole number", float: "a number", str: "text", type(None): "None"}


def _plain_types(made: object, parameter: inspect.Parameter) -> tuple[type, ...]:
    """The types that an argument may have, if its annotation names plain ones only; else none."""
    hint = parameter.annotation
    if isinstance(hint, str):
        try:
            hint = get_type_hints(made.__init__ if isinstance(made, type) else made)[parameter.name]
        except Exception:  # annotations may name what is only imported for type checkers
            return ()
    types = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    # A configuration holds no tensors.
    types = tuple(kind for kind in types if kind is not Tensor)
    return types if all(kind in _NAMES for kind in types) else ()


def _fits(value: object, types: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in types
    return isinstance(value, types) or (isinstance(value, int) and float in types)
