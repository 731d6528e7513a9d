"""What an inferer asks of an adaptation to its support set.

`sam2sgp.adaptation` has it, and builds on inferers; they know it by these methods only.
"""

from typing import Protocol

from monai.inferers import Inferer
from torch import Tensor

from sam2sgp.networks import SAM2SGP
from sam2sgp.support.bank import SupportBank


class UsableAdaptation(Protocol):
    """What was learned from a support set."""

    @property
    def owners(self) -> list[str]:
        """The group of each item of the support set."""

    def average(self, logits: Tensor, images: Tensor, pixel: tuple[float, float], distance: Tensor) -> Tensor:
        """The network's logits (B, C, H, W) averaged with those of the adaptation."""

    def refuse(self, patient: str | None, bank: SupportBank) -> None:
        """Raise `ConfigError` where a patient's own labels must not guide, but were learned from."""

    def content(self) -> list:
        """As JSON types what decides its results."""


class AdaptationMaker(Protocol):
    """Makes an adaptation, where it has a limit of time or steps."""

    def __call__(self, network: SAM2SGP, inferer: Inferer) -> UsableAdaptation | None:
        """The adaptation to the inferer's bank."""
