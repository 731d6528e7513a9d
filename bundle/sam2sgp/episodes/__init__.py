"""Training data: cases prepared once, and the episodes drawn from them."""

from sam2sgp.episodes.case_cache import CaseCache, PreparedCase
from sam2sgp.episodes.dataset import EpisodeDataset, EpisodeSampler
from sam2sgp.episodes.pretraining import PretrainingDataset, load_collection

__all__ = ["CaseCache", "EpisodeDataset", "EpisodeSampler", "PreparedCase", "PretrainingDataset", "load_collection"]
