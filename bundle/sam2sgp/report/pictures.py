"""Pictures of single results, for slides and for programs that know no class maps.

In: segmented cases. Out: PNG files beside the label files.
"""

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform
from PIL import Image

from sam2sgp.data.io import read_image
from sam2sgp.drawing import class_colour, draw_overlay, montage, spread_slices, to_display
from sam2sgp.files import replacing
from sam2sgp.report.slices import scaled_slices
from sam2sgp.transforms import OutputNames, ScaleIntensityByModalityd


class SavePicturesd(MapTransform):
    """Write pictures of class maps (Z, H, W), in the colours of the report.

    The written paths are added to those at `written`.

    Args:
        overlay: write `<query stem>_overlay.png`: the image with contours, of a volume up to nine slices.
        coloured: write `<query stem>_coloured.png` for pictures: each pixel in its class's colour, background black.
        scale_intensity: how images are scaled.
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        *,
        names: OutputNames,
        scale_intensity: ScaleIntensityByModalityd,
        overlay: bool = False,
        coloured: bool = False,
    ) -> None:
        super().__init__(keys)
        self.names = names
        self.scale_intensity = scale_intensity
        self.overlay = overlay
        self.coloured = coloured

    def __call__(self, data: Mapping[Hashable, Any]) -> dict:
        case = dict(data)
        for key in self.key_iterator(case):
            labels = case[key].numpy()
            if self.overlay:
                self._save(case, "_overlay.png", self._overlay(case, labels))
            if self.coloured and case["geometry"].is_picture:
                self._save(case, "_coloured.png", coloured(labels[0]))
        return case

    def _save(self, case: dict, ending: str, picture: np.ndarray) -> None:
        path = self.names.claim(case["source"], ending)
        with replacing(path, durable=False) as part:
            Image.fromarray(picture).save(part)
        case["written"] = [*case.get("written", ()), path]

    def _overlay(self, case: dict, labels: np.ndarray) -> np.ndarray:
        # The case has let its image go by now.
        image = read_image(case["source"], case["geometry"].slice_axis)
        shown = [0] if len(labels) == 1 else spread_slices(labels)
        slices = scaled_slices(image, case["scaling"], self.scale_intensity, shown)
        if len(labels) == 1:
            return draw_overlay(to_display(slices[0]), labels[0], scale=1)
        return montage(slices, labels[shown], numbers=shown, total=len(labels))


def coloured(labels: np.ndarray) -> np.ndarray:
    """A class map (H, W) as a picture (H, W, 3) uint8: each pixel in its class's colour, background black."""
    picture = np.zeros((*labels.shape, 3), np.uint8)
    for value in np.unique(labels[labels > 0]).tolist():
        picture[labels == value] = class_colour(value)
    return picture
