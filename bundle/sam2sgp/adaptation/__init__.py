"""Adaptation to a support set before inference."""

from sam2sgp.adaptation.adapter import Adaptation, Adapter, adapt

__all__ = ["Adaptation", "Adapter", "adapt"]
