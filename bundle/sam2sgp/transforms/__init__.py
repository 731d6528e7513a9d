"""Preprocessing of images and labels, and the way back to the query's own grid."""

from sam2sgp.transforms.array import (
    Fit,
    class_probabilities,
    fused_logits,
    label_map,
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
from sam2sgp.transforms.scaling import (
    Scaling,
    SupportScaling,
    agreed,
    choose_scaling,
    is_open,
    scale_intensity,
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
    "Scaling",
    "SupportScaling",
    "agreed",
    "along_axis",
    "choose_scaling",
    "class_probabilities",
    "fused_logits",
    "is_open",
    "label_map",
    "scale_intensity",
    "to_three_channels",
    "uncertainty",
]
