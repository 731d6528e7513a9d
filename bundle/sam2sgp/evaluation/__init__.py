"""Measures of a segmentation against its truth, and tables of them."""

from sam2sgp.evaluation.metrics import (
    METRICS,
    case_metrics,
    class_sizes,
    summarise,
    write_csv,
)
from sam2sgp.evaluation.overlap import dice_of_values

__all__ = ["METRICS", "case_metrics", "class_sizes", "dice_of_values", "summarise", "write_csv"]
