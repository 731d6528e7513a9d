"""LoRA fine-tuning on the approved labels, as a MONAI Label train task.

    labelled cases ─┬─ half 0 ── train.json + finetune.json ── weights 0 ── Dice on half 1 ─┐
                    └─ half 1 ── train.json + finetune.json ── weights 1 ── Dice on half 0 ─┤
                              clearly better than before on all labels? mean of both weights ─ published

Both halves start from the weights in use, LoRA is merged after training, and every label is judged by weights that were
not trained on it: few labels are a weak judge, and a part of few is a weaker one. With the mean of both weights, each
half's own are kept, from which the next training of that half starts.

What a stopped training had is kept; the next one goes on with it if it has the same labels, options and weights to
start from.
"""

import gc
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser, ConfigWorkflow
from monailabel.utils.others.generic import device_list, name_to_device
from torch.optim.swa_utils import AveragedModel

from lib.checks import RequestError
from lib.serving.options import ROLL_BACK, TRAIN, TrainParams
from lib.serving.published_weights import MODEL_FILE, Version, Weights
from lib.trainers.comparison import Comparison
from lib.trainers.data import HALVES, digest, halve, sections, write_datalist
from lib.trainers.publishing import KEPT, PUBLISHED, Publishing
from lib.trainers.status import StatusHandler
from sam2sgp.errors import WeightsError
from sam2sgp.files import sha256_of, write_text
from sam2sgp.networks import load_weights, merge_lora, save_weights

logger = logging.getLogger(__name__)

METRIC = "val_mean_dice"
LAST_FILE = "last.pt"
TENSORBOARD_FOLDER = "tensorboard"
RUN_FILE = "run.json"
HALVES_FILE = "halves.json"
HALF_FILES = tuple(f"half_{half}.pt" for half in range(HALVES))
OPTIONS = ("max_epochs", "episodes_per_epoch", "learning_rate")
# Keys that inference.json shares with train.json, but which a training sets itself.
OWN_KEYS = (
    "bundle_root",
    "dataset_dir",
    "support_dir",
    "output_dir",
    "device",
    "progress",
    "support_cache_dir",
    "lora",
)


