"""Dictionary transforms of the bundle's preprocessing and postprocessing, thin wrappers of `array` and `data.io`.

A case is a dict. `LoadCased` turns the path at `image` into slices and adds what the way back needs:

    image (Z, C, H, W) float32, label (Z, H, W) uint8, or int32 where a value is beyond 255, geometry, source (path of
    the image), is_rgb, modality, stated_by (who states it), acquired (what a DICOM header says) and warnings (sentences
    on what may be wrong with the image)

`ScaleIntensityByModalityd` adds `scaling`, which says how the image was scaled and why.
"""

import logging
import os
import unicodedata
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from sam2sgp.data.dicom_seg import DicomSourceError, write_dicom_seg
from sam2sgp.data.io import (
    image_stem,
    is_dicom,
    limits,
    map_suffix,
    may_be_turned,
    output_suffix,
    read_image,
    read_label,
    result_endings,
    softened_border,
    write_label,
    write_map,
)
from sam2sgp.errors import DataError
from sam2sgp.transforms.acquired import Acquired
from sam2sgp.transforms.array import Letterbox, Region, pixel_size
from sam2sgp.transforms.parts import is_sparse
from sam2sgp.transforms.scaling import (
    DEFAULT_CT_WINDOW,
    DEFAULT_PERCENTILES,
    Scaling,
    SupportScaling,
    choose_scaling,
    is_ct,
    scale_intensity,
)

logger = logging.getLogger(__name__)

SPARSE = (
    "Only single slices of it are labelled, so the others are not taken as free of the classes when it guides; "
    "adaptation, training and evaluation count them as background: label whole volumes for these, or cut the labelled "
    "slices out as images of their own."
)
SOFTENED = (
    "Value {} of its label is found only along the border of 255, as where a mask was smoothed or reduced, and is "
    "taken as a class of its own: threshold the mask if it is none."
)
TURNED = (
    "An EXIF tag turns it for display, and its label, which is of the same size either way, has none: the label must "
    "be drawn on the picture as displayed; programs that ignore the tag draw it as stored."
)
CONSTANT = "All its values are the same, so nothing can be found in it."


class LoadCased(MapTransform):
    """Read the image, and the label if the case has one, as slices.

    Args:
        keys: ("image", "label") or ("image",).
        slice_axis: "auto" (the thick axis, else axial) or the canonical axis 0, 1 or 2 to slice along.

    Raises:
        DataError: a file can't be read, or image and label do not share a grid.
    """

    def __init__(self, keys: KeysCollection = ("image", "label"), slice_axis: str | int = "auto") -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.slice_axis = slice_axis

    def __call__(self, data: Mapping[Hashable, Any]) -> dict:
        case = dict(data)
        image = read_image(case["image"], self.slice_axis)
        listed = case.get("modality")
        case.update(
            source=str(case["image"]),
            image=torch.as_tensor(image.slices),
            geometry=image.geometry,
            is_rgb=image.is_rgb,
            modality=listed if listed and is_ct(listed) is not None else image.modality or listed,
            acquired=Acquired(image.modality, image.units),
            stated_by="datalist" if listed and is_ct(listed) is not None else "DICOM header",
            warnings=[*case.get("warnings", ()), *image.warnings],
        )
        if "label" in self.keys and case.get("label") is not None:
            label = read_label(case["label"], image.geometry, self.slice_axis)
            if is_sparse(label, image.geometry.spacing):
                case["warnings"].append(SPARSE)
            if image.geometry.is_picture and (grey := softened_border(label)) is not None:
                case["warnings"].append(SOFTENED.format(grey))
            if may_be_turned(case["label"], image.geometry):
                case["warnings"].append(TURNED)
            # PyTorch calculates with no other unsigned integers than uint8.
            case["label"] = torch.from_numpy(label if label.dtype == np.uint8 else label.astype(np.int32))
        return case


def log_warnings(prepared: Mapping) -> None:
    """Log what may be wrong with a prepared case."""
    for sentence in prepared.get("warnings", ()):
        logger.warning("%s: %s", prepared["name"], sentence)


