"""The SAM2-SGP network, its parts and its weights."""

from sam2sgp.networks.backbones import BACKBONES, build_sam2
from sam2sgp.networks.checkpoints import fetch_checkpoint, load_sam2_checkpoint
from sam2sgp.networks.features import ImageFeatures, SGPOutput, SupportMemory
from sam2sgp.networks.lite import load_imagenet
from sam2sgp.networks.lora import load_lora, lora_layers
from sam2sgp.networks.pretraining_start import parameter_groups, start_pretraining
from sam2sgp.networks.sam2_sgp import SAM2SGP
from sam2sgp.networks.states import identify_backbone
from sam2sgp.networks.weights import load_weights, merge_lora, save_lora, save_weights

__all__ = [
    "BACKBONES",
    "SAM2SGP",
    "ImageFeatures",
    "SGPOutput",
    "SupportMemory",
    "build_sam2",
    "fetch_checkpoint",
    "identify_backbone",
    "load_imagenet",
    "load_lora",
    "load_sam2_checkpoint",
    "load_weights",
    "lora_layers",
    "merge_lora",
    "parameter_groups",
    "save_lora",
    "save_weights",
    "start_pretraining",
]
