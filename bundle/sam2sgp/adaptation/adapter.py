"""Adapting the network to a support set before inference.

In: a network and a support bank. Out: an `Adaptation`, the network to segment with and a small U-Net whose
probabilities are averaged with the network's, whichever of the two earned it.

    pairs ─ hold some out ─┬─ train a copy of the network ─┬─ best mix on the held-out pairs ─ go on with all ─ result
                           └─ train a small U-Net ─────────┘

The two are trained at the same time, each in a thread with its share of the cores. What is kept is never worse on the
held-out pairs than the network as it was; where nothing is better, or where there are too few pairs to tell, the result
is the network as it was.

A time limit decides how many steps are made and nothing else: `max_steps` set to the `steps` of a record gives the same
weights again on the same machine.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sam2sgp.adaptation import store
from sam2sgp.adaptation.judging import MIN_ITEMS
from sam2sgp.adaptation.lora import merged
from sam2sgp.adaptation.run import CHECKPOINTS, Run, Steps, mix
from sam2sgp.adaptation.unet import SmallUNet
from sam2sgp.errors import ConfigError
from sam2sgp.networks import SAM2SGP, SGPOutput
from sam2sgp.support.bank import SupportBank
from sam2sgp.support.sampler import SupportSampler

logger = logging.getLogger(__name__)

# To be raised when the same support set, network and settings would give another result: part of a cache's key.
VERSION = 2


@dataclass
class Adaptation:
    """What to segment with after adaptation.

    network: the adapted network, or the one given if adapting it was no better.
    unet: the small U-Net, None if it was no better.
    record: what was done, the content of `adaptation.json`.
    """

    network: SAM2SGP
    unet: SmallUNet | None
    record: dict

    @torch.no_grad()
    def combine(self, output: SGPOutput, image: Tensor, values: list[int]) -> SGPOutput:
        """The network's output with the ensemble's logits for some classes; all else stays the network's.

        Args:
            output: of the network for B images, logits (B, C, S, S).
            image: (B, 3, S, S) in [0, 1].
            values: the classes that have support here; the others stay as they are.
        """
        if self.unet is not None:
            columns = [self.record["class_values"].index(value) for value in values]
            own, unet = (logits[:, columns].float() for logits in (output.logits, self.unet(image)))
            output.logits[:, columns] = mix(own, unet, self.record["unet_share"])
        return output

    @property
    def network_share(self) -> float:
        """The share that the network's output has in what `combine` gives."""
        return 1.0 - self.record["unet_share"]

    @staticmethod
    def refuse(patient: str | None, bank: SupportBank) -> None:
        """Raise `ConfigError` if a patient that must not guide himself is in the bank: all of it was learned from."""
        if patient in bank.patients:
            raise ConfigError(
                f"Patient {patient!r} is in the support set that the network was adapted to, so a result on this "
                "patient would say nothing; give a support set of other patients, or set `adapt_seconds` to 0."
            )

    @property
    def summary(self) -> str:
        """A sentence or two for people: what was done and what it brought."""
        record = self.record
        if not record["dice"]:
            return (
                f"Not adapted: of {record['items']} labelled images none can be held out to tell whether it helps; at "
                f"least {MIN_ITEMS} are needed, and three of each class."
            )
        steps = ", ".join(f"{name} {sum(made)}" for name, made in record["steps"].items())
        dice = ", ".join(f"{name} {value:.3f}" for name, value in record["dice"].items())
        return (
            f"Adapted for {record['elapsed']:.0f} s (steps: {steps}). Dice on held-out {record['held_out_by']} "
            f"({len(record['held_out'])} images): {record['dice']['plain']:.3f} before, "
            f"{record['dice'][record['kept']]:.3f} after. Kept: {record['kept']} (of {dice})."
        )