class ScaleIntensityByModalityd(MapTransform):
    """Scale the image to [0, 1]: CT by a HU window, colours by their range, all else by percentiles.

    How is chosen by `choose_scaling` and put at `scaling`: by `modality` and, where nothing is stated, by the support
    set, whose `SupportScaling` is expected at `support_scaling`. What may be wrong is added to `warnings`.

    Args:
        ct_window: lower and upper end in HU.
        percentiles: lower and upper one.
        modality: of the images of which neither a datalist nor a header states one; None: not stated.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        ct_window: tuple[float, float] = DEFAULT_CT_WINDOW,
        percentiles: tuple[float, float] = DEFAULT_PERCENTILES,
        modality: str | None = None,
    ) -> None:
        super().__init__(keys)
        self.ct_window = ct_window[0], ct_window[1]
        self.percentiles = percentiles[0], percentiles[1]
        self.modality = modality

    def scaling_of(
        self,
        slices: torch.Tensor,
        is_rgb: bool,
        is_picture: bool,
        modality: str | None,
        stated_by: str = "datalist",
        support: SupportScaling | None = None,
    ) -> Scaling:
        """How raw intensities (Z, C, H, W) are scaled; arguments as of `choose_scaling`."""
        if is_ct(modality) is None and self.modality is not None:
            modality, stated_by = self.modality, "setting"
        return choose_scaling(slices, is_rgb, is_picture, modality, stated_by, support)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict:
        case = dict(data)
        stated = case.get("modality"), case.get("stated_by", "datalist"), case.get("support_scaling")
        for key in self.key_iterator(case):
            case["scaling"] = self.scaling_of(case[key], case["is_rgb"], case["geometry"].is_picture, *stated)
            constant = [CONSTANT] if case[key].min() == case[key].max() else []
            case["warnings"] = [*case.get("warnings", ()), *case["scaling"].warnings, *constant]
            case[key] = scale_intensity(case[key], case["scaling"], self.ct_window, self.percentiles)
        return case


class FitToSquared(MapTransform):
    """Resize with the aspect (in mm where known) kept and pad to `size`.

    The way back is put at `letterbox`, and what was resized at `<key>_full`. Of an image so small that the network can
    hardly see it, or so long that windows (`Region.windows`) don't help, `warnings` tell.

    Raises:
        TooLargeError: it has so many slices that they take more than half of the machine's memory at this size,
            however small the image is.
    """

    def __init__(self, keys: KeysCollection = ("image", "label"), *, size: int) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.size = size

    def __call__(self, data: Mapping[Hashable, Any]) -> dict:
        case = dict(data)
        slices, channels = case["image"].shape[:2]
        # Half of the memory: reading is over, and the image itself is small next to this.
        limit = 2 * limits.default_memory()
        limits.check_memory(case.get("source", "image"), (slices, self.size, self.size), channels, limit)
        pixel = pixel_size(case["geometry"].spacing)
        case["letterbox"] = Letterbox.of(tuple(case["image"].shape[-2:]), self.size, pixel)
        windows = Region.windows(case["letterbox"].original, self.size, pixel)
        seen = windows[0].letterbox if windows else case["letterbox"]
        case["warnings"] = [*case.get("warnings", ()), *seen.warnings]
        for key in self.key_iterator(case):
            if isinstance(case[key], torch.Tensor):
                case[f"{key}_full"] = case[key]
                case[key] = (
                    case["letterbox"].apply_label(case[key]) if key == "label" else case["letterbox"].apply(case[key])
                )
        return case


class OutputNames:
    """File names in an output folder, of which no two queries and no two kinds of output share one, on file systems
    that don't tell upper from lower case either, and none is that of another query in the same folder.

    Args:
        output_dir: the folder.
        sources: the queries, in order. Their names are given out at once, so that each query has the same ones whoever
            segments it, and when.
        maps, dicom_seg: what else than labels will be written, see `result_endings`.
    """

    def __init__(
        self, output_dir: str, sources: Sequence[str] = (), maps: Sequence[str] = (), dicom_seg: bool = False
    ) -> None:
        self.output_dir = Path(output_dir)
        folder = os.path.realpath(output_dir)
        inside = (source for source in sources if os.path.realpath(Path(source).parent) == folder)
        self.taken: dict[str, str] = {_folded(Path(source).name): source for source in inside}
        for source in sources:
            for ending in result_endings(source, maps, dicom_seg):
                self._name(source, ending)

    def _name(self, source: str, ending: str) -> Path:
        name = Path(source).name
        stems = chain((image_stem(source), name), (f"{name}_{number}" for number in count(2)))
        names = (stem + ending for stem in stems)
        return self.output_dir / next(name for name in names if self.taken.setdefault(_folded(name), source) == source)

    def has(self, source: str, names: Iterable[str]) -> bool:
        """Whether these names of files are the query's, as any are where none was given out."""
        return not self.taken or all(self.taken.get(_folded(name)) == source for name in names)

    def claim(self, source: str, ending: str) -> Path:
        """`<output_dir>/<stem><ending>` for the query at `source`, always the same; where that is another's already,
        the query's whole name is its stem, and then a number is added.

        Raises:
            DataError: the query itself has that path.
        """
        path = self._name(source, ending)
        if path.exists() and path.samefile(source):
            raise DataError(f"{path}: expected a folder for results, found the query there; choose another output_dir.")
        return path


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name.casefold())


