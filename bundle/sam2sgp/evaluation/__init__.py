"""Measures of a segmentation against its truth, and tables of them."""

from sam2sgp.evaluation.metrics import (
    METRICS,
    case_metrics,
    class_sizes,
    summarise,
    write_csv,
)

__all__ = ["METRICS", "case_metrics", "class_sizes", "summarise", "write_csv"]
