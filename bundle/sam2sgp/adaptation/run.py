"""One adaptation: train on most of the pairs, judge on the others, go on with all.

In: a network, a support bank and limits. Out: a record of what was done, and the trained members that earned their
place. Two threads at most run at a time; each trains one member and nothing else, and no member is trained by two.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm

from sam2sgp.adaptation.judging import MAX_GUIDES, Split, class_dice, hold_out
from sam2sgp.adaptation.members import Member, NetworkMember, Pairs, UNetMember
from sam2sgp.adaptation.unet import SmallUNet
from sam2sgp.inferers import SupportSetInferer
from sam2sgp.networks import SAM2SGP
from sam2sgp.support.bank import SupportBank
from sam2sgp.support.sampler import SupportSampler

# Of the time, or of the steps: what is spent before the members are judged.
JUDGED_SHARE = 0.6
# Of the time: what is left to the last steps, to storing and to loading.
FINISHED_SHARE = 0.96
# Steps at which a member is judged for the first time; then whenever twice as many are made.
CHECKPOINTS = {"network": 8, "unet": 64}
# What the result may be, in the order of preference.
MIXES = ("network+unet", "network", "plain+unet", "unet", "plain")
# What another choice must be better by than the first one in order, as Dice: the noise of a few held-out pairs, and
# what the small U-Net still gains from the steps it makes after it is judged.
PREFERENCE = 0.05
PROBABILITY_EPS = 1e-6
# A step over a forward pass of as many images: tells before the first step of a large network that time is too short.
BACKWARD_COST = 3.0
POLL_SECONDS = 0.5
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}"

Steps = int | Mapping[str, Sequence[int]] | None


def mix(logits: Tensor, unet: Tensor, share: float) -> Tensor:
    """Logits of the average of two probabilities, `share` of it the U-Net's."""
    return torch.logit(logits.sigmoid().lerp(unet.sigmoid(), share), eps=PROBABILITY_EPS)


def share_of_second(first: float, second: float) -> float:
    """Share of the second of two in their average, by the Dice of each: inverse to the squared errors.

    These are the weights of Bates and Granger (1969, "The combination of forecasts") for errors that are independent.

    Example:
        >>> share_of_second(0.6, 0.6), round(share_of_second(0.6, 0.8), 2)
        (0.5, 0.8)
    """
    errors = [max(1 - dice, PROBABILITY_EPS) ** 2 for dice in (first, second)]
    return errors[0] / sum(errors)


@dataclass
class Result:
    """Record of an adaptation; the adapted network before merging and the small U-Net, None where dropped."""

    record: dict
    model: PeftModel | None = None
    unet: SmallUNet | None = None


@dataclass
class _Judged:
    """A member after some steps: its logits on the held-out items, their Dice, and its averaged weights."""

    logits: Tensor
    dice: Tensor
    steps: int
    weights: list[Tensor]

    @property
    def score(self) -> float:
        return float(self.dice.nanmean())


