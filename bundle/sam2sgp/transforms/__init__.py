"""Preprocessing of images and labels, and the way back to the query's own grid."""

from sam2sgp.transforms.array import Fit, label_map, scale_intensity, to_three_channels
from sam2sgp.transforms.dictionary import FitToSquared, LoadCased, SaveLabeld, ScaleIntensityByModalityd

__all__ = [
    "Fit",
    "FitToSquared",
    "LoadCased",
    "SaveLabeld",
    "ScaleIntensityByModalityd",
    "label_map",
    "scale_intensity",
    "to_three_channels",
]
