"""Measures of a segmentation against its truth, and tables of them."""

from sam2sgp.evaluation.metrics import (
    METRICS,
    case_metrics,
    class_sizes,
    summarise,
    worst_and_best,
    write_csv,
)

__all__ = ["METRICS", "case_metrics", "class_sizes", "summarise", "worst_and_best", "write_csv"]