def adapt(
    network: SAM2SGP,
    bank: SupportBank,
    seconds: float | None = 60.0,
    max_steps: Steps = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    sampler: SupportSampler | None = None,
) -> Adaptation:
    """Adapt a network to a support set. The network given stays as it is.

    Args:
        network: on the device to compute on.
        bank: the support set; nothing but its items is used, and it stays as it is.
        seconds: wall-clock time for everything; 0 or None: no limit.
        max_steps: steps of each member at most; or the `steps` of a record, for exactly its steps whatever the time.
        seed: of all random choices.
        cache_dir: where adaptations are looked up and kept, see `sam2sgp.adaptation.store`; None keeps none.
        progress: show a bar.
        sampler: chooses the support of held-out items; give the one of the inference to come.

    Raises:
        ConfigError: there is no limit at all, or one that can't work.

    Example:
        >>> adaptation = adapt(network, bank, seconds=60)  # doctest: +SKIP
        >>> adaptation.summary  # doctest: +SKIP
        'Adapted for 58 s (steps: network 40, unet 420). Dice on held-out patients (4 images): 0.612 before, ...'
    """
    started = time.monotonic()
    _check(seconds, max_steps)
    if not seconds and not max_steps:
        raise ConfigError("Adaptation expected a limit, found none: set `adapt_seconds` or `adapt_steps`.")
    sampler = sampler or SupportSampler()
    settings = {"version": VERSION, "seconds": seconds, "max_steps": max_steps, "seed": seed, "sampler": vars(sampler)}
    directory = None
    if cache_dir is not None:
        directory = Path(cache_dir, store.key_of(network, bank, settings))
        found = store.load(directory, network, len(bank.class_values))
        if found is not None:
            record, adapted, unet = found
            adaptation = Adaptation(adapted or network, unet, record)
            logger.info("%s From %s.", adaptation.summary, directory)
            return adaptation
    result = Run(network, bank, sampler, seconds, max_steps, seed, started, progress)()
    result.record |= {
        "class_values": bank.class_values,
        "elapsed": round(time.monotonic() - started, 1),
        "settings": settings,
    }
    if directory is not None:
        store.save(directory, result.record, result.model, result.unet)
    adaptation = Adaptation(merged(result.model) if result.model else network, result.unet, result.record)
    logger.info(adaptation.summary)
    return adaptation


class Adapter:
    """The settings of an adaptation, and the last one made: what `SupportSetInferer` takes.

    As a string it says what was done, for a report.

    Args:
        seconds, max_steps, seed, cache_dir, progress: see `adapt`. Without any limit nothing is adapted.

    Raises:
        ConfigError: a limit that can't work.
    """

    def __init__(
        self,
        seconds: float | None,
        max_steps: Steps = None,
        seed: int = 0,
        cache_dir: str | Path | None = None,
        progress: bool = True,
    ) -> None:
        _check(seconds, max_steps)
        self.active = bool(seconds or max_steps)
        self.settings = {
            "seconds": seconds,
            "max_steps": max_steps,
            "seed": seed,
            "cache_dir": cache_dir,
            "progress": progress,
        }
        self.last: Adaptation | None = None

    def __call__(self, network: SAM2SGP, bank: SupportBank, sampler: SupportSampler) -> Adaptation | None:
        """The adaptation of a network to a bank; None where it is switched off."""
        self.last = adapt(network, bank, **self.settings, sampler=sampler) if self.active else None
        return self.last

    def __str__(self) -> str:
        return self.last.summary if self.last else "none"


def _check(seconds: float | None, steps: Steps) -> None:
    if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds < 0):
        raise ConfigError(f"adapt_seconds is {seconds!r}: expected a number of seconds, 0 for no adaptation.")
    counts = [steps]
    if isinstance(steps, Mapping) and set(steps) == set(CHECKPOINTS):
        pairs = [made for made in steps.values() if isinstance(made, Sequence) and len(made) == 2]
        counts = [count for made in pairs for count in made] if len(pairs) == len(CHECKPOINTS) else counts
    if steps is not None and any(type(count) is not int or count < 0 for count in counts):
        raise ConfigError(
            f"adapt_steps is {steps!r}: expected a number of steps, or the `steps` of an adaptation.json, such as "
            "{'network': [48, 32], 'unet': [240, 160]}."
        )
