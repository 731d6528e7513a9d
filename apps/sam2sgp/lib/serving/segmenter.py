"""The one network of the server, guided by the support bank: requests in, segmentations out.

    labelled cases ─ reconcile ─ bank ─┐
    weights in use ─ load ─ network ───┼─ CaseSegmenter ─ class map, confidence, support items used
    image ─ prepare (kept) ────────────┘             (kept until the support set or the weights change)

The network with its bank is a `LoadedNetwork`, which `WeightsExchange` exchanges for another; which labels guide it,
`LabelledCases` knows.

Concurrency: `segment`, `refresh` and everything else that touches network or bank hold `lock`, so one request is worked
on at a time, by whatever thread. Whoever only looks (`state`, `status`, `class_names`, `thumbnail`) waits for nobody:
each change of the support set publishes a `SupportState`, which never changes. Whoever changed a label calls `keep_up`,
which has a thread of its own take it in; a request that comes before that does it itself. Work in the background holds
the lock by `stepping_back`, when nobody else wants it, and gives it back within a few slices where somebody does. When
other weights are put in use, a thread of its own builds a second network and a second bank on the same cache folder and
encodes the support set with them, while the old ones go on serving; then both are exchanged at once, under the lock.
Tokens are stored under a fingerprint of the network, so a network never meets those of another. Several processes
(server, batch inference, scoring) may share the cache folder.
"""

import logging
import threading
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lib.checks import NotFound, RequestError
from lib.refresher import Refresher
from lib.serving.adapted import Standing, gain_of, is_adapted
from lib.serving.approved_cases import LabelledCases
from lib.serving.exchange import WeightsExchange
from lib.serving.loaded_network import LoadedNetwork, inference_parser, tensor_bytes
from lib.serving.options import Options
from lib.serving.published_weights import Version, Weights
from lib.serving.turns import Requests, WorkLock
from lib.serving.underway import Underway
from lib.settings import Settings
from lib.stamps import image_stamp
from sam2sgp.errors import DataError, Sam2SgpError
from sam2sgp.inferers import SupportSetInferer
from sam2sgp.inferers.support_set import Step
from sam2sgp.networks import SAM2SGP
from sam2sgp.support import SupportBank, SupportItem
from sam2sgp.support.lru import ByteLRU
from sam2sgp.transforms import SupportScaling
from sam2sgp.transforms.cases import PreparedCase

logger = logging.getLogger(__name__)

ITEMS_LISTED = 100
# Seconds that a change of a label waits to be taken in, to tell what came of it, where no image is being segmented.
PATIENCE = 0.5
NOTHING_APPROVED = (
    "No approved label shows an object, so nothing can be segmented yet: label an image by hand and approve its "
    "label (tag 'final'), or start the server with labelled pairs in `--conf support_dir`."
)


class NoSupport(RequestError):
    """There is no approved label that could guide the query."""

    status = 409


class Stopped(RequestError):
    """Nobody waits for the result any more."""

    status = 503


@dataclass(frozen=True)
class SupportState:
    """The support set at a moment, for whoever only looks at it.

    Attributes:
        items: support items, of which only what needs no pixels may be asked for.
        class_names: of all values that labels have; segmentable: of those that can be segmented. By value.
        cases: names of the labelled cases that were looked at, usable or not.
        images: ids of the datastore's images among them, by their paths.
        errors: cases that can't be used, dicts with `name`, `source` and `error`.
        weights: name of the version that serves.
        scaling: how its images are scaled, which a query follows of which nothing is stated.
        adaptation: how the one of the weights stands to the labels; None: the weights serve as they are.
        warnings: sentences on what may be wrong with the cases that are used; requests may add to them.
    """

    items: tuple[SupportItem, ...]
    class_names: dict[int, str]
    segmentable: dict[int, str]
    cases: frozenset[str]
    images: dict[str, str]
    errors: tuple[dict, ...]
    weights: str
    scaling: SupportScaling = SupportScaling()
    adaptation: Standing | None = None
    warnings: Sequence[str] = ()


