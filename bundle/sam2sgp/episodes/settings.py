"""What training episodes are made of: the settings of the datasets of this package, next to data and preprocessing."""

from dataclasses import dataclass

from monai.transforms import Compose

from sam2sgp.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EpisodeSettings:
    """What is drawn for an episode.

    Raises:
        ConfigError: fewer than two clips fit into an episode.
    """

    group_size: int = 6
    """Images G in an episode, at least 2."""

    empty_fraction: float = 0.3
    """Share of images drawn from slices without the target, where there are such."""

    invert_probability: float = 0.1
    """Share of episodes whose target is everything but the class."""

    union_probability: float = 0.1
    """Share of episodes whose target is the union of two classes, where there are two."""

    clip_probability: float
    """Share of episodes whose images are clips, where volumes are long enough."""

    clip_length: int = 3
    """Slices L of a clip, at least 2; an episode holds G // L clips, and single slices for the rest."""

    clip_stride: int = 1
    """Distance between two slices of a clip."""

    def __post_init__(self) -> None:
        fit = 2 <= self.clip_length <= self.group_size // 2 and self.clip_stride >= 1
        if self.clip_probability and not fit:
            raise ConfigError(
                f"clip_length, clip_stride are {self.clip_length}, {self.clip_stride}: expected two clips to fit into "
                f"the {self.group_size} images of an episode, each of at least two slices; or set clip_probability to "
                "0."
            )


@dataclass(frozen=True)
class Augmentation:
    """How the images of an episode are changed: dictionary transforms of `image` (3, S, S) and `label` (1, S, S).

    Raises:
        ConfigError: the number of variants is below 1.
    """

    task: Compose | None = None
    """Applied with the same random numbers to all images of an episode."""

    image: Compose | None = None
    """Applied behind it, with random numbers of each image's own; the slices of a clip have the same."""

    variants: int | None = None
    """Every slice comes in only so many forms, each drawn once for all epochs; None: in a new one each time."""

    def __post_init__(self) -> None:
        if self.variants is not None and self.variants < 1:
            raise ConfigError(f"augmentation_variants is {self.variants}: expected at least 1, or None.")


@dataclass(frozen=True)
class TaskShares:
    """Which tasks a `PretrainingDataset` draws, and what it shows of the images."""

    synthetic_probability: float = 0.0
    """Share of episodes of invented anatomies. As the next two a synthetic task, see `sam2sgp.episodes.synthetic`; the
    rest are labelled targets."""

    superpixel_probability: float = 0.0
    """Share of episodes whose target is a superpixel."""

    threshold_probability: float = 0.0
    """Share of episodes whose target is a band of intensity."""

    label_operation_probability: float = 0.0
    """Share of labelled targets of which an edge, a part, a wider, narrower or filled form is asked for."""

    region_probability: float = 0.0
    """Share of episodes that show a region around the target instead of the whole image."""

    crop_probability: float = 0.0
    """Share of episodes that show one random part of the images."""
