"""Training on features of a frozen encoder that are computed once.

    normalised images ─ hash ─┬─ found ───────────────────┬─ trunk's levels ─ neck, and all that is trained
                              └─ frozen trunk, on disk ───┘

An image's features are found by its content, so augmentation and the cache exclude each other unless an image comes
again in the same form: `Augmentation.variants` sees to that.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from sam2sgp.episodes.dataset import EpisodeDataset
from sam2sgp.errors import ConfigError
from sam2sgp.networks import SAM2SGP
from sam2sgp.support.content import digest_of, precision
from sam2sgp.support.tensor_store import TensorStore, checksum

logger = logging.getLogger(__name__)


class TrunkCache:
    """Levels of a frozen Hiera trunk by the content of the image, on disk and in memory.

    Args:
        directory: folder; may be deleted when no training runs.
        megabytes: MiB of levels held in memory.
    """

    def __init__(self, directory: str | Path, megabytes: float) -> None:
        self.store = TensorStore(directory, megabytes)
        self.found = self.computed = 0
        self._trunk: str | None = None

    def __call__(self, image: Tensor, trunk: nn.Module) -> list[Tensor]:
        """Levels [(B, D_i, S / 2^i, S / 2^i), …] of normalised images (B, 3, S, S); only new images are computed."""
        if self._trunk is None:
            self._trunk = checksum(trunk.state_dict())
        settings = self._trunk, precision(image.device)
        names = [f"trunk/{digest_of(checksum({'image': one}), *settings)}" for one in image]
        known: list[Any] = [self.store.read(name) for name in names]
        new = [number for number, levels in enumerate(known) if levels is None]
        self.found += len(names) - len(new)
        self.computed += len(new)
        if new:
            with torch.no_grad():
                levels = trunk(image[new])
            for row, number in enumerate(new):
                known[number] = {str(i): level[row].cpu().contiguous() for i, level in enumerate(levels)}
                self.store.write(names[number], known[number])
        stacked = (torch.stack([levels[str(i)] for levels in known]) for i in range(len(known[0])))
        return [level.to(image.device, non_blocking=True) for level in stacked]


class CachedFeatures:
    """Let a network train on cached features of its frozen encoder.

    Args:
        network: whose trunk is not trained: `freeze_encoder`, and no LoRA.
        dataset: what it is trained on.
        directory, megabytes: see `TrunkCache`.

    Raises:
        ConfigError: the trunk is trained, or the images never repeat.
    """

    def __init__(self, network: SAM2SGP, dataset: EpisodeDataset, directory: str | Path, megabytes: float) -> None:
        trunk = network.image_encoder.trunk
        if any(parameter.requires_grad for parameter in trunk.parameters()):
            raise ConfigError(
                "feature_cache is set, but the encoder is trained, so its features change; set `freeze_encoder` to "
                "True and `lora` to None, or `feature_cache` to False."
            )
        if not dataset.images_repeat:
            raise ConfigError(
                "feature_cache is set, but augmentation makes every image a new one; set `augmentation_variants` to "
                "the number of forms that each image may have, or `feature_cache` to False."
            )
        self.network = network
        self.cache = TrunkCache(directory, megabytes)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._tell)
        engine.add_event_handler(Events.COMPLETED | Events.TERMINATE, self._end)

    def _start(self) -> None:
        self.network.trunk_cache = self.cache

    def _tell(self) -> None:
        logger.info("Features: %d images from the cache, %d encoded.", self.cache.found, self.cache.computed)

    def _end(self) -> None:
        self.network.trunk_cache = None
