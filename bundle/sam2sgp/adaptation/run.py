"""One adaptation: group the cases, segment each unseen by the plain network, train a corrector per fold, judge.

In: a network, a support bank and limits. Out: a record of what was done, and the correctors, if they earned a share.
"""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import torch
from monai.networks.utils import eval_mode
from torch import Tensor

from sam2sgp.adaptation.corrector import Corrector, Trunk, bounded
from sam2sgp.adaptation.judging import (
    MIN_GROUPS,
    Choice,
    case_dice,
    choose_share,
    judged_shares,
    mix,
)
from sam2sgp.adaptation.pairs import Pair, Pairs
from sam2sgp.adaptation.patient_groups import PatientGroups, find_patient_groups
from sam2sgp.adaptation.plan import Plan
from sam2sgp.adaptation.record import AdaptationRecord
from sam2sgp.adaptation.training import WARMUP, Training
from sam2sgp.inferers import SupportSetInferer
from sam2sgp.networks import SAM2SGP
from sam2sgp.progress import Bar
from sam2sgp.support.bank import SupportBank
from sam2sgp.support.fingerprint import fingerprint
from sam2sgp.transforms.array import pixel_size

FOLDS = 3
# Shares of the time until which the plain network is judged, until which where too few groups are judged yet, and at
# which training ends; what is left stores and loads.
PLAIN_UNTIL, PLAIN_AT_MOST, TRAINED_UNTIL = 0.35, 0.6, 0.95
# Steps that the first ones promise are not all made where a machine gets busier.
CAUTION = 0.85
# More steps than this bring nothing.
MAX_STEPS = 400
# Cases read, and of these judged; slices of a volume that are judged; pairs in all.
MAX_CASES, MAX_JUDGED, MAX_SLICES, MAX_PAIRS = 64, 32, 32, 256
# Where time is short, of volumes so few slices are judged that so many groups are; never fewer slices than the least.
WANTED_GROUPS, FIRST_SLICES, MIN_SLICES = 6, 8, 4
# Bytes of the logits of the cases judged: with many classes these are few cases.
MAX_BYTES = 512 << 20
# Steps of one corrector before whoever trains it looks which one is last.
STEPS_AT_A_TIME = 4
POLL_SECONDS = 0.5
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}"


@dataclass
class _Case:
    """A labelled case: what it is prepared from, the items of the bank that it has, its patient group and fold.

    owner: the name of the patient group, see `sam2sgp.adaptation.patient_groups`; not the `group` of its data set.
    slices: at most so many are judged; at_top: around the upper end of what is labelled, else around the lower one.
    """

    source: dict
    items: list[int]
    owner: str = ""
    fold: int = 0
    slices: int = MAX_SLICES
    at_top: bool = False


@dataclass
class _Judged:
    """A case as the plain network segments it, guided by other patients: logits (Z, C, H, W) float16 of its slices."""

    case: _Case
    logits: Tensor


