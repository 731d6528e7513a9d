"""The support set: its items, their cached encoding, and the choice among them."""

from sam2sgp.support.bank import Retrieved, SupportBank, SupportItem
from sam2sgp.support.sampler import EpisodeSupportSampler, SupportSampler

__all__ = ["EpisodeSupportSampler", "Retrieved", "SupportBank", "SupportItem", "SupportSampler"]