class SaveLabeld(MapTransform):
    """Write predicted class maps (Z, H, W) to `<query stem><suffix>` on the query's own grid.

    The written path is put at `<key>_path`, and added to those at `written`, as by all that save results.
    """

    def __init__(self, keys: KeysCollection = "pred", *, names: OutputNames, binary_255: bool = False) -> None:
        super().__init__(keys)
        self.names = names
        self.binary_255 = binary_255

    def __call__(self, data: Mapping[Hashable, Any]) -> dict:
        case = dict(data)
        for key in self.key_iterator(case):
            path = self.names.claim(case["source"], output_suffix(case["geometry"]))
            write_label(path, case[key].numpy(), case["geometry"], self.binary_255)
            case[f"{key}_path"] = str(path)
            case["written"] = [*case.get("written", ()), path]
        return case


class SaveMapsd(MapTransform):
    """Write maps of real values to `<query stem>_<key><suffix>` on the query's own grid, see `write_map`.

    A key that a case lacks is passed over. What is written is taken out of the case, because it is large.
    """

    def __init__(self, keys: KeysCollection = ("probability", "uncertainty"), *, names: OutputNames) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.names = names

    def __call__(self, data: Mapping[Hashable, Any]) -> dict:
        case = dict(data)
        for key in self.key_iterator(case):
            path = self.names.claim(case["source"], f"_{key}{map_suffix(case['geometry'])}")
            write_map(path, case.pop(key).numpy(), case["geometry"])
            case["written"] = [*case.get("written", ()), path]
        return case


class SaveDicomSegd(MapTransform):
    """Write the class maps (Z, H, W) of DICOM queries to `<query stem>.dcm`, see `write_dicom_seg`.

    The log tells of queries that aren't DICOM (once), that hold no class, and that a segmentation can't refer to; they
    get no file.

    Args:
        class_names: by value.
    """

    def __init__(self, keys: KeysCollection = "pred", *, names: OutputNames, class_names: dict[int, str]) -> None:
        super().__init__(keys)
        self.names = names
        self.class_names = class_names
        self.warned = False

    def __call__(self, data: Mapping[Hashable, Any]) -> dict:
        case = dict(data)
        source = case["source"]
        if not is_dicom(source):
            if not self.warned:
                logger.warning("%s: not DICOM, so no DICOM segmentation is written for it and others like it.", source)
            self.warned = True
            return case
        for key in self.key_iterator(case):
            path = self.names.claim(source, ".dcm")
            written = False
            try:
                written = write_dicom_seg(path, case[key].numpy(), case["geometry"], source, self.class_names)
                if not written:
                    logger.warning("%s: nothing was found, so no DICOM segmentation is written.", source)
            except DicomSourceError as error:
                # The class map is written, and other queries wait.
                logger.error("%s", error)
            if written:
                case["written"] = [*case.get("written", ()), path]
            else:
                path.unlink(missing_ok=True)  # what an earlier run found
        return case
