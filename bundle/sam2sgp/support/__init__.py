"""The support set: its items, what the network makes of them, and which of them guide which query."""

from sam2sgp.support.bank import Changes, Retrieved, SupportBank, shared_support_bank
from sam2sgp.support.catalogue import ItemRules
from sam2sgp.support.fingerprint import SupportFingerprint, TargetFingerprint, fingerprint
from sam2sgp.support.items import SupportItem
from sam2sgp.support.sampler import EpisodeSupportSampler, SupportSampler
from sam2sgp.support.tensor_store import TensorStore

__all__ = [
    "Changes",
    "EpisodeSupportSampler",
    "ItemRules",
    "Retrieved",
    "SupportBank",
    "SupportFingerprint",
    "SupportItem",
    "SupportSampler",
    "TargetFingerprint",
    "TensorStore",
    "fingerprint",
    "shared_support_bank",
]
