"""Training and evaluation engines' parts: loss, batch preparation, evaluator and handlers."""

from sam2sgp.engines.evaluator import (
    CaseDice,
    EpisodeDice,
    QueryDataset,
    QueryEvaluator,
    QueryEvents,
    class_maps,
    episode_masks,
    first,
)
from sam2sgp.engines.handlers import (
    EpochStart,
    GradientClipping,
    LearningRateSchedule,
    MovingAverage,
    PaddedSteps,
    ResumableCheckpoint,
    TrainingProgress,
    growing_average,
    warmup_stable_decay,
)
from sam2sgp.engines.job import SegmentationJob, adapted
from sam2sgp.engines.loss import SGPLoss
from sam2sgp.engines.prepare import PrepareEpisodes
from sam2sgp.engines.results import ResultWriter
from sam2sgp.engines.trunk_cache import CachedFeatures, TrunkCache

__all__ = [
    "CachedFeatures",
    "CaseDice",
    "EpisodeDice",
    "EpochStart",
    "GradientClipping",
    "LearningRateSchedule",
    "MovingAverage",
    "PaddedSteps",
    "PrepareEpisodes",
    "QueryDataset",
    "QueryEvaluator",
    "QueryEvents",
    "ResultWriter",
    "ResumableCheckpoint",
    "SGPLoss",
    "SegmentationJob",
    "TrainingProgress",
    "TrunkCache",
    "adapted",
    "class_maps",
    "episode_masks",
    "first",
    "growing_average",
    "warmup_stable_decay",
]
