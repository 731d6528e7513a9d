"""MONAI inferers: episodes in training, a support bank in inference."""

from sam2sgp.inferers.episode import EpisodeInferer
from sam2sgp.inferers.support_set import SupportSetInferer
from sam2sgp.inferers.volume import VolumeMemory

__all__ = ["EpisodeInferer", "SupportSetInferer", "VolumeMemory"]
