"""Ignite handlers of a training run that can be killed at any moment and goes on as if it had not been."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from sam2sgp import distributed
from sam2sgp.engines.loss import SGPLoss
from sam2sgp.episodes import EpisodeSampler
from sam2sgp.errors import ConfigError, WeightsError
from sam2sgp.files import replacing
from sam2sgp.networks.lora import has_lora
from sam2sgp.networks.weights import save_lora, save_weights
from sam2sgp.progress import Bar

logger = logging.getLogger(__name__)

LAST = "last.pt"
BEST = "model.pt"
ADAPTER = "lora"


class EpochStart:
    """At the start of an epoch: seed PyTorch by its number and tell it to the loss.

    Both depend only on the epoch, so a resumed run draws the same numbers as an unbroken one.
    """

    def __init__(self, seed: int, loss: SGPLoss) -> None:
        self.seed = seed
        self.loss = loss

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        epoch = engine.state.epoch - 1
        torch.manual_seed(self.seed + epoch)
        self.loss.set_epoch(epoch)


def steps_now(engine: Engine) -> bool:
    """Whether this iteration ends with an optimiser step, by the rule of MONAI's `SupervisedTrainer`."""
    done = (engine.state.iteration - 1) % engine.state.epoch_length + 1
    return done % engine.accumulation_steps == 0 or done == engine.state.epoch_length


class GradientClipping:
    """Clip the norm of all gradients before each optimiser step, accumulated and unscaled ones included."""

    def __init__(self, parameters, max_norm: float) -> None:
        self.parameters = list(parameters)
        self.max_norm = max_norm

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if not steps_now(engine):
            return
        if engine.scaler is not None:
            engine.scaler.unscale_(engine.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, self.max_norm)


class PaddedSteps:
    """In distributed training: a step for which a process has no episodes of its own adds nothing to the gradients.

    Processes average their gradients, so such a step is what an incomplete window of accumulated batches is for one
    process.

    Args:
        sampler: gives each process its episodes.
    """

    def __init__(self, sampler: EpisodeSampler) -> None:
        self.sampler = sampler

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        step = (engine.state.iteration - 1) % engine.state.epoch_length
        if not self.sampler.own(step):
            engine.state.output[CommonKeys.LOSS] = 0 * engine.state.output[CommonKeys.LOSS]


