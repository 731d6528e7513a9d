"""What a run has finished, on disk: a record for each case, by which an interrupted run goes on.

    output_dir/records/<hash of the case's name>.json    rows of the tables, and all that the result depends on
    output_dir/records/<hash of the case's name>.npz     what the report shows of the case, of some cases

A record is written after the case's results, in one step. It holds the key of the result: a hash over the content of
the image (of the label too, where it is scored), the support set, the network's weights, its adaptation and every
setting that decides the result. Where the key is what it would be now, and the files are as they were written, the
result is whole and the case is not segmented again; otherwise it is. So it makes no difference how often a run was
interrupted, nor by how many processes it was made.

Processes that share the cases of a run share nothing else: what the others have done is read from their records, so all
must see the same `output_dir`.
"""

import inspect
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from monai.engines import SupervisedEvaluator

import sam2sgp
from sam2sgp.data.io import writing
from sam2sgp.errors import DataError
from sam2sgp.support.bank import SupportBank
from sam2sgp.support.content import FileHashes, digest_of, network_fingerprint, settings_fingerprint, signature_of
from sam2sgp.transforms.cases import Case
from sam2sgp.transforms.scaling import scaling_hint

# Part of every key: to be raised when the same cases and settings give another result by the code.
VERSION = 6
FOLDER = "records"
# Arguments that don't decide a result.
NOT_DECIDING = {"names", "folder"}
POLL_SECONDS = 1.0


class CaseRecords:
    """The records of a run, one per case. A case is an entry of a datalist.

    Args:
        output_dir: the folder of the results.
        scored: whether results depend on the cases' labels too.

    Attributes:
        settings: hash of all that the results of the run depend on next to the cases, see `settings_of_run`.
        run: by which the processes of a run know its records from older ones.
    """

    def __init__(self, output_dir: str | Path, scored: bool = False) -> None:
        self.output_dir = Path(output_dir)
        self.scored = scored
        self.settings = ""
        self.run = ""
        self._hashes = FileHashes()

    def stamp(self, case: Case) -> dict | None:
        """The content of a case's files, and how to know them unchanged; to be made before the case is read.

        None where they can't be read: whoever reads the case will say why.
        """
        try:
            # Before the content: a file that changes in between is looked at again.
            signature = signature_of(self._paths(case))
            return {"signature": signature, "content": self._content(case)}
        except (OSError, DataError):
            return None

    def save(
        self,
        case: Case,
        stamp: dict | None,
        result: Mapping,
        files: Sequence[Path] = (),
        figure: Mapping[str, np.ndarray] | None = None,
    ) -> dict:
        """Put a finished case on record, replacing an older record. Returns the record.

        Args:
            stamp: what `stamp` gave for it.
            result: of JSON types, kept with the record.
            files: that were written for it, in `output_dir`.
            figure: arrays that the report needs.

        Raises:
            DataError: the record can't be written.
        """
        path = self._path(case)
        stamp = stamp or {"signature": None, "content": None}
        key = self._key(case, stamp["content"])
        self.drop_figure(case)
        if figure is not None:
            with writing(path.with_suffix(".npz"), "what the report shows") as part, open(part, "wb") as file:
                np.savez_compressed(file, key=np.array(key), **figure)
        states = {str(file.relative_to(self.output_dir)): _state(file) for file in files}
        record = {**result, **stamp, "key": key, "files": states, "run": self.run}
        self._write(path, record)
        return record

    def save_error(self, case: Case, error: str) -> None:
        """Put on record that a case failed in this run; the next one tries again."""
        self.drop_figure(case)
        self._write(self._path(case), {"error": error, "run": self.run})

    def find(self, case: Case) -> dict | None:
        """The record of a case whose result is whole and what it would be now; None where there is none."""
        record = self.load(case)
        if record is None or "error" in record:
            return None
        try:
            signature = signature_of(self._paths(case))
            unchanged = signature is not None and signature == record["signature"]
            content = record["content"] if unchanged else self._content(case)
            whole = all(_state(self.output_dir / name) == state for name, state in record["files"].items())
        except (OSError, DataError):
            return None
        return record if whole and record["key"] == self._key(case, content) else None

    def load(self, case: Case) -> dict | None:
        """The record of a case, whatever it is of; None where there is none that can be read."""
        try:
            record = json.loads(self._path(case).read_bytes())
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) and record.get("version") == VERSION else None

    def wait(self, case: Case, seconds: float) -> dict:
        """The record that this run makes of a case.

        Raises:
            DataError: it is not there after so many seconds.
        """
        end = time.monotonic() + seconds
        while True:
            record = self.load(case)
            if record is not None and record["run"] == self.run:
                return record
            if time.monotonic() > end:
                raise DataError(
                    f"{self.output_dir}: expected a result of {case['name']} from another process, found none for "
                    f"{seconds:g} s; see whether all processes run and write to this folder, and start the same "
                    "command again: it does only what is missing."
                )
            time.sleep(POLL_SECONDS)

    def has_figure(self, case: Case) -> bool:
        """Whether there are arrays for the report."""
        return self._path(case).with_suffix(".npz").is_file()

    def figure(self, case: Case, record: Mapping) -> dict[str, np.ndarray] | None:
        """The arrays that were saved with a record; None where there are none."""
        try:
            with np.load(self._path(case).with_suffix(".npz"), allow_pickle=False) as arrays:
                figure = dict(arrays)
        except Exception:  # what a damaged file makes the reader raise has no common type
            return None
        return figure if str(figure.pop("key", "")) == record["key"] else None

    def drop_figure(self, case: Case) -> None:
        """Delete the arrays for the report."""
        self._path(case).with_suffix(".npz").unlink(missing_ok=True)

    def _path(self, case: Case) -> Path:
        return self.output_dir / FOLDER / f"{digest_of(case['name'])[:32]}.json"

    def _paths(self, case: Case) -> list[str]:
        return [case["image"], case["label"]] if self.scored else [case["image"]]

    def _content(self, case: Case) -> str:
        return digest_of(self._hashes.of_paths(self._paths(case)))

    def _key(self, case: Case, content: str | None) -> str:
        return digest_of(self.settings, content, [case.get(name) for name in ("modality", "patient", "group")])

    @staticmethod
    def _write(path: Path, record: dict) -> None:
        with writing(path, "a record") as part:
            part.write_text(json.dumps({"version": VERSION, **record}))