class ServerSegmenter:
    """Segments images with the weights in use and the support set as it is now.

    Args:
        settings: the app's.
        weights: which weights are in use.
        cases: the labelled cases.

    Attributes:
        lock: held by whoever touches network or bank.
        requests: tells other processes that a request is being worked on.
        ending: set when the server ends: segmentations then stop at their next slice.
    """

    def __init__(self, settings: Settings, weights: Weights, cases: LabelledCases) -> None:
        self.settings = settings
        self.weights = weights
        self.cases = cases
        self.lock = WorkLock()
        self.requests = Requests(settings.state_dir / "locks" / "requests")
        self.underway = Underway()
        self.ending = threading.Event()
        self._serving: LoadedNetwork | None = None
        self._prepared = ByteLRU(settings.query_cache_mb, tensor_bytes)
        self._names: dict[int, str] = {}
        self._patients: dict[str, str] = {}
        self._state: SupportState | None = None
        self._trouble: str | None = None
        # Whether the lock is held for long.
        self._at_work = False
        self._refresher = Refresher(self._refresh_in_background, "sam2sgp-refresh")
        self._exchange = WeightsExchange(self._build, self._take_over)
        self._behind = False

    # What is served

    @property
    def bank(self) -> SupportBank:
        """The support bank in use."""
        return self._ready().bank

    @property
    def network(self) -> SAM2SGP:
        """The network in use, in evaluation mode."""
        return self._ready().network

    @property
    def inferer(self) -> SupportSetInferer:
        """The inferer with the options of inference.json."""
        with self.lock:
            return self._ready().inferer(Options())

    @property
    def is_loaded(self) -> bool:
        """Whether a network is there; it waits for nobody."""
        return self._serving is not None

    @property
    def is_at_work(self) -> bool:
        """Whether a request for a segmentation is being worked on; it waits for nobody."""
        return self._at_work

    @property
    def device(self) -> torch.device:
        """What is computed on."""
        return self._ready().device

    @property
    def version(self) -> Version:
        """The weights that serve."""
        return self._ready().version

    def state(self) -> SupportState:
        """The support set as of the last `refresh`; empty before the first one. It waits for nobody."""
        return self._state or SupportState((), {}, {}, frozenset(), {}, (), self.weights.active().name)

    def class_names(self) -> dict[int, str]:
        """Names of the classes that can be segmented now, by value, as of the last `refresh`."""
        return dict(self.state().segmentable)

    def thumbnail(self, content: str) -> np.ndarray | None:
        """Picture (H, W, 3) uint8 of a support item with its mask; None if there is no such item, or none right now."""
        item = next((item for item in self.state().items if item.content == content), None)
        if item is None or self._serving is None:
            return None
        found = self._serving.bank.thumbnail(content)
        if found is None and self.lock.acquire(blocking=False):
            # Somebody deleted the cache; it is made again.
            try:
                found = item.thumbnail
            finally:
                self.lock.release()
        return None if found is None else found.numpy()

    def status(self) -> dict[str, Any]:
        """The state of the support set and the weights, for people; it waits for nobody."""
        state = self.state()
        problems = [problem for problem in (self._trouble, self.cases.problem) if problem]
        errors = (error["error"] for error in state.errors)
        return {
            "items": len(state.items),
            "cases": len(state.cases) - len(state.errors),
            "weights": state.weights,
            "adaptation": state.adaptation and state.adaptation.told(),
            "rebuilding": self._exchange.rebuilding,
            "errors": [*problems, *errors][:ITEMS_LISTED],
            "warnings": list(state.warnings)[:ITEMS_LISTED],
            "problem": self._exchange.problem,
            "not_offered": list(getattr(self.cases.datastore, "left_out", []))[:ITEMS_LISTED],
        }

    def usable_cases(self) -> tuple[list[dict], list[str]]:
        """The labelled cases that the support set takes, and a sentence on each one that it can't.

        No network is loaded for it; what the support set's cache knows already is not read again.
        """
        # With a limit of items it would not look at all cases.
        bank, cases = self._bank_of_all(support_max_items=None)
        left_out = {error["name"]: error["error"] for error in [*self.cases.left_out, *bank.errors]}
        return [case for case in cases if case["name"] not in left_out], list(left_out.values())

    def gain_of_adaptation(self, version: Version) -> float:
        """What the adaptation of weights gains in mean Dice with the labels as they are; 0 where none is used.

        No network is loaded for it.

        Raises:
            WeightsError: its files can't be read.
        """
        if not is_adapted(version):
            return 0.0
        bank, _ = self._bank_of_all()
        return gain_of(version, bank)

    def _bank_of_all(self, **settings: Any) -> tuple[SupportBank, list[dict]]:
        """A bank of all labelled cases, and these; `settings` are keys of inference.json."""
        parser = inference_parser(self.settings)
        parser.update(settings)
        bank = parser.get_parsed_content("support_bank")
        with self.lock:
            cases = self.cases.cases()
            # What is new to `cases` is not new any more, but the bank that serves does not know it yet.
            self._behind = True
            declared = self.cases.declared()
        bank.reconcile(cases, declared)
        return bank, cases

    # Keeping up

    def refresh(self) -> None:
        """Bring the support set in line with the approved labels, and see whether other weights are in use now.

        Cheap when nothing changed.

        Raises:
            Sam2SgpError: at the first time: the weights can't be loaded; later: declared class names can't be read.
        """
        self.cases.prepare()
        self.take_in()

    def take_in(self) -> None:
        """`refresh` with the labels that are here; for one that comes from an archive nobody waits."""
        with self.lock:
            serving = self._ready()
            if self._behind or self.cases.changed():
                self._reconcile(serving)
            self._look_for_weights(serving)

    def keep_up(self, wait: float = PATIENCE, certain: bool = True) -> bool:
        """Have `refresh` done in the background if anything changed, at the latest when the present request is done.

        Args:
            wait: seconds to wait for it at most, where no request is worked on.
            certain: as of `LabelledCases.changed`.

        Returns:
            Whether the support set is in line now.
        """
        self.cases.prepare(0.0)
        if self.lock.acquire(blocking=False):
            try:
                if self._serving and not self._behind and not self._trouble and not self.cases.changed(certain):
                    self._look_for_weights(self._serving)
                    return True
            except Sam2SgpError:
                # Said by `refresh`, which comes to it too.
                pass
            finally:
                self.lock.release()
        return self._refresher.run(0.0 if self._at_work else wait)

    def _refresh_in_background(self) -> None:
        try:
            self.cases.read_ahead()
            self.refresh()
        except Sam2SgpError as error:
            # The request that needs it tells its client.
            if str(error) != self._trouble:
                logger.error("%s", error)
            self._trouble = str(error)
        else:
            self._trouble = None

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Hold the lock for long."""
        with self.lock:
            self._at_work = True
            try:
                yield
            finally:
                self._at_work = False

    def catch_up(self) -> bool:
        """Take in what has changed, and learn all that the next request needs, while nobody else wants the network.

        Returns:
            Whether that is done; otherwise it stepped back, and goes on from there the next time.

        Raises:
            Sam2SgpError: as of `refresh`.
        """
        self.cases.prepare(0.0)
        self.cases.read_ahead()
        try:
            with self.stepping_back() as step:
                self.take_in()
                self._ready().encode(step)
        except Stopped:
            return False
        return True

    @contextmanager
    def stepping_back(self) -> Iterator[Step]:
        """Hold the lock for work in the background, when nobody else wants it.

        The block gets what it has to call every few slices: it raises Stopped where somebody else wants the network by
        then, or the server ends.
        """
        with self.lock.last():
            yield self._step_back

    def _step_back(self, slices: int = 0) -> None:
        if self.lock.is_wanted or self.ending.is_set():
            raise Stopped("Work in the background steps back: somebody else wants the network, or the server ends.")

    def wait(self) -> None:
        """Return when no tokens are being made for other weights."""
        self._exchange.wait()

    def _ready(self) -> LoadedNetwork:
        with self.lock:
            if self._serving is None:
                serving = LoadedNetwork.load(self.settings, self.weights.active())
                self._reconcile(serving)
                self._serving = serving
            return self._serving

    def _reconcile(self, serving: LoadedNetwork) -> None:
        """Take in the approved labels as they are now."""
        cases = self.cases.cases()
        before = self.state().errors
        self._bring_in_line(serving, cases)
        self._behind = False
        self._patients = {case["name"]: case["patient"] for case in cases}
        bank = serving.bank
        values = [value for class_index, value in enumerate(bank.class_values) if bank.holds[:, class_index].any()]
        self._names = self.cases.names(values)
        seeds = set(self.cases.seeds())
        state = self._state = SupportState(
            tuple(bank.items),
            dict(bank.class_names),
            self._names,
            frozenset(case["name"] for case in (*cases, *self.cases.left_out)),
            {str(case["image"]): case["name"] for case in cases if case["name"] not in seeds},
            (*self.cases.left_out, *bank.errors),
            serving.version.name,
            bank.scaling(),
            serving.standing(),
            bank.warnings,
        )
        for error in state.errors:
            if error not in before:
                logger.warning("Not in the support set: %s", error["error"])

    def _bring_in_line(self, serving: LoadedNetwork, cases: list[dict]) -> None:
        bank, before = serving.bank, serving.bank.version
        changes = bank.reconcile(cases, self.cases.declared())
        if changes.added or changes.removed:
            logger.info("Support set: %d items in, %d out", len(changes.added), len(changes.removed))
        # Items may also turn out to be of another patient.
        if bank.version != before:
            serving.results.clear()

    def _look_for_weights(self, serving: LoadedNetwork) -> None:
        try:
            active = self.weights.active()
        except Sam2SgpError as error:
            self._exchange.problem = str(error)
            return
        self._exchange.want(active, serving.version)

    def _build(self, version: Version) -> LoadedNetwork:
        """A network with all tokens of the support set, beside the one that serves."""
        fresh = LoadedNetwork.load(self.settings, version)
        with self.lock:
            self._bring_in_line(fresh, self._ready().bank.data)
        fresh.encode()
        return fresh

    def _take_over(self, fresh: LoadedNetwork) -> None:
        """Serve by another network from now on."""
        with self.lock:
            old = self._ready()
            # What was approved meanwhile is encoded by the next request, as always.
            self._bring_in_line(fresh, old.bank.data)
            self._serving = fresh
            self._state = replace(self.state(), weights=fresh.version.name, adaptation=fresh.standing())
            fresh.bank.prune([old.bank.fingerprint] if old.bank.fingerprint else [])
        logger.info("The weights %r serve now, with tokens of %d support items", fresh.version.name, len(fresh.bank))

    # Requests

    def segment(
        self,
        image: str | Path,
        options: Options | None = None,
        image_id: str | None = None,
        gone: threading.Event | None = None,
    ) -> dict[str, Any]:
        """Segment an image.

        Args:
            image: path of a file or DICOM series folder.
            options: of the request.
            image_id: its id in the datastore, if it has one. An image with an approved label is not guided by its own
                patient's labels: its result is then one that could be expected without them.
            gone: set when nobody waits for the result any more.

        Returns:
            The entries of the prepared case and of its `CaseResult`, with class values that `class_names` names, and

                names {value: name} of the classes segmented; confidence {name: mean probability or None};
                used {name: [{item, image, slice, similarity, slices}]}, most used first; weights (name of the version);
                support_items (their number); scaling (how the intensities were scaled, and why); device; adapted
                (whether an adaptation counts); latencies (seconds); warnings (sentences).

        Raises:
            NoSupport: there is no approved label, or none but the image's own patient's.
            NotFound: an unknown class.
            DataError: the image can't be read or used.
            OutOfMemory: it is too large even for the CPU, slice by slice.
            Stopped: `gone` or `ending` was set before it was done.
        """
        step = partial(self._go_on, gone)
        options = options or Options()
        self.cases.prepare()
        with self.requests.at_work(), self._working():
            started = time.perf_counter()
            step()
            self.refresh()
            serving = self._ready()
            wanted = self._wanted(options)
            own = self._own_patient(image_id, serving.bank)
            standing = self.state().adaptation
            obstacle = standing and standing.obstacle
            warnings = [problem for problem in (self._exchange.problem, self.cases.problem, obstacle) if problem]
            refreshed = time.perf_counter()
            key = _key(image, serving.bank)
            case = self.prepare(image, image_id or "image", key) | {"patient": own, "group": None}
            if standing and standing.outdated and serving.adapts(case):
                warnings.append(standing.outdated)
            prepared = time.perf_counter()
            with self.underway.segmenting(image_id, serving.work(case, options)) as advance:

                def follow(slices: int) -> None:
                    step(slices)
                    advance(slices)

                output = self._result(key, case, options, warnings, follow)
            done = time.perf_counter()
            self._keep_only(output, wanted)
            latencies = {
                "support": round(refreshed - started, 4),
                "pre": round(prepared - refreshed, 4),
                "infer": round(done - prepared, 4),
            }
            told = _told(output, serving.bank, {value: self._names[value] for value in wanted})
            unguided = [name for name, items in told["used"].items() if not items]
            warnings += output["warnings"]
            if unguided:
                warnings.append(f"No label of another patient shows {', '.join(unguided)}: not segmented.")
            return {
                **output,
                **told,
                "weights": serving.version.name,
                "support_items": len(serving.bank),
                "latencies": latencies,
                "warnings": warnings,
            }

    def _go_on(self, gone: threading.Event | None, slices: int = 0) -> None:
        """Raise Stopped where nobody waits any more; told of each few slices."""
        if self.ending.is_set() or (gone is not None and gone.is_set()):
            raise Stopped("image: expected somebody to wait for it, found that the server ends or the client has gone.")

    def _own_patient(self, image_id: str | None, bank: SupportBank) -> str | None:
        """The patient of an image with an approved label, by whose labels it must not be guided."""
        own = self._patients.get(image_id) if image_id else None
        if own is not None and bank.patients.keys() == {own}:
            raise NoSupport(
                f"image {image_id}: expected approved labels of other patients to guide it, found only its own; "
                "approve the label of another image first."
            )
        return own

    def _wanted(self, options: Options) -> list[int]:
        """Values of the classes asked for."""
        if not self._names:
            raise NoSupport(NOTHING_APPROVED)
        if not options.classes:
            return list(self._names)
        by_name = {name: value for value, name in self._names.items()}
        by_name |= {str(value): value for value in self._names if str(value) not in by_name}
        unknown = [name for name in options.classes if name not in by_name]
        if unknown:
            known = ", ".join(self._names.values())
            raise NotFound(
                f"classes: expected some of {known}, found {', '.join(unknown)}; approve a label with it first."
            )
        return sorted({by_name[name] for name in options.classes})

    def prepare(self, image: str | Path, name: str, key: Hashable | None = None) -> PreparedCase:
        """An image, preprocessed as for a request.

        Args:
            image: path of a file or DICOM series folder.
            name: of the image, for the error.
            key: under which it is kept for the next request; None: it is not kept.

        Raises:
            DataError: it can't be used.
        """
        with self.lock:
            case = self._prepared.get(key) if key else None
            if case is None:
                try:
                    case = self._ready().segmenter.prepare({"name": name, "image": str(image)})
                except Sam2SgpError as error:
                    # Clients know it by its id.
                    raise DataError(str(error).replace(str(image), name)) from error
                if key:
                    self._prepared[key] = case
            return case

    def _result(
        self, key: Hashable | None, case: PreparedCase, options: Options, warnings: list[str], step: Step
    ) -> dict[str, Any]:
        """What was found in a case, kept for the next request, which may be for other classes of it."""
        serving = self._ready()
        asked = key and (key, case["patient"], options.model_copy(update={"classes": ()}))
        found = serving.results.get(asked) if asked else None
        if found is None:
            found, told = serving.segment(case, options, step)
            warnings += told
            if asked and not told:
                serving.results[asked] = found
        return {**case, **found}

    def _keep_only(self, output: dict, wanted: list[int]) -> None:
        if len(wanted) < len(self._names):
            other = ~torch.isin(output["pred"], torch.tensor([0, *wanted]))
            output["pred"] = output["pred"].masked_fill(other, 0)


def _key(image: str | Path, bank: SupportBank) -> Hashable | None:
    """What tells a prepared image from others: content, and the support set's scaling and planes, which it is compared
    with; None if that can't be told."""
    stamp = image_stamp(image)
    return stamp and (str(image), stamp, bank.scaling(), frozenset(bank.sliced_along()))


