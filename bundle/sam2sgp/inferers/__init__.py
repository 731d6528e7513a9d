"""MONAI inferers: episodes in training, a support bank in inference; and from a case to its result."""

from sam2sgp.inferers.case import CaseResult, CaseSegmenter, prepare_case
from sam2sgp.inferers.episode import EpisodeInferer
from sam2sgp.inferers.settings import InferenceSettings
from sam2sgp.inferers.support_set import SupportSetInferer
from sam2sgp.inferers.volume import VolumeMemory

__all__ = [
    "CaseResult",
    "CaseSegmenter",
    "EpisodeInferer",
    "InferenceSettings",
    "SupportSetInferer",
    "VolumeMemory",
    "prepare_case",
]
