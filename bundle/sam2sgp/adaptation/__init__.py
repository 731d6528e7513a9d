"""Adaptation to a support set before inference."""

from sam2sgp.adaptation.support_adaptation import Adaptation, SupportAdaptation, adapt

__all__ = ["Adaptation", "SupportAdaptation", "adapt"]