class AdaptationRun:
    """See `sam2sgp.adaptation.adapt` for the arguments; `started` is the time from which `seconds` count."""

    def __init__(
        self,
        network: SAM2SGP,
        bank: SupportBank,
        inferer: SupportSetInferer,
        seconds: float | None,
        max_steps: int | None,
        seed: int,
        started: float,
        progress: bool,
    ) -> None:
        self.network = network
        self.bank = bank
        self.inferer = inferer
        self.seconds = seconds
        self.max_steps = max_steps or MAX_STEPS
        self.seed = seed
        self.started = started
        self.progress = progress
        self.device = next(network.parameters()).device
        self.stop = threading.Event()

    def __call__(self) -> tuple[AdaptationRecord, list[Corrector]]:
        """Adapt. PyTorch's global random numbers are left as they were."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            return self._adapt()

    def _adapt(self) -> tuple[AdaptationRecord, list[Corrector]]:
        cases = self._cases()
        groups = self._groups(cases)
        record = AdaptationRecord(len(cases), groups, self._owners(cases))
        if len(groups) < MIN_GROUPS:
            return record, []
        record.plan = Plan.of(fingerprint(self.bank.items))
        with Bar(desc="Adapting", total=1.0, bar_format=BAR, disable=not self.progress) as bar:
            with eval_mode(self.network):
                judged = self._judge_plain(cases, record.owners, bar)
            record.judged = len(judged)
            if len({entry.case.owner for entry in judged}) < MIN_GROUPS:
                return record, []
            self._assign_folds([entry.case for entry in judged])
            pairs, folds = self._pairs(judged)
            prepared = Pairs(pairs, record.plan, self.device)
            trunk, trainings = Trunk(self.network), []
            for fold in sorted(set(folds)):
                index = [number for number, own in enumerate(folds) if own != fold]
                corrector = Corrector(trunk, len(self.bank.class_values))
                trainings.append(Training(corrector, prepared, index, self.seed + fold))
            record.planned = self._train(trainings, judged, record.plan, bar)
            correctors = [training.finish() for training in trainings]
            record.steps = [training.steps for training in trainings]
            record.choices = self._choose(judged, correctors, record.plan)
            bar.n = bar.total
        return record, correctors if record.is_adapted else []

    def _cases(self) -> list[_Case]:
        """Cases of the bank's items that hold a class, of many an even choice."""
        found: dict[int, _Case] = {}
        for number, item in enumerate(self.bank.items):
            found.setdefault(id(item.case), _Case(item.case, [])).items.append(number)
        cases = [case for case in found.values() if any(self.bank.items[number].info.holds for number in case.items)]
        chosen = np.linspace(0, len(cases) - 1, min(MAX_CASES, len(cases))).round().astype(int)
        return [cases[number] for number in chosen]

    def _groups(self, cases: list[_Case]) -> PatientGroups:
        """The patient groups, which are put into the cases as well."""
        images = []
        for case in cases:
            slices = [self.bank.items[number].slice or 0 for number in case.items]
            images.append(self.bank.transform(case.source)["image_full"][slices])
        groups = find_patient_groups([case.source for case in cases], images)
        for case, owner in zip(cases, groups.owner, strict=True):
            case.owner = owner
        return groups

    def _pairs(self, judged: list[_Judged]) -> tuple[list[Pair], list[int]]:
        """Pairs of judged cases, and the fold of each; slices without object of which none is found teach nothing."""
        values = torch.tensor(self.bank.class_values)[:, None, None]
        pairs, folds = [], []
        for entry in judged:
            prepared = self._prepare(entry.case)
            pixel = pixel_size(prepared["geometry"].spacing)
            for image, label, logits in zip(prepared["image_full"], prepared["label_full"], entry.logits, strict=True):
                mask = label == values
                if mask.any() or (logits > 0).any():
                    pairs.append(Pair(image.half(), bounded(logits).half(), mask, pixel))
                    folds.append(entry.case.fold)
        chosen = np.linspace(0, len(pairs) - 1, min(MAX_PAIRS, len(pairs))).round().astype(int)
        return [pairs[number] for number in chosen], [folds[number] for number in chosen]

    def _owners(self, cases: list[_Case]) -> list[str]:
        """The patient group of each item of the bank; an item of a case that was not read is its patient's."""
        owners = [item.patient for item in self.bank.items]
        for case in cases:
            for number in case.items:
                owners[number] = case.owner
        return owners

    def _assign_folds(self, cases: list[_Case]) -> None:
        """Put whole groups into folds of about as many items, the largest groups first, those of one size at random."""
        members = defaultdict(list)
        for case in cases:
            members[case.owner].append(case)
        order = np.random.default_rng(self.seed).permutation(sorted(members)).tolist()
        sizes = {name: sum(len(case.items) for case in own) for name, own in members.items()}
        filled = [0] * min(FOLDS, len(members))
        for name in sorted(order, key=sizes.__getitem__, reverse=True):
            fold = filled.index(min(filled))
            filled[fold] += sizes[name]
            for case in members[name]:
                case.fold = fold

    # Judging

    def _prepare(self, case: _Case) -> dict:
        """A case as a query; of a volume that is too long, slices around one end of what is labelled."""
        prepared = self.bank.transform(case.source)
        count, limit = len(prepared["image"]), case.slices
        if count <= limit:
            return prepared
        labelled = torch.nonzero((prepared["label_full"] > 0).flatten(1).any(1)).flatten().tolist() or [0]
        beyond = limit // 4
        start = labelled[-1] + 1 + beyond - limit if case.at_top else labelled[0] - beyond
        start = min(max(0, start), count - limit)
        names = ("image", "image_full", "label", "label_full")
        return prepared | {name: prepared[name][start : start + limit] for name in names}

    def _judge_plain(self, cases: list[_Case], owners: list[str], bar: Bar) -> list[_Judged]:
        """Cases as a user would get them, each guided by other groups; one of each group in turn, as time allows."""
        bank = self.bank.of_patients(owners)
        inferer = self.inferer.guided_by(bank)
        seen: Counter[str] = Counter()
        rounds = []
        for case in cases:
            rounds.append((seen[case.owner], case))
            seen[case.owner] += 1
        order = [case for _, case in sorted(rounds, key=lambda entry: entry[0])][:MAX_JUDGED]
        wanted = min(WANTED_GROUPS, len(seen))
        judged: list[_Judged] = []
        slices, began = FIRST_SLICES if self.seconds else MAX_SLICES, 0.0
        for number, case in enumerate(order):
            held = sum(entry.logits.nbytes for entry in judged)
            until = PLAIN_UNTIL if number >= MIN_GROUPS else PLAIN_AT_MOST
            if judged and (self._elapsed_share() > until or held > MAX_BYTES):
                break
            if judged and self.seconds:
                per_slice = (time.monotonic() - began) / len(judged[-1].logits)
                left = PLAIN_UNTIL * self.seconds - (time.monotonic() - self.started)
                slices = int(left / per_slice / max(1, wanted - number)) if per_slice else MAX_SLICES
            case.slices, case.at_top = min(max(slices, MIN_SLICES), MAX_SLICES), number % 2 == 1
            began = time.monotonic()
            query = self._prepare(case)
            found = inferer.segment_case(query, self.network, patient=case.owner, group=case.source["group"])
            judged.append(_Judged(case, torch.cat([logits.half().cpu() for _, logits, _ in found])))
            self._show(bar)
        return judged

    def _choose(self, judged: list[_Judged], correctors: list[Corrector], plan: Plan) -> dict[str, Choice]:
        """For each class the share of the correctors."""
        values = self.bank.class_values
        shares = judged_shares(len({entry.case.owner for entry in judged}))
        by_owner = defaultdict(list)
        for entry in judged:
            case, logits = self._prepare(entry.case), entry.logits.float()
            images, pixel = case["image_full"].to(self.device), pixel_size(case["geometry"].spacing)
            unseen = [correctors[entry.case.fold]]
            corrected = plan.predict(unseen, images, logits.to(self.device), pixel).cpu()
            averages = [mix(logits, corrected, share) for share in (*shares, 1.0)]
            dice = [case_dice(average, case["label_full"], values) for average in averages]
            by_owner[entry.case.owner].append(torch.stack(dice))
        of_owners = torch.stack([torch.stack(dice).nanmean(0) for dice in by_owner.values()])
        choices = {}
        for class_index, value in enumerate(values):
            dice = of_owners[..., class_index]
            choices[self.bank.class_names[value]] = choose_share(dice[~dice.isnan().any(1)], shares)
        return choices

    # Training

    def _train(self, trainings: list[Training], judged: list[_Judged], plan: Plan, bar: Bar) -> int:
        """Train all correctors at the same time: the warm-up, by which the number of steps is planned, and the rest.

        Returns that number.
        """
        limit = min(WARMUP, self.max_steps)
        began = time.monotonic()
        self._advance(trainings, limit, bar, None)
        planned = self.max_steps
        deadline = None
        if self.seconds:
            per_step = (time.monotonic() - began) / limit
            deadline = self.started + TRAINED_UNTIL * self.seconds - self._judging_takes(trainings[0], judged, plan)
            affordable = limit + int(CAUTION * max(0.0, deadline - time.monotonic()) / per_step)
            planned = min(planned, affordable)
        for training in trainings:
            training.planned = planned
        self._advance(trainings, planned, bar, deadline)
        return planned

    def _judging_takes(self, training: Training, judged: list[_Judged], plan: Plan) -> float:
        """Seconds that it takes to judge the correctors, by what one slice takes."""
        training.corrector.eval()
        slices = sum(len(entry.logits) for entry in judged)
        logits = judged[0].logits[:1].to(self.device)
        image = torch.rand(1, 3, *logits.shape[-2:], device=self.device)
        began = time.monotonic()
        plan.predict([training.corrector], image, logits)
        return slices * (time.monotonic() - began)

    def _advance(self, trainings: list[Training], limit: int, bar: Bar, deadline: float | None) -> None:
        """Bring all to `limit` steps, or until the deadline; whoever is free goes on with the one that is last."""
        free, lock = list(trainings), threading.Lock()

        def take() -> Training | None:
            with lock:
                due = [training for training in free if training.steps < limit]
                if not due:
                    return None
                chosen = min(due, key=lambda training: training.steps)
                free.remove(chosen)
                return chosen

        def work() -> None:
            while (training := take()) is not None:
                for _ in range(min(STEPS_AT_A_TIME, limit - training.steps)):
                    if self.stop.is_set() or (deadline is not None and time.monotonic() > deadline):
                        return
                    training.step()
                with lock:
                    free.append(training)

        workers = 1 if self.device.type == "cuda" else min(len(trainings), torch.get_num_threads())
        self._in_threads(work, workers, lambda: self._show(bar))

    def _in_threads(self, work: Callable[[], None], count: int, meanwhile: Callable[[], None]) -> None:
        """Run `work` in some threads, the cores shared between them."""
        threads = torch.get_num_threads()
        share = max(1, threads // count)
        try:
            with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(share,)) as pool:
                futures = [pool.submit(work) for _ in range(count)]
                try:
                    while wait(futures, POLL_SECONDS, "FIRST_EXCEPTION").not_done:
                        if any(future.done() and future.exception() for future in futures):
                            break
                        meanwhile()
                finally:
                    self.stop.set()
                for future in futures:
                    future.result()
        finally:
            torch.set_num_threads(threads)
        self.stop.clear()

    def _elapsed_share(self) -> float:
        return (time.monotonic() - self.started) / self.seconds if self.seconds else 0.0

    def _show(self, bar: Bar) -> None:
        bar.n = min(1.0, self._elapsed_share())
        bar.refresh()
