"""Preprocessing of images and labels, and the way back to the query's own grid."""

from sam2sgp.transforms.array import (
    Fit,
    class_probabilities,
    fused_logits,
    label_map,
    scale_intensity,
    to_three_channels,
    uncertainty,
)
from sam2sgp.transforms.dictionary import (
    FitToSquared,
    LoadCased,
    OutputNames,
    SaveDicomSegd,
    SaveLabeld,
    SaveMapsd,
    ScaleIntensityByModalityd,
    along_axis,
)

__all__ = [
    "Fit",
    "FitToSquared",
    "LoadCased",
    "OutputNames",
    "SaveDicomSegd",
    "SaveLabeld",
    "SaveMapsd",
    "ScaleIntensityByModalityd",
    "along_axis",
    "class_probabilities",
    "fused_logits",
    "label_map",
    "scale_intensity",
    "to_three_channels",
    "uncertainty",
]