def _state(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def settings_of_run(engine: SupervisedEvaluator, *more: object) -> str:
    """Hash of all that a `QueryEvaluator` makes of a case, next to the case: support set, network, settings.

    Of the postprocessing, what it was made with counts by the names of the arguments; so a new argument counts too,
    unless it is in `NOT_DECIDING`.

    Args:
        more: further settings, of JSON types.
    """
    inferer, dataset = engine.inferer, engine.data_loader.dataset
    return digest_of(
        VERSION,
        sam2sgp.__version__,
        _network_content(engine.network),
        None if inferer.adaptation is None else inferer.adaptation.content(),
        _bank_content(inferer.bank),
        settings_fingerprint(dataset.transform),
        [engine.exclude_own_patient, engine.probability, engine.uncertainty],
        asdict(inferer.settings),
        _described(engine.postprocessing),
        more,
    )


def _network_content(network: torch.nn.Module) -> list:
    """Device and precision are left out: the first changes nothing but the last bits, the second is the inferer's."""
    switches = {
        name: value
        for name, value in vars(network).items()
        if isinstance(value, bool | int | float | str) and not name.startswith("_") and name != "training"
    }
    return [type(network).__qualname__, network_fingerprint(network, torch.device("cpu")), switches]


def _bank_content(bank: SupportBank) -> list:
    items = [[item.id, item.content, item.patient, item.group] for item in bank.items]
    # Queries are scaled like labelled images without items, too.
    groups = [None, *sorted({case["group"] for case in bank.data})]
    scalings = [scaling_hint({"support_scaling": bank.scaling(group)}) for group in groups]
    return [bank.settings, sorted(bank.class_names.items()), items, scalings]


def _described(value: object) -> object:
    """An object as JSON types: its class, and what it was made with."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return [[key, _described(entry)] for key, entry in value.items()]
    if isinstance(value, Sequence):
        return [_described(entry) for entry in value]
    names = [name for name in inspect.signature(type(value)).parameters if name not in NOT_DECIDING]
    return [type(value).__qualname__, {name: _described(getattr(value, name)) for name in names}]
