"""The job of a run: which cases this process segments, what it takes to begin, and how the run ends.

    adapt to the support set ─ hash of all that decides results ─ leave whole results ─ share the rest ─ encode
    … the evaluator segments its share, each result goes on record … ─ wait for the other processes ─ exit code

Each finished case goes on record (`sam2sgp.engines.case_records`). So a run that was interrupted goes on with the cases
that are missing, and several processes share the cases: each takes every n-th of those, and rank 0 waits for the
records of the others. The processes talk to each other only before the first case; a slow one holds up nobody until the
end.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import numpy as np
from ignite.engine import Engine

from sam2sgp import distributed
from sam2sgp.engines.case_records import CaseRecords, settings_of_run
from sam2sgp.engines.evaluator import QueryEvents
from sam2sgp.errors import ConfigError
from sam2sgp.inferers import SupportSetInferer
from sam2sgp.inferers.adapting import AdaptationMaker
from sam2sgp.networks import SAM2SGP
from sam2sgp.support.content import digest_of
from sam2sgp.transforms import OutputNames
from sam2sgp.transforms.cases import Case

logger = logging.getLogger(__name__)


class SegmentationJob:
    """The cases of a run of `QueryEvaluator`, to which it is attached, and what became of them.

    Args:
        output_dir: where results go, seen by all processes of a run.
        scored: whether the cases are labelled and measured.
        adapter: adapts to the support set before the first case; None, or one without a limit, does not.
        names: of the files that are written for a case.
        resume: skip cases whose results are whole and would be the same.
        kept: whether `output_dir` outlives the program; where it doesn't, no message names a file in it.
        max_wait: seconds that rank 0 waits at the end for the next result of another process.

    Attributes:
        records: of the cases, on disk.
        cases: all of the run.
        left: numbers of this process's cases whose results were whole already.
        results: {number of a case: its record}; in rank 0 at the end those of all cases.

    Raises:
        ConfigError: `resume` is no bool; or, as a run starts, its processes differ in images, support set, weights or
            settings.
        DataError: a record can't be written; another process has no result in time.
    """

    def __init__(
        self,
        output_dir: str,
        scored: bool = False,
        adapter: AdaptationMaker | None = None,
        names: OutputNames | None = None,
        resume: bool = True,
        kept: bool = True,
        max_wait: float = 6 * 3600.0,
    ) -> None:
        if not isinstance(resume, bool):
            raise ConfigError(f"resume is {resume!r}: expected True or False, with a capital letter on a command line.")
        self.output_dir = Path(output_dir)
        self.scored = scored
        self.adapter = adapter
        self.names = names
        self.resume = resume
        self.kept = kept
        self.max_wait = max_wait
        self.records = CaseRecords(output_dir, scored)
        self.cases: Sequence[Case] = []
        self.left: list[int] = []
        self.results: dict[int, dict] = {}
        # Numbers of the cases to be done in this run, by all processes.
        self._due: list[int] = []
        self._drawn = 0
        self._decided_by: tuple = ()

    def attach(self, engine: Engine, drawn: int = 0, decided_by: tuple = ()) -> None:
        """Prepare the runs of an evaluator.

        Args:
            drawn: how many of the first cases the report shows; their records are whole only with what it draws.
            decided_by: further settings, of JSON types, that results depend on.
        """
        self._drawn, self._decided_by = drawn, decided_by
        engine.add_event_handler(QueryEvents.RUN_PREPARED, self._prepare)

    def _prepare(self, engine: Engine) -> None:
        """All that is done before the first case."""
        if self.adapter is not None:
            with engine.mode(engine.network):
                engine.inferer = adapted(engine.inferer, engine.network, self.adapter)
        self.cases = engine.data_loader.dataset.data
        self.records.settings = settings_of_run(engine, self.scored, *self._decided_by)
        self._choose(engine)
        if self._due and distributed.world_size() > 1:
            with engine.mode(engine.network):
                engine.inferer.encode(engine.network)

    def _choose(self, engine: Engine) -> None:
        """Choose the cases of this process among those that are not done yet."""
        rank, count = distributed.rank(), distributed.world_size()
        own = range(rank, len(self.cases), count)
        self.left = [number for number in own if self._is_whole(number)] if self.resume else []
        work = digest_of(self.records.settings, [case["name"] for case in self.cases])
        shared = distributed.gather((work, uuid4().hex, self.left))
        if len({work for work, _, _ in shared}) > 1:
            raise ConfigError(
                "The processes of this run differ: expected the same images, support set, weights and settings in all; "
                "give all machines the same files and options, and with `adapt_seconds` an `adapt_dir` that all see."
            )
        self.records.run = shared[0][1]
        done = {number for _, _, numbers in shared for number in numbers}
        self._due = [number for number in range(len(self.cases)) if number not in done]
        dataset = engine.data_loader.dataset
        dataset.chosen = self._due[rank::count]
        dataset.stamp = self.records.stamp
        known = {} if rank else {number: self.records.load(self.cases[number]) for number in done}
        self.results = {number: record for number, record in known.items() if record is not None}
        if done and not rank:
            logger.info("%d of %d images are done already, in %s.", len(done), len(self.cases), self.output_dir)

    def _is_whole(self, number: int) -> bool:
        case = self.cases[number]
        record = self.records.find(case)
        if record is None:
            return False
        if number < self._drawn and not self.records.has_figure(case):
            return False
        # Another query may have got the name that was this one's.
        return not self.names or self.names.has(case["image"], record["files"])

    def add(
        self,
        number: int,
        stamp: dict | None,
        result: Mapping,
        files: Sequence[Path] = (),
        figure: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Put a finished case on record; for the arguments see `CaseRecords.save`."""
        self.results[number] = self.records.save(self.cases[number], stamp, result, files, figure)

    def add_error(self, number: int, error: str) -> None:
        """Put on record that a case failed; the next run tries it again."""
        self.records.save_error(self.cases[number], error)
        self.results[number] = {"error": error}

    def wait_for_others(self) -> None:
        """Collect the records that other processes make."""
        missing = [number for number in self._due if number not in self.results]
        if missing:
            logger.info("Waiting for the other processes: %d images.", len(missing))
        for number in missing:
            self.results[number] = self.records.wait(self.cases[number], self.max_wait)

    @property
    def table(self) -> Path:
        """The file with a row per case and class."""
        return self.output_dir / ("metrics.csv" if self.scored else "summary.csv")

    @property
    def failed(self) -> list[int]:
        """Numbers of the cases that failed, in order."""
        return sorted(number for number, record in self.results.items() if "error" in record)

    def finish(self) -> None:
        """Decide the exit code: 1 if a case failed; the message says how many and where they are listed.

        Of several processes, rank 0 does so for all.

        Raises:
            SystemExit: a case failed.
        """
        failed = self.failed
        if failed and not distributed.rank():
            first = self.cases[failed[0]]["name"]
            listed = f" All are listed in {self.table}." if self.kept else ""
            raise SystemExit(
                f"error: {len(failed)} of {len(self.results)} images failed, first {first}: "
                f"{self.results[failed[0]]['error']}{listed}"
            )


def adapted(inferer: SupportSetInferer, network: SAM2SGP, adapter: AdaptationMaker) -> SupportSetInferer:
    """The inferer with an adaptation to its support set, if the adapter makes one.

    Of several processes the first one adapts, and the others find the result in the adapter's folder.
    """
    with distributed.rank_0_first():
        return replace(inferer, adaptation=adapter(network, inferer))
