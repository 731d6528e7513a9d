"""Preprocessing of images and labels, and the way back to the query's own grid."""

from sam2sgp.transforms.array import (
    Letterbox,
    class_probabilities,
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
    "Letterbox",
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
    "choose_scaling",
    "class_probabilities",
    "is_open",
    "label_map",
    "scale_intensity",
    "to_three_channels",
    "uncertainty",
]
