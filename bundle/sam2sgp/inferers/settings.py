"""The settings by which a query is segmented, next to network and support set; the shipped configs set the same."""

from dataclasses import dataclass
from typing import Literal

from sam2sgp.errors import ConfigError
from sam2sgp.inferers.volume import VolumeMemory
from sam2sgp.support.sampler import SupportSampler


@dataclass(frozen=True)
class InferenceSettings:
    """The settings of a `SupportSetInferer`; `dataclasses.replace` makes variants.

    Raises:
        ConfigError: `region_below` is not in [0, 1], or `mirror` is none of its values.
    """

    sampler: SupportSampler = SupportSampler()
    """Chooses the support items of each slice and class."""

    batch_size: int = 8
    """Slices, or regions of slices, that go through the network at a time; bounds memory."""

    precision: str = "fp32"
    """Number format of the network: "fp32", "bf16" or, on a GPU, "fp16"."""

    region_below: float = 0.7
    """Objects of an extent below this share of the image's longer side are segmented a second time in a region of
    interest, see `SecondPass`; 0 for never."""

    volume_memory: VolumeMemory | None = VolumeMemory()
    """How the slices of a volume guide each other, see `sam2sgp.inferers.volume`; None: not at all."""

    object_gate: bool = True
    """An image with too little evidence of a class gets nothing of it, where the support set teaches how little, see
    `sam2sgp.inferers.object_gate`."""

    one_piece: bool = True
    """Of a class that every labelled volume shows in one piece, only the largest part is kept in a volume."""

    mirror: bool | Literal["auto"] = "auto"
    """Whether a case is segmented a second time, mirrored left to right like the images that guide it then, so that the
    mean counts: always, never, or "auto": a single image where a class that was found is of low confidence,
    see `sam2sgp.evaluation.confidence`, or has fewer than the sampler's k items to guide it."""

    def __post_init__(self) -> None:
        if not 0 <= self.region_below <= 1:
            raise ConfigError(
                f"region_below is {self.region_below}: expected a share of the image in [0, 1], 0 for no second pass."
            )
        if not isinstance(self.mirror, bool) and self.mirror != "auto":
            raise ConfigError(f"mirror is {self.mirror!r}: expected True, False or auto.")
