"""Active learning: how much the support set leaves open about an image, and which image to label next."""

from sam2sgp.active.choice import STRATEGIES, choose
from sam2sgp.active.coverage import distances, k_centre, represent
from sam2sgp.active.examine import ImageScore, embed, examine

__all__ = ["STRATEGIES", "ImageScore", "choose", "distances", "embed", "examine", "k_centre", "represent"]
