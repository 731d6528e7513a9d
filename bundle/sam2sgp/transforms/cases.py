"""The keys of a case: as a list of cases has it, and as preprocessing leaves it.

Cases are dicts because MONAI's transforms are made for dicts; these types say which keys there are, and a type checker
compares. What a segmentation gives is no dict, see `sam2sgp.inferers.CaseResult`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from torch import Tensor

from sam2sgp.data.io import image_stem
from sam2sgp.data.io.geometry import Geometry
from sam2sgp.transforms.acquired import Acquired
from sam2sgp.transforms.array import Letterbox
from sam2sgp.transforms.scaling import Scaling, SupportScaling


class Case(TypedDict):
    """One image file or series, as `sam2sgp.data.load_datalist` lists it."""

    name: str
    """For people: the file's name without ending."""

    image: str
    """Path of the file, or of the folder of a DICOM series."""

    label: NotRequired[str]
    """Path of its label."""

    patient: NotRequired[str | None]
    """Who is shown; a patient's own labels are not used in evaluation."""

    group: NotRequired[str | None]
    """Cases of one kind within a collection of data sets."""

    modality: NotRequired[str | None]
    """As a datalist states it, such as "CT"."""

    named: NotRequired[list[int]]
    """Class values whose names came with the label."""

    support_scaling: NotRequired[SupportScaling]
    """How the support set is scaled, which decides where nothing is stated of a case."""


class PreparedCase(TypedDict):
    """A case of Z slices after preprocessing; S is the network's size, H and W are the image's own."""

    name: str
    """As listed."""

    image: Tensor
    """(Z, C, S, S) float32 in [0, 1]."""

    image_full: Tensor
    """(Z, C, H, W) float32 in [0, 1]: the same at its own size."""

    label: NotRequired[Tensor | str | None]
    """(Z, H, W) class values where the case is scored or guides; in a support case at the network's size. Otherwise as
    listed."""

    label_full: NotRequired[Tensor]
    """(Z, H, W) class values of a support case at its own size."""

    source: str
    """Path of the image."""

    geometry: Geometry
    """Spacing and orientation: the way back to a file."""

    letterbox: Letterbox
    """The way back from the network's size to the image's own."""

    scaling: Scaling
    """How the intensities were scaled, and why."""

    warnings: list[str]
    """Sentences on what may be wrong with the image."""

    is_rgb: bool
    """Whether it is a colour image."""

    modality: str | None
    """As the datalist states it, or else the file's header."""

    stated_by: str
    """Who states the modality."""

    acquired: Acquired
    """What a DICOM header says of how it was acquired."""

    patient: NotRequired[str | None]
    """As listed."""

    group: NotRequired[str | None]
    """As listed."""


def completed(cases: Iterable[Mapping[str, Any]]) -> list[Case]:
    """Cases with what a list made by hand may leave out: each is named after its file, of a patient of its own.

    Files of one name in several folders are named after their paths, as in data folders: records of results are found
    by the name.

    Example:
        >>> completed([{"image": "a/liver_1.nii.gz"}])
        [{'name': 'liver_1', 'patient': 'liver_1', 'group': None, 'image': 'a/liver_1.nii.gz'}]
    """
    cases = list(cases)
    stems = Counter(image_stem(case["image"]) for case in cases if not case.get("name"))
    made = []
    for case in cases:
        name = case.get("name") or image_stem(case["image"])
        if not case.get("name") and stems[name] > 1:
            name = Path(case["image"]).as_posix().strip("/").replace("/", "_")
        made.append(cast(Case, {"name": name, "patient": name, "group": None, **case}))
    return made
