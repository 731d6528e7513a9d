"""Adapting to a support set before inference.

In: a network and a support bank. Out: an `Adaptation`: small correctors of the network's result, whose probabilities
are averaged with the network's, and how much they count.

    pairs ─ groups ─┬─ plain network: each group segmented, guided by the others ─┬─ share of the correctors, per class
                    └─ a corrector per fold: each group by the one that has not ──┘
                       seen it

Every label is judged, and by what has not seen its patient. The correctors of the folds are what is used afterwards,
all of them averaged, so nothing is used that was not judged. The network itself stays as it is.

A time limit decides how many cases and slices are judged and how many steps are made, and nothing else. Where all were
judged, `max_steps` set to the `planned` steps of a record gives the same weights again on the same machine, if there
was time for all of them.
"""

import logging
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sam2sgp.adaptation import store
from sam2sgp.adaptation.corrector import Corrector
from sam2sgp.adaptation.judging import mix
from sam2sgp.adaptation.record import AdaptationRecord
from sam2sgp.adaptation.run import AdaptationRun
from sam2sgp.errors import ConfigError
from sam2sgp.inferers import SupportSetInferer
from sam2sgp.networks import SAM2SGP
from sam2sgp.support.bank import SupportBank
from sam2sgp.support.content import checksum
from sam2sgp.support.familiarity import trust

logger = logging.getLogger(__name__)

# Part of a cache's key; it is raised when the same support set, network and settings would give another result.
VERSION = 6


@dataclass
class Adaptation:
    """What to average the network's result with after adaptation.

    correctors: of the folds, in evaluation mode; none where the plain network is better.
    record: what was done.
    """

    correctors: list[Corrector]
    record: AdaptationRecord

    @torch.no_grad()
    def average(self, logits: Tensor, images: Tensor, pixel: tuple[float, float], distance: Tensor) -> Tensor:
        """The network's logits averaged with the corrected ones, as probabilities.

        The correctors count less for an image unlike the support images.

        Args:
            logits: (B, C, H, W) of the network, for all classes of the bank.
            images: (B, C', H, W) in [0, 1]. pixel: height and width of a pixel in mm.
            distance: (B,) how far each image is from the support images, see `sam2sgp.support.familiarity`.
        """
        if not self.correctors:
            return logits
        shares = torch.tensor([choice.share for choice in self.record.choices.values()])
        shares = (trust(distance)[:, None] * shares)[..., None, None].to(logits.device)
        assert self.record.plan is not None
        corrected = self.record.plan.predict(self.correctors, images.to(logits.device), logits, pixel)
        return mix(logits.float(), corrected, shares)

    @property
    def owners(self) -> list[str]:
        """The patient group of each item of the support set."""
        return self.record.owners

    def content(self) -> list:
        """As JSON types what decides its results."""
        shares = [choice.share for choice in self.record.choices.values()]
        return [[checksum(corrector.state_dict()) for corrector in self.correctors], shares, self.owners]

    @staticmethod
    def refuse(patient: str | None, bank: SupportBank) -> None:
        """Raise `ConfigError` if a patient whose own labels must not be used is in the bank, which was learned from."""
        if patient in bank.patients:
            raise ConfigError(
                f"Patient {patient!r} is in the support set that was adapted to, so a result on this patient would say "
                "nothing; give a support set of other patients, or set `adapt_seconds` to 0."
            )


def adapt(
    network: SAM2SGP,
    bank: SupportBank,
    seconds: float | None = 60.0,
    max_steps: int | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    inferer: SupportSetInferer | None = None,
) -> Adaptation:
    """Adapt to a support set. The network given stays as it is.

    Args:
        network: on the device to compute on.
        bank: the support set; nothing but its items is used, and it stays as it is.
        seconds: wall-clock time for everything; 0 or None: no limit.
        max_steps: steps of each corrector at most.
        seed: of all random choices.
        cache_dir: where adaptations are looked up and kept, see `sam2sgp.adaptation.store`; None keeps none.
        progress: show a bar.
        inferer: by whose settings labelled images are segmented to judge; give the one of the inference to come.

    Raises:
        ConfigError: there is no limit at all, or one that can't work.

    Example:
        >>> adaptation = adapt(network, bank, seconds=60)  # doctest: +SKIP
        >>> str(adaptation.record)  # doctest: +SKIP
        'Adapted for 58 s: 3 correctors, 96 steps on whole images at 224 px. 16 labelled images, 16 patients, …'
    """
    started = time.monotonic()
    _check(seconds, max_steps)
    if not seconds and not max_steps:
        raise ConfigError("Adaptation expected a limit, found none: set `adapt_seconds` or `adapt_steps`.")
    inferer = inferer or SupportSetInferer(bank)
    # The batch size decides nothing but the last bits.
    inference = {name: value for name, value in asdict(inferer.settings).items() if name != "batch_size"}
    settings = {
        "version": VERSION,
        "seconds": seconds,
        "max_steps": max_steps,
        "seed": seed,
        "inferer": inference,
    }
    directory = None
    if cache_dir is not None:
        directory = Path(cache_dir, store.key_of(network, bank, settings))
        found = store.load(directory, network, len(bank.class_values))
        if found is not None:
            record, correctors = found
            logger.info("%s From %s.", record, directory)
            return Adaptation(correctors, record)
    record, correctors = AdaptationRun(network, bank, inferer, seconds, max_steps, seed, started, progress)()
    record.elapsed = round(time.monotonic() - started, 1)
    record.settings = settings
    if directory is not None:
        store.save(directory, record, correctors)
    logger.info("%s", record)
    return Adaptation(correctors, record)


class SupportAdaptation:
    """The settings of an adaptation, and the last one made: what `SegmentationJob` takes.

    As a string it says what was done, for a report.

    Args:
        seconds, max_steps, seed, cache_dir, progress: see `adapt`. Without any limit nothing is adapted.

    Raises:
        ConfigError: a limit that can't work.
    """

    def __init__(
        self,
        seconds: float | None,
        max_steps: int | None = None,
        seed: int = 0,
        cache_dir: str | Path | None = None,
        progress: bool = True,
    ) -> None:
        _check(seconds, max_steps)
        self._active = bool(seconds or max_steps)
        self._adapt = partial(
            adapt, seconds=seconds, max_steps=max_steps, seed=seed, cache_dir=cache_dir, progress=progress
        )
        self.last: Adaptation | None = None

    def __call__(self, network: SAM2SGP, inferer: SupportSetInferer) -> Adaptation | None:
        """The adaptation to an inferer's bank; None where it is switched off."""
        self.last = self._adapt(network, inferer.bank, inferer=inferer) if self._active else None
        return self.last

    def __str__(self) -> str:
        return str(self.last.record) if self.last else "none"


def _check(seconds: float | None, steps: int | None) -> None:
    if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds < 0):
        raise ConfigError(f"adapt_seconds is {seconds!r}: expected a number of seconds, 0 for no adaptation.")
    if steps is not None and (type(steps) is not int or steps < 0):
        raise ConfigError(f"adapt_steps is {steps!r}: expected a number of steps, 0 for no adaptation.")
