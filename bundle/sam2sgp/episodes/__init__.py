"""Training data: cases prepared once, and the episodes drawn from them."""

from sam2sgp.episodes.case_cache import CachedCase, CaseCache
from sam2sgp.episodes.dataset import EpisodeDataset, EpisodeSampler
from sam2sgp.episodes.pretraining import PretrainingDataset, load_collection

__all__ = ["CaseCache", "EpisodeDataset", "EpisodeSampler", "CachedCase", "PretrainingDataset", "load_collection"]
