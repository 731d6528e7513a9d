"""Adaptation of the network to a support set before inference."""

from sam2sgp.adaptation.adapter import Adaptation, Adapter, adapt
from sam2sgp.adaptation.lora import load_adapted

__all__ = ["Adaptation", "Adapter", "adapt", "load_adapted"]
