"""Segmentation by example from Python: what `sam2sgp segment` does, on files, arrays and images in memory.

>>> from sam2sgp import Segmenter
>>> segmenter = Segmenter.from_folder("labelled")  # doctest: +SKIP
>>> mask = segmenter("new.nii.gz")  # doctest: +SKIP
"""

import json
import logging
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import monai.bundle
import numpy as np
import torch

from sam2sgp.adaptation import SupportAdaptation
from sam2sgp.data import are_binary_255, class_names, load_datalist
from sam2sgp.data.io import data_files, output_suffix, write_label
from sam2sgp.data.objects import as_file
from sam2sgp.errors import DataError, Sam2SgpError, cause_of
from sam2sgp.inferers import CaseResult, CaseSegmenter
from sam2sgp.networks import load_weights
from sam2sgp.options import check, check_places
from sam2sgp.places import BUNDLE, DEFAULT_BACKBONE, overlays_of
from sam2sgp.support import SupportBank
from sam2sgp.support.familiarity import is_unlike
from sam2sgp.transforms.cases import Case

logger = logging.getLogger(__name__)

SETTINGS, LISTED = "settings.json", "support.json"
KEYS = ("image", "label")


@dataclass(frozen=True, eq=False)
class Explanation:
    """What a `Segmenter` can say of its last result.

    Attributes:
        confidence: mean probability of each class where it was found, by name; NaN where it was not.
        support_used: ids of the labelled images (of volumes `NAME#SLICE`) that guided each class, the most similar
            first.
        unlike_support: whether the image is unlike every labelled one; then check the result first.
        maybe_absent: names of classes that were found though there is less sign of them than in any labelled image.
        warnings: sentences on what may be wrong with the image.
        seconds: what segmenting took.
        probabilities: background and classes, each an object of the query's kind, by name; only with `maps=True`.
        uncertainty: normalised entropy in [0, 1], an object of the query's kind; only with `maps=True`.
    """

    confidence: dict[str, float]
    support_used: dict[str, list[str]]
    unlike_support: bool
    maybe_absent: list[str]
    warnings: list[str]
    seconds: float
    probabilities: dict[str, Any] | None = None
    uncertainty: Any = None


