"""Slices of a volume as a report shows them: which ones, where they lie, and which side is which.

In: slices and class maps in display orientation, with their `Geometry`. Out: frames and words.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from sam2sgp.data.io import Geometry, MedicalImage
from sam2sgp.drawing import draw_overlay, to_display
from sam2sgp.report.html import ShownSlice
from sam2sgp.transforms import ScaleIntensityByModalityd
from sam2sgp.transforms.scaling import CT, Scaling, scale_intensity

# Pictures of all volumes of a report, and the fewest and most of one; a picture is about 10 KB.
FRAMES, FEWEST, MOST = 600, 9, 32
# Letters at the left, right, upper and lower edge of sagittal, coronal and axial slices.
SIDES = ("APSI", "RLSI", "RLAP")
# Names of both directions of RAS+ along left, anterior and superior.
DIRECTIONS = ("RL", "AP", "SI")


def frames_per_case(cases: int) -> int:
    """Slices that are shown of each of so many volumes, so that the report stays of a size that browsers open.

    Example:
        >>> frames_per_case(8), frames_per_case(60)
        (32, 10)
    """
    return min(MOST, max(FEWEST, FRAMES // max(1, cases)))


def nearest(numbers: Sequence[int], number: int) -> int:
    """Place of the slice that is shown first: that of the other pictures of the case, or the one closest to it.

    Example:
        >>> nearest([0, 5, 10, 15], 11)
        2
    """
    return min(range(len(numbers)), key=lambda place: abs(numbers[place] - number))


def scaled_slices(
    image: MedicalImage, scaling: Scaling, settings: ScaleIntensityByModalityd, numbers: Sequence[int]
) -> torch.Tensor:
    """Some slices (N, C, H, W) of an image in [0, 1], as a run scaled it."""
    slices = torch.from_numpy(image.slices)
    bounds = settings.ct_window, settings.percentiles
    # A window needs no other slices, and a long CT is gigabytes.
    if scaling.kind == CT:
        return scale_intensity(slices[list(numbers)], scaling, *bounds)
    return scale_intensity(slices, scaling, *bounds)[list(numbers)]


def sides_of(geometry: Geometry) -> str:
    """Letters at the left, right, upper and lower edge of a slice; "" where the file doesn't say, as for pictures."""
    return SIDES[geometry.slice_axis] if geometry.spacing and geometry.shape[0] > 1 else ""


def slice_position(geometry: Geometry, number: int) -> str:
    """Which slice of how many, and where its middle lies, as in "Slice 12 of 30, 34.5 mm S"; "" for a single slice."""
    total = geometry.shape[0]
    if total == 1:
        return ""
    text = f"Slice {number + 1} of {total}"
    if not geometry.spacing:
        return text
    middle = (np.array(geometry.full_shape) - 1) / 2
    along = geometry.axes[0]
    middle[along] = total - 1 - number if geometry.flips[0] else number
    world = float((geometry.affine @ [*middle, 1.0])[geometry.slice_axis])
    return f"{text}, {abs(world):.1f} mm {DIRECTIONS[geometry.slice_axis][world < 0]}"


def frames(
    geometry: Geometry, numbers: Sequence[int], slices: torch.Tensor, maps: Mapping[str, np.ndarray]
) -> list[ShownSlice]:
    """Some slices of a volume with their segmentation, and the truth where there is one.

    Args:
        geometry: of the volume.
        numbers: of the slices, from 0.
        slices: (N, C, H, W) of one intensity scale.
        maps: `pred` and perhaps `truth`: class maps (1 + N, H, W), of which the first is another slice.
    """
    return [
        ShownSlice(
            draw_overlay(
                to_display(slices[place]),
                maps["pred"][1 + place],
                truth=maps["truth"][1 + place] if "truth" in maps else None,
            ),
            slice_position(geometry, number),
        )
        for place, number in enumerate(numbers)
    ]
