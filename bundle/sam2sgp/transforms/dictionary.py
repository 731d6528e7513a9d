"""Dictionary transforms of the bundle's preprocessing and postprocessing, thin wrappers of `array` and `data.io`.

A case is a dict. `LoadCased` turns the path at `image` into slices and adds what the way back needs:

    image (Z, C, H, W) float32, label (Z, H, W) int64, geometry, source (path of the image), is_rgb, modality
"""

from collections.abc import Hashable, Mapping
from pathlib import Path

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from sam2sgp.data.io import image_stem, output_suffix, read_image, read_label, write_label
from sam2sgp.transforms.array import Fit, is_ct, pixel_size, scale_intensity


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

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        case = dict(data)
        image = read_image(case["image"], self.slice_axis)
        case.update(
            source=str(case["image"]),
            image=torch.as_tensor(image.slices),
            geometry=image.geometry,
            is_rgb=image.is_rgb,
            modality=case.get("modality") or image.modality,
        )
        if "label" in self.keys and case.get("label") is not None:
            case["label"] = torch.as_tensor(read_label(case["label"], image.geometry, self.slice_axis))
        return case


class ScaleIntensityByModalityd(MapTransform):
    """Scale the image to [0, 1]: CT by a HU window, colours by their range, all else by percentiles."""

    def __init__(
        self,
        keys: KeysCollection = "image",
        ct_window: tuple[float, float] = (-160.0, 240.0),
        percentiles: tuple[float, float] = (0.5, 99.5),
    ) -> None:
        super().__init__(keys)
        self.ct_window = tuple(ct_window)
        self.percentiles = tuple(percentiles)

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        case = dict(data)
        for key in self.key_iterator(case):
            ct = is_ct(case[key], case.get("modality"), case["geometry"].is_picture)
            case[key] = scale_intensity(case[key], ct, case["is_rgb"], self.ct_window, self.percentiles)
        return case


class FitToSquared(MapTransform):
    """Resize with the aspect (in mm where known) kept and pad to `size`.

    The way back is put at `fit`, and what was resized at `<key>_full`.
    """

    def __init__(self, keys: KeysCollection = ("image", "label"), size: int = 128) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.size = size

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        case = dict(data)
        pixel = pixel_size(case["geometry"].spacing)
        case["fit"] = Fit.of(tuple(case["image"].shape[-2:]), self.size, pixel)
        for key in self.key_iterator(case):
            if isinstance(case[key], torch.Tensor):
                case[f"{key}_full"] = case[key]
                case[key] = case["fit"].apply_label(case[key]) if key == "label" else case["fit"].apply(case[key])
        return case


class SaveLabeld(MapTransform):
    """Write predicted class maps (Z, H, W) to `<output_dir>/<query stem><suffix>` on the query's own grid.

    The written path is put at `<key>_path`. Two queries of one stem get the second's whole name as stem.
    """

    def __init__(self, keys: KeysCollection = "pred", output_dir: str = "", binary_255: bool = False) -> None:
        super().__init__(keys)
        self.output_dir = Path(output_dir)
        self.binary_255 = binary_255
        self.written: dict[Path, str] = {}

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        case = dict(data)
        for key in self.key_iterator(case):
            geometry, source = case["geometry"], case["source"]
            path = self.output_dir / (image_stem(source) + output_suffix(geometry))
            if self.written.setdefault(path, source) != source:
                path = self.output_dir / (Path(source).name + output_suffix(geometry))
            write_label(path, case[key].numpy(), geometry, self.binary_255)
            case[f"{key}_path"] = str(path)
        return case