class Segmenter:
    """Segments images guided by a few labelled ones.

    Args:
        weights: a weights file; None: the bundle's.
        names: class names by value; classes without one are called `class_1`, ….
        device: such as "cpu" or "cuda:0"; None: a GPU if there is one.
        **settings: any setting of `configs/inference.json`, such as `k=4` or `ct_window=[-1000, 400]`.

    Attributes:
        last: the `Explanation` of the last result; None before the first.

    Raises:
        ConfigError: a setting that there is not, or that can't work.

    Example:
        >>> segmenter = Segmenter()  # doctest: +SKIP
        >>> segmenter.add(image, label, spacing=(3, 0.8, 0.8))  # doctest: +SKIP
        >>> mask = segmenter(query, spacing=(3, 0.8, 0.8))  # doctest: +SKIP
        >>> segmenter.last.confidence  # doctest: +SKIP
        {'liver': 0.97}
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        names: Mapping[int, str] | None = None,
        device: str | None = None,
        **settings: Any,
    ) -> None:
        self.settings = {"weights": str(Path(weights).absolute()) if weights else None, "device": device, **settings}
        self.names = {int(value): name for value, name in (names or {}).items()}
        self.last: Explanation | None = None
        self._cases: list[dict] = []
        self._folder = Path(tempfile.mkdtemp(prefix="sam2sgp-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._segmenter: CaseSegmenter | None = None
        self._binary: bool | None = None
        self._config = self._read_config(settings)

    @classmethod
    def from_folder(cls, folder: str | Path, **arguments: Any) -> "Segmenter":
        """Guided by a folder of labelled images, of any layout that `sam2sgp segment --support` takes.

        Args:
            **arguments: of `Segmenter`.

        Raises:
            DataError: there are no labelled images.
        """
        made = cls(**{"names": class_names(folder), **arguments})
        pattern = made._config.get_parsed_content("patient_pattern")
        made._cases = load_datalist(folder, patient_pattern=pattern)
        return made

    def add(
        self,
        image: Any,
        label: Any,
        spacing: tuple[float, ...] | None = None,
        name: str | None = None,
        patient: str | None = None,
    ) -> None:
        """Add a labelled image, which guides from now on; an adaptation made before is dropped.

        Args:
            image: a path, a NumPy array, a torch tensor, or an image of nibabel, SimpleITK or ITK, 2D or 3D; for the
                order of an array's axes see `sam2sgp.data.objects.as_file`.
            label: its class map, integers of which 0 is the background, on the same grid: of the same kind, or a path.
            spacing: of arrays, in mm; of 3 or 4 slices it tells that they are no colours.
            name: for `support_used`.
            patient: who is shown. Images of one patient never judge each other in an adaptation.

        Raises:
            DataError: an object of another kind, or a label that does not fit its image.
        """
        number = len(self._cases) + 1
        own = name or f"support_{number}"
        case = {"name": own, "patient": patient or own, "group": "support"}
        for key, given in zip(KEYS, (image, label), strict=True):
            sizes = spacing if _is_array(given) else None
            file = as_file(given, self._folder, f"{key}_{number}", sizes, key == "label")
            case[key] = str(file.path)
        # Read once, so that a mistake is told where it is made.
        with _in_one_sentence():
            self._config.get_parsed_content("load_pair")(dict(case))
        self._cases.append(case)
        self._binary = None
        if self._segmenter is not None:
            if self._segmenter.inferer.adaptation is not None:
                logger.warning("%s was added, so the adaptation of before is dropped; call `adapt` again.", own)
            inferer = replace(self._segmenter.inferer, adaptation=None)
            inferer.bank.reconcile(self._cases)
            self._segmenter = replace(self._segmenter, inferer=inferer)

    def adapt(self, seconds: float = 60.0, seed: int = 0) -> str:
        """Adapt to the labelled images, as far as those left out in turn show that it helps; see docs/adaptation.md.

        Returns:
            what was done and found, in a sentence or two.
        """
        segmenter = self._ready()
        plain = replace(segmenter.inferer, adaptation=None)
        adaptation = SupportAdaptation(seconds, seed=seed, progress=False)(segmenter.network, plain)
        self._segmenter = replace(segmenter, inferer=replace(plain, adaptation=adaptation))
        return str(adaptation.record) if adaptation else "Not adapted: no time was given."

    def __call__(
        self,
        query: Any,
        spacing: tuple[float, ...] | None = None,
        output: str | Path | None = None,
        maps: bool = False,
    ) -> Any:
        """Segment an image; `last` then says more of the result.

        Args:
            query: as for `add`.
            spacing: of arrays, in mm.
            output: write the class map to this file, on the query's own grid: .png for pictures, .nii.gz for volumes.
                Binary pictures are written as 0 and 255 where labelled ones are.
            maps: keep probabilities and uncertainty in `last`.

        Returns:
            class values on the query's grid, of the query's kind; of a path an array in the order of the file's axes
            (of a picture its rows and columns), or with `output` that path.

        Raises:
            DataError: the query can't be read, nothing guides it, or `output` has another ending.
        """
        segmenter = replace(self._ready(), probability=maps, uncertainty=maps)
        with tempfile.TemporaryDirectory(prefix="sam2sgp-") as folder:
            file = as_file(query, Path(folder), "query", spacing)
            case: Case = {"name": file.path.name, "image": str(file.path), "patient": None, "group": None}
            prepared = segmenter.prepare(case)
        geometry = prepared["geometry"]
        path = None if output is None else Path(output).expanduser()
        if path is not None and not path.name.lower().endswith(output_suffix(geometry)):
            raise DataError(
                f"{path}: expected a name that ends in {output_suffix(geometry)}, in which the label of "
                f"{case['name']} is written; give another name."
            )
        result = segmenter.segment(prepared)
        self.last = self._explain(result, lambda values: file.restore(values, geometry))
        if self.last.unlike_support:
            logger.warning("%s is unlike every labelled image: check the result.", case["name"])
        if self.last.maybe_absent:
            classes = ", ".join(self.last.maybe_absent)
            logger.warning("%s: less sign of %s than in any labelled image: it may be absent.", case["name"], classes)
        for sentence in self.last.warnings:
            logger.warning("%s: %s", case["name"], sentence)
        values = result.pred.numpy()
        if path is None:
            return file.restore(values, geometry)
        write_label(path, values, geometry, self._is_binary())
        return path

    def save(self, folder: str | Path) -> None:
        """Keep the labelled images and settings in a folder that must not be there yet; `load` reads it.

        An adaptation is not kept: it is of a machine and its time, and is made again by `adapt`.
        """
        folder = Path(folder).expanduser()
        if folder.exists():
            raise DataError(f"{folder}: expected a new folder, found one that is there; remove it or give another.")
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=_made(folder.parent)) as temporary:
            root = Path(temporary, "segmenter")
            listed = []
            for number, case in enumerate(self._cases):
                paths = {key: _copied(Path(case[key]), root / f"{key}s" / str(number)) for key in KEYS}
                listed.append({**case, **{key: path.relative_to(root).as_posix() for key, path in paths.items()}})
            root.mkdir(exist_ok=True)
            (root / LISTED).write_text(json.dumps(listed, indent=1))
            (root / SETTINGS).write_text(json.dumps({"names": self.names, **self.settings}, indent=1))
            root.rename(folder)

    @classmethod
    def load(cls, folder: str | Path) -> "Segmenter":
        """A segmenter as `save` has kept it.

        Raises:
            DataError: the folder holds none.
        """
        folder = Path(folder).expanduser().absolute()
        try:
            settings = json.loads((folder / SETTINGS).read_text())
            cases = json.loads((folder / LISTED).read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: expected what `Segmenter.save` writes, found that {error}.") from error
        made = cls(**settings)
        made._cases = [{**case, **{key: str(folder / case[key]) for key in KEYS}} for case in cases]
        return made

    def _read_config(self, settings: Mapping[str, Any]) -> monai.bundle.ConfigParser:
        names = ["inference.json", *overlays_of(settings.get("backbone", DEFAULT_BACKBONE))]
        files = [str(BUNDLE / "configs" / name) for name in names]
        content = monai.bundle.ConfigParser.load_config_files(files)
        check_places(content, dict(settings))
        given = {"bundle_root": str(BUNDLE), "progress": False, **settings}
        if self.settings["weights"]:
            given["model_file"] = self.settings["weights"]
        if self.settings["device"]:
            given["device"] = torch.device(self.settings["device"])
        config = monai.bundle.ConfigParser(content)
        config.update(given)
        check(config)
        return config

    def _ready(self) -> CaseSegmenter:
        """Network and support set, made at the first use."""
        if not self._cases:
            raise DataError(
                "A Segmenter expected labelled images, found none: call `add`, or make it by `from_folder`."
            )
        if self._segmenter is None:
            config = self._config
            config["support_data"], config["class_names"] = self._cases, self.names
            config.parse(True)
            with _in_one_sentence():
                network = config.get_parsed_content("network").eval()
                load_weights(network, config.get_parsed_content("model_file"))
                inferer = config.get_parsed_content("inferer")
            self._segmenter = CaseSegmenter(network, inferer, config.get_parsed_content("preprocessing"), False)
        return self._segmenter

    def _is_binary(self) -> bool:
        """Whether pictures are written as 0 and 255, as a run writes them."""
        if self._binary is None:
            self._binary = are_binary_255(self._cases, self._ready().inferer.bank.class_values)
        return self._binary

    def _explain(self, result: CaseResult, restore: Any) -> Explanation:
        bank: SupportBank = self._ready().inferer.bank
        names = bank.class_names
        used = {}
        for value, (index, similarity) in result.support.items():
            order = np.argsort(-similarity.numpy().ravel(), kind="stable")
            items = [bank.items[number].id for number in index.numpy().ravel()[order]]
            used[names[value]] = list(dict.fromkeys(items))
        maps: dict[str, Any] = {}
        if result.probability is not None and result.uncertainty is not None:
            values = result.probability.float().numpy()
            labels = ["background", *(names[value] for value in bank.class_values)]
            maps["probabilities"] = {name: restore(values[:, number]) for number, name in enumerate(labels)}
            maps["uncertainty"] = restore(result.uncertainty.float().numpy())
        return Explanation(
            confidence={names[value]: confidence for value, confidence in result.confidence.items()},
            support_used=used,
            unlike_support=bool(is_unlike(result.support_distance)),
            maybe_absent=[names[value] for value in result.maybe_absent],
            warnings=result.warnings,
            seconds=result.seconds,
            **maps,
        )


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | torch.Tensor)


@contextmanager
def _in_one_sentence() -> Iterator[None]:
    """Raise the error that a reader or a config ran into, without what MONAI wraps round it."""
    try:
        yield
    except Exception as error:
        cause = cause_of(error)
        raise (cause if isinstance(cause, Sam2SgpError) else DataError(str(cause))) from error


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _copied(source: Path, folder: Path) -> Path:
    """A file with those that belong to it, or a DICOM series, in a folder of its own."""
    if source.is_dir():
        return Path(shutil.copytree(source, folder / source.name))
    folder.mkdir(parents=True)
    for path in (source, *data_files(source)):
        shutil.copyfile(path, folder / path.name)
    return folder / source.name