def growing_average(decay: float = 0.998) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Averaging function for PyTorch's `AveragedModel`: an exponential moving average for short runs too.

    The weight of the old average grows as (1 + n) / (10 + n) with the number n of updates, up to `decay`.
    """

    def average(averaged: Tensor, current: Tensor, count: Tensor) -> Tensor:
        return averaged.lerp(current, 1 - min(decay, (1 + int(count)) / (10 + int(count))))

    return average


def warmup_stable_decay(warmup_steps: int, total_steps: int, decay_steps: int) -> Callable[[int], float]:
    """Factor of the learning rate by the step: linear warm-up, constant, and linear to 0 in the last `decay_steps`.

    Until its decay begins, a run is the same whatever its total: it can be made longer, or ended early, at any time.

    Example:
        >>> factor = warmup_stable_decay(2, 10, 4)
        >>> [round(factor(step), 2) for step in range(11)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """

    def factor(step: int) -> float:
        return max(
            0.0, min((step + 1) / warmup_steps if warmup_steps else 1.0, (total_steps - step) / decay_steps, 1.0)
        )

    return factor


class LearningRateSchedule:
    """Advance a learning rate schedule after every optimiser step, of which accumulation makes fewer than batches.

    At the start the schedule is put where the engine is, so it needs no state of its own, and a run that goes on with
    more epochs than it was begun with follows the longer schedule. Attach it after `ResumableCheckpoint`.

    Args:
        lr_scheduler: a schedule in closed form, the learning rate as a function of the step.
    """

    def __init__(self, lr_scheduler: LambdaLR) -> None:
        self.lr_scheduler = lr_scheduler

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def start(self, engine: Engine) -> None:
        schedule = self.lr_scheduler
        schedule.last_epoch = engine.state.epoch * -(-engine.state.epoch_length // engine.accumulation_steps)
        groups = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
        for group, base, factor in groups:
            group["lr"] = base * factor(schedule.last_epoch)

    def __call__(self, engine: Engine) -> None:
        if steps_now(engine):
            self.lr_scheduler.step()


class MovingAverage:
    """Update an average of the network's weights after every optimiser step."""

    def __init__(self, averaged: AveragedModel, network: nn.Module) -> None:
        self.averaged = averaged
        self.network = network

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if steps_now(engine):
            self.averaged.update_parameters(self.network)


class TrainingProgress:
    """A progress bar over the whole training with the time left and the loss."""

    def __init__(self, disable: bool = False) -> None:
        self.disable = disable
        self.bar: Bar | None = None

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._advance)
        engine.add_event_handler(Events.COMPLETED | Events.TERMINATE, self._close)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._fail)

    def _start(self, engine: Engine) -> None:
        if self.bar is None:
            total = engine.state.max_epochs * engine.state.epoch_length
            self.bar = Bar(
                desc="Training", total=total, initial=engine.state.iteration, unit="step", disable=self.disable
            )

    def _advance(self, engine: Engine) -> None:
        if self.bar is not None:
            epoch = f"{engine.state.epoch}/{engine.state.max_epochs}"
            self.bar.set_postfix(epoch=epoch, loss=f"{engine.state.output[0]['loss']:.3f}", refresh=False)
            self.bar.update()

    def _fail(self, engine: Engine, error: BaseException) -> None:
        self._close(engine)
        raise error  # with a handler of this event attached, ignite leaves that to it

    def _close(self, engine: Engine) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class ResumableCheckpoint:
    """Keep the best weights and everything needed to go on, and go on from there at the start.

    After every epoch `last.pt` is replaced; whenever the key metric of the validator is the best so far, or before the
    first validation, `model.pt` (and, with LoRA, the PEFT adapter in `lora/`) is replaced before it. Each file is
    written whole or not at all. Attach it after the validation handler.

    Args:
        directory: where the files go.
        network: the network in training.
        state: what else to keep, by name: objects with `state_dict` and `load_state_dict`.
        validator: evaluator whose best key metric decides; None keeps the weights of the last epoch.
        best_network: network that the validator runs, such as a moving average; None: `network`.
        patience: stop after this many epochs without a better key metric; 0 never stops early.
        resume: whether to go on from `last.pt` if there is one.
    """

    def __init__(
        self,
        directory: str,
        network: nn.Module,
        state: dict,
        validator: Engine | None = None,
        best_network: nn.Module | None = None,
        patience: int = 0,
        resume: bool = True,
    ) -> None:
        if not isinstance(resume, bool):
            raise ConfigError(f"resume is {resume!r}: expected True or False, with a capital letter on a command line.")
        self.directory = Path(directory)
        self.network = network
        self.state = state
        self.validator = validator
        self.best_network = best_network or network
        self.patience = patience
        self.resume = resume

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.load)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def load(self, engine: Engine) -> None:
        path = self.directory / LAST
        if not (self.resume and path.is_file()):
            return
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            _unwrap(self.network).load_state_dict(saved["network"])
            for name, item in self.state.items():
                item.load_state_dict(saved["state"][name])
        except Exception as error:
            raise WeightsError(
                f"{path}: expected the state of a training with these settings, found one that does not fit "
                f"({str(error).splitlines()[0]}); use another `output_dir`, the settings it was begun with, or "
                "`--resume False` to begin again."
            ) from error
        engine.state.epoch, engine.state.iteration = saved["epoch"], saved["iteration"]
        if self.validator is not None:
            self.validator.state.best_metric = saved["best_metric"]
            self.validator.state.best_metric_epoch = saved["best_metric_epoch"]
        if engine.state.epoch >= engine.state.max_epochs:
            logger.info("%s has finished its %d epochs; raise `max_epochs` to go on.", path, engine.state.epoch)
        else:
            logger.info("Going on from %s after epoch %d.", path, engine.state.epoch)

    def save(self, engine: Engine) -> None:
        if distributed.rank():
            return
        best_metric, best_epoch = None, engine.state.epoch
        if self.validator is not None:
            best_metric = float(self.validator.state.best_metric)
            best_epoch = self.validator.state.best_metric_epoch
        validated = best_epoch > 0
        if best_epoch == engine.state.epoch or not validated:
            best = _unwrap(self.best_network)
            save_weights(best, self.directory / BEST)
            if has_lora(best.image_encoder.trunk):
                save_lora(best, self.directory / ADAPTER)
        saved = {
            "network": _unwrap(self.network).state_dict(),
            "state": {name: item.state_dict() for name, item in self.state.items()},
            "epoch": engine.state.epoch,
            "iteration": engine.state.iteration,
            "best_metric": best_metric,
            "best_metric_epoch": best_epoch,
        }
        with replacing(self.directory / LAST) as part:
            torch.save(saved, part)
        if self.patience and validated and engine.state.epoch - best_epoch >= self.patience:
            logger.info("No better result for %d epochs: training stops.", engine.state.epoch - best_epoch)
            engine.terminate()


def _unwrap(network: nn.Module) -> nn.Module:
    return getattr(network, "module", network)
