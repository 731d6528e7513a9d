"""Training data: cases prepared once, and the episodes drawn from them."""

from sam2sgp.episodes.case_cache import CachedCase, CaseCache
from sam2sgp.episodes.dataset import EpisodeDataset, EpisodeSampler
from sam2sgp.episodes.pretraining import PretrainingDataset, load_collection
from sam2sgp.episodes.settings import Augmentation, EpisodeSettings, TaskShares

__all__ = [
    "Augmentation",
    "CachedCase",
    "CaseCache",
    "EpisodeDataset",
    "EpisodeSampler",
    "EpisodeSettings",
    "PretrainingDataset",
    "TaskShares",
    "load_collection",
]