def _told(output: Mapping[str, Any], bank: SupportBank, names: Mapping[int, str]) -> dict[str, Any]:
    """What an answer says of these classes in place of what the result has by their values."""
    support = output["support"]
    return {
        "names": dict(names),
        "confidence": {name: _number(output["confidence"][value]) for value, name in names.items()},
        "used": {name: _used(bank, *support[value]) if value in support else [] for value, name in names.items()},
        "scaling": str(output["scaling"]),
    }


def _used(bank: SupportBank, index: torch.Tensor, similarity: torch.Tensor) -> list[dict[str, Any]]:
    """The items that guided a class, from numbers (Z, K) and similarities (Z, K); at most `ITEMS_LISTED`."""
    counts = torch.bincount(index.flatten(), minlength=len(bank))
    best = torch.full((len(bank),), -1.0)
    best.scatter_reduce_(0, index.flatten(), similarity.flatten().float(), "amax")
    numbers = sorted(torch.nonzero(counts)[:, 0].tolist(), key=lambda number: (-counts[number], -best[number]))
    return [
        {
            "item": bank.items[number].content,
            "image": _case_of(bank.items[number]),
            "slice": bank.items[number].slice,
            "similarity": round(float(best[number]), 4),
            "slices": int(counts[number]),
        }
        for number in numbers[:ITEMS_LISTED]
    ]


def _case_of(item: SupportItem) -> str:
    """Name of the case that an item is from: an image's id, or a name in the seed folder."""
    return item.id if item.slice is None else item.id.removesuffix(f"#{item.slice}")


def _number(value: float) -> float | None:
    return round(value, 4) if value == value else None