class Run:
    """See `sam2sgp.adaptation.adapt` for the arguments; `started` is the time from which `seconds` count."""

    def __init__(
        self,
        network: SAM2SGP,
        bank: SupportBank,
        sampler: SupportSampler,
        seconds: float | None,
        max_steps: Steps,
        seed: int,
        started: float,
        progress: bool,
    ) -> None:
        self.network = network
        self.bank = bank
        self.sampler = sampler
        self.seconds = None if isinstance(max_steps, Mapping) else seconds
        self.max_steps = max_steps
        self.seed = seed
        self.started = started
        self.progress = progress
        self.stop = threading.Event()
        self.members: dict[str, Member] = {}
        self.steps = {name: [0, 0] for name in CHECKPOINTS}

    def __call__(self) -> Result:
        """Adapt. PyTorch's global random numbers, which the network's dropout draws from, are left as they were."""
        device = next(self.network.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            return self._adapt(device)

    def _adapt(self, device: torch.device) -> Result:
        split = hold_out(self.bank, self.seed)
        record = {"items": len(self.bank), "seed": self.seed, "steps": self.steps}
        if split is None:
            return Result(record | {"kept": "plain", "unet_share": 0.0, "dropped": [], "dice": {}, "held_out": []})
        self._prepare(split, device)
        with tqdm(desc="Adapting", total=1.0, bar_format=BAR, disable=not self.progress) as bar:
            judged = dict(zip(self.members, self._each(self._fit, list(self.members), bar), strict=True))
            dice = self._mixes(judged)
            choice = _choose({name: float(value.nanmean()) for name, (_, value) in dice.items()})
            kept = [name for name in self.members if name in choice.split("+")]
            self._each(lambda name: self._go_on(name, judged[name]), kept, bar)
            bar.n = bar.total
        record |= {
            "held_out": [item.id for item in self.held.items],
            "held_out_by": split.by,
            "dice": {name: round(float(value.nanmean()), 4) for name, (_, value) in dice.items()},
            "dice_per_class": {name: self._named(value) for name, (_, value) in dice.items()},
            "kept": choice,
            "unet_share": dice[choice][0],
            "dropped": [name for name in CHECKPOINTS if name not in kept],
        }
        for name in kept:
            self.members[name].finish()
        modules = {name: self.members[name].module for name in kept}
        return Result(record, modules.get("network"), modules.get("unet"))

    def _named(self, dice: Tensor) -> dict[str, float | None]:
        names = [self.bank.class_names[value] for value in self.bank.class_values]
        return {n: None if math.isnan(d) else round(d, 4) for n, d in zip(names, dice.tolist(), strict=True)}

    def _prepare(self, split: Split, device: torch.device) -> None:
        """Members, their pairs, and the plain network's result on the held-out ones."""
        pairs = Pairs.of(self.bank, device)
        self.unseen = pairs[split.held]
        self.held = self.bank.part(split.held.tolist())
        guides = self.bank.part(split.fit[:: -(-len(split.fit) // MAX_GUIDES)].tolist())
        self.inferer = SupportSetInferer(guides, self.sampler)
        began = time.monotonic()
        self.plain = self._guided(self.network)
        per_image = (time.monotonic() - began) / (len(guides) + len(self.held))
        self.durations = {"network": BACKWARD_COST * NetworkMember.IMAGES * per_image, "unet": 0.0}
        if NetworkMember.tasks(pairs[split.fit])[0]:
            self.members["network"] = NetworkMember(self.network, pairs[split.fit], self.seed)
        self.members["unet"] = UNetMember(pairs[split.fit], self.seed)
        self.pairs = {name: member.prepare(pairs) for name, member in self.members.items()}
        self.fit = {name: own[split.fit] for name, own in self.pairs.items()}

    def _each(self, work: Callable, names: list[str], bar: tqdm) -> list:
        """Results of work(name), all at the same time, the cores shared between them."""
        if not names:
            return []
        threads = torch.get_num_threads()
        share = max(1, threads // len(names))
        try:
            with ThreadPoolExecutor(len(names), initializer=torch.set_num_threads, initargs=(share,)) as pool:
                futures = [pool.submit(work, name) for name in names]
                try:
                    while wait(futures, POLL_SECONDS, "FIRST_EXCEPTION").not_done:
                        if any(future.done() and future.exception() for future in futures):
                            break
                        self._show(bar)
                finally:
                    self.stop.set()
                results = [future.result() for future in futures]
        finally:
            torch.set_num_threads(threads)
        self.stop.clear()
        return results

    def _show(self, bar: tqdm) -> None:
        made = {name: sum(self.steps[name]) for name in self.members}
        if self.seconds:
            done = (time.monotonic() - self.started) / self.seconds
        else:
            done = min(made[name] / max(1, sum(self._limits(name))) for name in made)
        bar.n = min(1.0, done)
        bar.set_postfix(made)

    def _limits(self, name: str) -> tuple[float, float]:
        """Most steps of a member before and after it is judged."""
        if self.max_steps is None:
            return float("inf"), float("inf")
        if isinstance(self.max_steps, Mapping):
            return tuple(self.max_steps[name])
        first = math.ceil(JUDGED_SHARE * self.max_steps)
        return first, self.max_steps - first

    def _train(self, name: str, pairs: Pairs, phase: int) -> Iterator[Member]:
        """Make steps until a limit is reached or the next one would end after the time."""
        share = (JUDGED_SHARE, FINISHED_SHARE)[phase]
        deadline = self.started + share * self.seconds if self.seconds else float("inf")
        member, limit = self.members[name], self._limits(name)[phase]
        while self.steps[name][phase] < limit and not self.stop.is_set():
            began = time.monotonic()
            if began + self.durations[name] > deadline:
                break
            member.step(pairs)
            self.durations[name] = time.monotonic() - began
            self.steps[name][phase] += 1
            yield member

    def _fit(self, name: str) -> _Judged:
        """Train without the held-out items; of the checkpoints, the best one if the last is clearly worse."""
        best, checkpoint = None, CHECKPOINTS[name]
        for member in self._train(name, self.fit[name], 0):
            if member.steps == checkpoint:
                judged = self._judge(name)
                best = judged if best is None or judged.score > best.score else best
                checkpoint *= 2
        last = self._judge(name)
        return best if best is not None and best.score > last.score + PREFERENCE else last

    def _go_on(self, name: str, judged: _Judged) -> None:
        """Train with all items; a member that had its best time before it was judged goes back there instead."""
        member = self.members[name]
        if judged.steps < member.steps:
            member.rewind(judged.weights)
            return
        for _ in self._train(name, self.pairs[name], 1):
            pass

    def _judge(self, name: str) -> _Judged:
        member = self.members[name]
        with member.averaged() as module:
            logits = self._guided(module.get_base_model()) if name == "network" else module(self.unseen.image)
            weights = member.snapshot()
        return _Judged(logits, class_dice(logits, self.unseen.mask), member.steps, weights)

    def _guided(self, network: SAM2SGP) -> Tensor:
        """Logits of a network on the held-out items, guided by the others, as in inference."""
        self.inferer.reset()
        training = network.training
        network.eval()
        groups = [item.group for item in self.held.items]
        logits = torch.empty_like(self.unseen.mask)
        for group in set(groups):
            rows = torch.tensor([own == group for own in groups])
            logits[rows] = self.inferer(self.unseen.image[rows], network, group=group)
        network.train(training)
        return logits

    def _mixes(self, judged: dict[str, _Judged]) -> dict[str, tuple[float, Tensor]]:
        """Of every mix the U-Net's share and Dice per class (C,) on the held-out items, in the order of preference."""
        logits = {"plain": self.plain} | {name: entry.logits for name, entry in judged.items() if entry.steps}
        alone = {name: class_dice(values, self.unseen.mask) for name, values in logits.items()}
        dice = {}
        for name in MIXES:
            parts = name.split("+")
            if not set(parts) <= set(logits):
                continue
            share = float(name == "unet")
            if len(parts) == 2:
                share = share_of_second(*(float(alone[part].nanmean()) for part in parts))
                dice[name] = share, class_dice(mix(*(logits[part] for part in parts), share), self.unseen.mask)
            else:
                dice[name] = share, alone[name]
        return dice


def _choose(scores: dict[str, float]) -> str:
    """The first mix in order, unless another one is clearly better or it is worse than the plain network."""
    best = max(scores, key=scores.get)
    first = next(iter(scores))
    if scores[first] >= scores["plain"] and scores[first] >= scores[best] - PREFERENCE:
        return first
    return best
