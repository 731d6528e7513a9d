"""Support-set guided segmentation of medical images: SAM2-SGP (arXiv 2506.19658) for MONAI."""

__version__ = "0.1.0"