@dataclass(frozen=True)
class Run:
    """What a training has measured so far, in a file, with which a training of the same kind goes on.

    Attributes:
        path: of the file.
        key: what the training is made of: labels, options, weights to start from, configs.
        dice: by patient, of each measurement by its name.
    """

    path: Path
    key: str
    dice: dict[str, dict[str, float]]

    @classmethod
    def of(cls, path: Path, key: str) -> "Run | None":
        """The run that a file holds; None if there is none, or one of another key."""
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return cls(path, key, known["dice"]) if known.get("key") == key else None

    def measured(self, name: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """A measurement by its name, which is made and kept if it hasn't been yet."""
        if name not in self.dice:
            self.dice[name] = measure()
            self.keep()
        return self.dice[name]

    def keep(self) -> None:
        """Write the file."""
        write_text(self.path, json.dumps({"key": self.key, "dice": self.dice}))


@dataclass(frozen=True)
class Half:
    """What was trained on one half.

    Attributes:
        weights: their file.
        before, after: Dice by patient on the other half, of the weights to start from and of the trained ones.
    """

    weights: Path
    before: dict[str, float]
    after: dict[str, float]


class FineTuning(Publishing):
    """Train task that makes better weights from the active ones, or none.

    Request: `action` ("train", the default, or "roll_back"), `max_epochs`, `episodes_per_epoch`, `learning_rate`,
    `device`. A list counts as its first element, which is what the options of `config` hold.

    Args:
        bundle_root: the bundle's folder.
        state_dir: the app's; everything is written below `training/`.
        weights: where weights come from and go to.
        cases: gives the labelled cases that can be used, dicts as `load_datalist` gives them, and a sentence on each
            one that can't.
        class_names: gives the declared names of their classes.
        overrides: keys of inference.json with the app's values; those that training has too are used.
        overlays: config files, relative to the bundle's folder, between train.json and finetune.json: a backbone's.
        audit: as of `Publishing`.
        gain_of_adaptation: tells what the adaptation of weights gains in mean Dice, 0 where none is in use.
    """

    params = TrainParams

    def __init__(
        self,
        bundle_root: Path,
        state_dir: Path,
        weights: Weights,
        cases: Callable[[], tuple[Sequence[Mapping], Sequence[str]]],
        class_names: Callable[[], Mapping[int, str]],
        overrides: Mapping[str, Any] | None = None,
        overlays: Sequence[str] = (),
        audit: Callable[..., None] = lambda action, **details: None,
        gain_of_adaptation: Callable[[Version], float] = lambda version: 0.0,
    ) -> None:
        super().__init__(
            "LoRA fine-tuning on the approved labels; new weights are used only if better on labels they have not seen",
            state_dir,
            weights,
            audit,
        )
        self.bundle_root = Path(bundle_root)
        self.work = self.folder / "work"
        self.cases = cases
        self.class_names = class_names
        self.gain_of_adaptation = gain_of_adaptation
        self.train_files = ["configs/train.json", *overlays, "configs/finetune.json"]
        self.evaluate_files = ["configs/train.json", *overlays, "configs/evaluate.json"]
        declared = ConfigParser.load_config_files([str(self.bundle_root / name) for name in self.train_files])
        self.overrides = {
            key: value
            for key, value in (overrides or {}).items()
            if key.split("::")[0] in declared and key not in OWN_KEYS and (key != "lora" or value)
        }
        self._config = {
            "action": [TRAIN, ROLL_BACK],
            **{name: declared[name] for name in OPTIONS},
            "device": device_list(),
        }

    def config(self) -> dict[str, Any]:
        """The options of a request with their defaults, which are the bundle's."""
        return self._config

    def _options(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a request as config values. Nothing else of it reaches a config, whose strings are code."""
        params = TrainParams.of_request(request)
        options = {name: getattr(params, name) or self._config[name] for name in OPTIONS}
        return {**options, "device": f"$torch.device({self._device(params.device)!r})"}

    def _device(self, name: object) -> str:
        if name is None or isinstance(name, str):
            kind, _, index = name_to_device(name).partition(":")
            if kind == "cpu" and not index:
                return kind
            if kind == "cuda" and (not index or index.isdecimal() and int(index) < torch.cuda.device_count()):
                return f"{kind}:{index or 0}"
        raise RequestError(f"device is {name!r}: expected one of {', '.join(self._config['device'])}.")

    def _make_weights(self, request: Mapping[str, Any], history: Sequence[Mapping]) -> None:
        options = self._options(request)
        cases = self._usable_cases()
        start = self.weights.active()
        adapted = self.gain_of_adaptation(start)
        half_of = halve(cases, _known_halves(start.path))
        details = {"labels": len(cases), "patients": len(half_of), "start_weights": start.name}
        self.status.update(message="Preparing.", epoch=0, max_epochs=HALVES * options["max_epochs"], **details)
        settings = self._settings(options["device"])
        # By their content: an adaptation puts the same weights in use once more.
        run = self._prepare(digest(cases, half_of), [sha256_of(start.path), settings, options])
        resumed = any(self.work.glob(f"*/{LAST_FILE}"))
        self.audit("train", resumed=resumed, **details, **options)
        if resumed:
            self.status.update(message="Training goes on from where it was stopped.", history=list(history))
        else:
            self.status.update(message="Training.")
        halves = [
            self._train_half(half, sections(cases, half_of, half), start, settings, options, run)
            for half in range(HALVES)
        ]
        compared = Comparison.of(_together(half.before for half in halves), _together(half.after for half in halves))
        if compared.exceeds(adapted):
            version = self._publish([half.weights for half in halves], half_of, settings, compared, details)
            self.audit("publish", weights=version.name, replaced=start.name, **compared.metrics)
            state, verdict = PUBLISHED, f"The new weights {version.name!r} are in use."
            if adapted:
                verdict += " They are not adapted: run the training `adapt` again."
        else:
            self.audit("keep", weights=start.name, **compared.metrics)
            than = f" than with the adaptation, which gains {adapted:.4f}" if adapted else ""
            state, verdict = KEPT, f"Not clearly better{than}, so the weights {start.name!r} stay in use."
        self.status.finish(state, f"{compared} {verdict}", **compared.metrics)
        self._clear()

    def _settings(self, device: str) -> dict[str, Any]:
        """What training and measuring a half have in common, as config values."""
        return {
            **self.overrides,
            "bundle_root": str(self.bundle_root),
            "device": device,
            "progress": False,
            # All of a half is trained on, to the end: an epoch chosen by its Dice on the other half would flatter it.
            "split": [1.0, 0.0, 0.0],
            "keep_best": False,
        }

    def _usable_cases(self) -> Sequence[Mapping]:
        """The labelled cases that can be used; the others are told."""
        cases, left_out = self.cases()
        if left_out:
            self.status.update(left_out=list(left_out))
            logger.warning("Left out of the training: %s", " ".join(left_out))
        return cases

    def _prepare(self, content: str, choices: Sequence) -> Run:
        """A run in an empty work folder, or that of a stopped training of the same kind, with what it had measured."""
        configs = [(self.bundle_root / name).read_text(encoding="utf-8") for name in self.train_files]
        key = sha256(json.dumps([content, choices, configs], sort_keys=True).encode()).hexdigest()
        run = Run.of(self.work / RUN_FILE, key)
        if run is None:
            shutil.rmtree(self.work, ignore_errors=True)
            run = Run(self.work / RUN_FILE, key, {})
            run.keep()
        return run

    def _clear(self) -> None:
        """Leave only the curves: there is nothing to go on with, and images don't stay longer than they are needed."""
        for path in [*self.work.iterdir(), *self.work.glob("*/*")]:
            if path.is_file():
                path.unlink()
            elif path.parent != self.work and path.name != TENSORBOARD_FOLDER:
                shutil.rmtree(path, ignore_errors=True)

    def _train_half(
        self,
        half: int,
        data: Mapping[str, Sequence[Mapping]],
        start: Version,
        settings: Mapping[str, Any],
        options: Mapping[str, Any],
        run: Run,
    ) -> Half:
        folder = self.work / f"half_{half}"
        datalist = folder / "datalist.json"
        write_datalist(datalist, data, self.class_names())
        settings = {**settings, "dataset_dir": str(datalist), "output_dir": str(folder)}
        own = start.path.with_name(HALF_FILES[half])
        first = own if own.is_file() else start.path
        before = run.measured(f"before_{half}", lambda: self._dice(first, settings))
        trained = self._run({**settings, **options, "model_file": str(first)}, half)
        # Ignite's engines hold each other: not beside the next half, on a GPU.
        gc.collect()
        after = run.measured(f"after_{half}", lambda: self._dice(trained, settings))
        return Half(trained, before, after)

    def _dice(self, weights: Path, settings: Mapping[str, Any]) -> dict[str, float]:
        """Mean Dice by patient of a weights file on the other half, guided by its own, by the bundle's evaluation."""
        parser = self._evaluation(settings)
        network = parser.get_parsed_content("network")
        load_weights(network, weights)
        evaluator = parser.get_parsed_content("validate::evaluator")
        patients: list[str] = []

        @evaluator.on(Events.ITERATION_COMPLETED)
        def note() -> None:
            patients.extend(case["patient"] for case in evaluator.state.output if "truth_index" in case)

        evaluator.run()
        of_patient: dict[str, list[float]] = {}
        for patient, values in zip(patients, evaluator.state.metric_details[METRIC], strict=True):
            # One value per class; none where there is no object.
            of_patient.setdefault(patient, []).extend(values[values.isfinite()].tolist())
        return {patient: float(np.mean(values)) for patient, values in of_patient.items() if values}

    def _evaluation(self, settings: Mapping[str, Any]) -> ConfigParser:
        parser = ConfigParser()
        parser.read_config([str(self.bundle_root / name) for name in self.evaluate_files])
        parser.update({**settings, "validate::dataset::data": "@val_data", "validate::handlers": []})
        return parser

    def _run(self, settings: Mapping[str, Any], half: int) -> Path:
        """Train a half through the bundle; the path of its weights, LoRA merged."""
        workflow = ConfigWorkflow(
            config_file=[str(self.bundle_root / name) for name in self.train_files],
            meta_file=str(self.bundle_root / "configs" / "metadata.json"),
            logging_file=False,
            workflow_type="train",
            **settings,
        )
        workflow.initialize()
        content = workflow.parser.get_parsed_content
        handler = StatusHandler(self.status, content("validate::evaluator"), METRIC, half, HALVES)
        handler.attach(content("train::trainer"))
        workflow.run()
        network = content("network_def")
        folder = Path(settings["output_dir"])
        load_weights(network, folder / MODEL_FILE)
        merge_lora(network)
        merged = folder / "merged" / MODEL_FILE
        save_weights(network, merged)
        return merged

    def _publish(
        self,
        files: Sequence[Path],
        half_of: Mapping[str, int],
        settings: Mapping[str, Any],
        compared: Comparison,
        details: Mapping[str, Any],
    ) -> Version:
        """Put the mean of both halves' weights in use; they themselves are kept with it."""
        mean, halves = self.work / MODEL_FILE, self.work / HALVES_FILE
        self._save_mean(files, mean, settings)
        write_text(halves, json.dumps(half_of))
        metrics = {"dice": compared.after, "dice_before": compared.before, "judged": compared.patients, **details}
        return self.weights.publish(mean, metrics, {HALVES_FILE: halves, **dict(zip(HALF_FILES, files, strict=True))})

    def _save_mean(self, files: Sequence[Path], path: Path, settings: Mapping[str, Any]) -> None:
        """Write the mean of weights that started from the same ones."""
        network = self._evaluation(settings).get_parsed_content("network_def")
        mean = AveragedModel(network)
        for file in files:
            load_weights(network, file)
            mean.update_parameters(network)
        save_weights(mean.module, path)


def _together(halves: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Dice by patient of both halves."""
    return {patient: dice for half in halves for patient, dice in half.items()}


def _known_halves(weights: Path) -> dict[str, int]:
    """The half of each patient that published weights were trained on; {} for others."""
    path = weights.with_name(HALVES_FILE)
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{path}: expected the halves of the patients, found a file that can't be read ({error}); restore it, or "
            "roll back to other weights, then train again."
        ) from error
