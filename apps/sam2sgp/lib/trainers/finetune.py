"""LoRA fine-tuning on the approved labels, as a MONAI Label train task.

    labelled cases ─ some patients held back ─ bundle: train.json + finetune.json ─ LoRA merged ─┐
                                                                 active weights ─────────────────┤
                         better ones are published, else the old stay ─ Dice on held-back labels ┘

MONAI Label runs the task in a process of its own. The weights in use change at the very end, in one step and only for
better ones, so the task may be stopped or killed at any moment. What a stopped training had is kept; the next one goes
on with it if it has the same labels, options and weights to start from.

Concurrency: one training at a time, whatever the number of servers with the same state folder; a lock file sees to it.
"""

import errno
import json
import logging
import math
import shutil
import traceback
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from monai.bundle import ConfigParser, ConfigWorkflow
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.utils.others.generic import device_list, name_to_device

from lib.checks import Conflict, RequestError, StorageError
from lib.options import first
from lib.trainers.data import digest, split, write_datalist
from lib.trainers.status import Status, StatusHandler
from lib.weights import LORA_FOLDER, MODEL_FILE, Weights
from sam2sgp.errors import DataError, Sam2SgpError, cause_of
from sam2sgp.files import write_text
from sam2sgp.networks import load_weights, merge_lora, save_weights

logger = logging.getLogger(__name__)

TRAIN, ROLL_BACK = "train", "roll_back"
PUBLISHED, KEPT, FAILED, ROLLED_BACK = "published", "kept", "failed", "rolled_back"
METRIC = "val_mean_dice"
LAST_FILE = "last.pt"
TENSORBOARD_FOLDER = "tensorboard"
OPTIONS = {"max_epochs": int, "episodes_per_epoch": int, "learning_rate": float}
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


