"""The support set: its items, what the network makes of them, and which of them guide which query."""

from sam2sgp.support.bank import Changes, Retrieved, SupportBank, shared_support_bank
from sam2sgp.support.items import SupportItem
from sam2sgp.support.sampler import EpisodeSupportSampler, SupportSampler

__all__ = [
    "Changes",
    "EpisodeSupportSampler",
    "Retrieved",
    "SupportBank",
    "SupportItem",
    "SupportSampler",
    "shared_support_bank",
]