class FineTuning(TrainTask):
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
        audit: called with an action and facts when a training begins and when the weights in use change.
    """

    def __init__(
        self,
        bundle_root: Path,
        state_dir: Path,
        weights: Weights,
        cases: Callable[[], tuple[Sequence[Mapping], Sequence[str]]],
        class_names: Callable[[], Mapping[int, str]],
        overrides: Mapping[str, Any] | None = None,
        overlays: Sequence[str] = (),
        audit: Callable[..., None] = lambda action, **facts: None,
    ) -> None:
        super().__init__(
            "LoRA fine-tuning on the approved labels; new weights are used only if better on held-back labels"
        )
        self.bundle_root = Path(bundle_root)
        self.folder = Path(state_dir) / "training"
        self.work = self.folder / "work"
        self.weights = weights
        self.cases = cases
        self.class_names = class_names
        self.audit = audit
        self.status = Status(self.folder / "status.json")
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

    def stats(self) -> dict[str, Any]:
        """Progress and outcome of the last training, and which weights are in use; costs two stats."""
        stats = self.status.read()
        try:
            active = self.weights.active()
            stats["weights"] = {
                "version": active.name,
                "published": active.published,
                "metrics": dict(active.metrics),
                "before": active.replaced,
            }
        except Sam2SgpError as error:
            stats["weights"] = {"error": str(error)}
        return stats

    def __call__(self, request: Mapping[str, Any], datastore: object) -> dict[str, Any]:
        """Train, or roll back, and return the stats.

        Raises:
            Sam2SgpError: an option that can't work, too few labels, a training that runs already; the stats say so too.
        """
        action = first(request.get("action")) or TRAIN
        if action not in (TRAIN, ROLL_BACK):
            raise RequestError(f"action is {action!r}: expected {TRAIN!r} or {ROLL_BACK!r}.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock", timeout=0):
                if action == ROLL_BACK:
                    self._roll_back()
                else:
                    self._train(request)
        except Timeout:
            raise Conflict(
                "A fine-tuning is running already: wait until it has ended, or stop it (DELETE /train), then try again."
            ) from None
        except OSError as error:
            raise _no_storage(error.strerror or str(error)) from error
        return self.stats()

    def _options(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a request as config values. Nothing else of it reaches a config, whose strings are code."""
        options: dict[str, Any] = {}
        for name, kind in OPTIONS.items():
            given = first(request.get(name, self._config[name]))
            try:
                value = kind(str(given))
                if not (math.isfinite(value) and value > 0):
                    raise ValueError
            except ValueError:
                expected = "a whole number of at least 1" if kind is int else "a number above 0"
                raise RequestError(f"{name} is {given!r}: expected {expected}.") from None
            options[name] = value
        options["device"] = f"$torch.device({self._device(first(request.get('device')))!r})"
        return options

    def _device(self, name: object) -> str:
        if name is None or isinstance(name, str):
            kind, _, index = name_to_device(name).partition(":")
            if kind == "cpu" and not index:
                return kind
            if kind == "cuda" and (not index or index.isdecimal() and int(index) < torch.cuda.device_count()):
                return f"{kind}:{index or 0}"
        raise RequestError(f"device is {name!r}: expected one of {', '.join(self._config['device'])}.")

    def _roll_back(self) -> None:
        before = self.weights.active().name
        version = self.weights.roll_back()
        self.audit("roll_back", weights=version.name, replaced=before)
        self.status.start()
        self.status.finish(ROLLED_BACK, f"The weights {version.name!r} are in use again, in the place of {before!r}.")

    def _train(self, request: Mapping[str, Any]) -> None:
        self.status.start()
        try:
            self._make_weights(self._options(request))
        except Exception as error:
            cause = cause_of(error)
            if reason := _storage_problem(error):
                cause = _no_storage(reason)
                _close_files(error)
            try:
                self.status.finish(FAILED, str(cause).split("\n")[0] or type(cause).__name__)
            except OSError:
                # To other processes it reads as stopped when this one has ended, which is true as well.
                logger.exception("The outcome of the training can't be written: %s", cause)
            if isinstance(cause, Sam2SgpError) and cause is not error:
                raise cause from error
            raise

    def _make_weights(self, options: Mapping[str, Any]) -> None:
        cases, left_out = self.cases()
        if left_out:
            self.status.update(left_out=list(left_out))
            logger.warning("Left out of the training: %s", " ".join(left_out))
        sections = split(cases)
        start = self.weights.active()
        facts = {name: len(cases) for name, cases in sections.items()} | {"start_weights": start.name}
        self.status.update(message="Preparing.", epoch=0, max_epochs=options["max_epochs"], **facts)
        datalist = self.work / "datalist.json"
        settings = {
            **self.overrides,
            "bundle_root": str(self.bundle_root),
            "dataset_dir": str(datalist),
            "output_dir": str(self.work),
            "device": options["device"],
            "progress": False,
            # All that is not held back is trained on.
            "split": [1.0, 0.0, 0.0],
        }
        before = self._prepare(sections, [start.name, settings, options])
        resumed = (self.work / LAST_FILE).is_file()
        write_datalist(datalist, sections, self.class_names())
        self.audit("train", resumed=resumed, **facts, **options)
        if before is None:
            self.status.update(message="Measuring the weights in use.")
            before = self._dice(start.path, settings)
            self._remember(before)
        logger.info("Mean Dice of the weights %r on %d held-back labels: %.4f", start.name, facts["validation"], before)
        going_on = "Training goes on from where it was stopped." if resumed else "Training."
        self.status.update(message=going_on, start_metric=before)
        merged = self._run({**settings, **options, "model_file": str(start.path)})
        self.status.update(message="Measuring the new weights.")
        after = self._dice(merged, settings)
        self._publish(start.name, merged, before, after, facts | options)
        # Nothing to go on with any more; images don't stay longer than they are needed.
        for path in self.work.iterdir():
            if path.is_file():
                path.unlink()
            elif path.name != TENSORBOARD_FOLDER:
                shutil.rmtree(path, ignore_errors=True)

    def _prepare(self, sections: Mapping[str, Sequence[Mapping]], choices: Sequence) -> float | None:
        """An empty work folder, or that of a stopped training of the same kind.

        Returns:
            The Dice of the active weights, if that training had measured it.
        """
        configs = [(self.bundle_root / name).read_text(encoding="utf-8") for name in self.train_files]
        key = sha256(json.dumps([digest(sections), choices, configs], sort_keys=True).encode()).hexdigest()
        try:
            known = json.loads((self.work / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        self._key = key
        if known.get("key") == key:
            return known.get("dice")
        shutil.rmtree(self.work, ignore_errors=True)
        self._remember(None)
        return None

    def _remember(self, dice: float | None) -> None:
        write_text(self.work / "run.json", json.dumps({"key": self._key, "dice": dice}))

    def _dice(self, weights: Path, settings: Mapping[str, Any]) -> float:
        """Mean Dice of a weights file on the held-back labels, guided by the others, by the bundle's evaluation."""
        parser = ConfigParser()
        parser.read_config([str(self.bundle_root / name) for name in self.evaluate_files])
        parser.update({**settings, "validate::dataset::data": "@val_data", "validate::handlers": []})
        network = parser.get_parsed_content("network")
        load_weights(network, weights)
        evaluator = parser.get_parsed_content("validate::evaluator")
        evaluator.run()
        dice = evaluator.state.metrics.get(METRIC, math.nan)
        if math.isnan(dice):
            raise DataError(
                "Fine-tuning expected an object in a label held back to judge it, found none that can be read; "
                "approve labels with objects of more patients, then train again. The weights stay as they are."
            )
        return float(dice)

    def _run(self, settings: Mapping[str, Any]) -> Path:
        """Train through the bundle; the path of the best weights, LoRA merged."""
        workflow = ConfigWorkflow(
            config_file=[str(self.bundle_root / name) for name in self.train_files],
            meta_file=str(self.bundle_root / "configs" / "metadata.json"),
            logging_file=False,
            workflow_type="train",
            **settings,
        )
        workflow.initialize()
        content = workflow.parser.get_parsed_content
        StatusHandler(self.status, content("validate::evaluator"), METRIC).attach(content("train::trainer"))
        workflow.run()
        network = content("network_def")
        load_weights(network, self.work / MODEL_FILE)
        merge_lora(network)
        merged = self.work / "merged" / MODEL_FILE
        save_weights(network, merged)
        return merged

    def _publish(self, start: str, merged: Path, before: float, after: float, facts: Mapping[str, Any]) -> None:
        compared = f"Mean Dice on {facts['validation']} held-back labels: {before:.4f} before, {after:.4f} after."
        measured = {"start_metric": before, "new_metric": after}
        if not after > before:
            self.audit("keep", weights=start, **measured)
            self.status.finish(KEPT, f"{compared} Not better, so the weights {start!r} stay in use.", **measured)
            return
        metrics = {"dice": after, "dice_before": before, "held_back": facts["validation"], "labels": facts["training"]}
        version = self.weights.publish(merged, metrics, self.work / LORA_FOLDER)
        self.audit("publish", weights=version.name, replaced=start, **measured)
        self.status.finish(PUBLISHED, f"{compared} The new weights {version.name!r} are in use.", **measured)


def _storage_problem(error: BaseException | None) -> str | None:
    """Why a file could not be written, if that is among the causes of an error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            return error.strerror
        # torch has no type for it.
        if isinstance(error, RuntimeError) and "inline_container" in str(error):
            return "that a file can't be written"
        error = error.__cause__ or error.__context__
    return None


def _close_files(error: BaseException | None) -> None:
    """Let go of what the calls that failed hold: a half-written file takes its space for as long as it is open."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _no_storage(reason: str) -> StorageError:
    return StorageError(
        f"training: expected to write to the state folder, found {reason}; free some space or correct the permissions, "
        "then train again. The weights stay as they are."
    )
