"""Features of queries, so that a second request on the same image skips the encoder.

In: images as the network gets them, and a fingerprint of the network. Out: the very features that were computed for
them the first time. For one thread at a time.
"""

from typing import Any

from torch import Tensor

from sam2sgp.networks import SAM2SGP, ImageFeatures
from sam2sgp.support.content import digest_of, precision
from sam2sgp.support.lru import ByteLRU
from sam2sgp.support.tensor_store import checksum


class QueryCache:
    """Features of the images used last, on the device they were computed on.

    Args:
        megabytes: bound of all features together, in MiB.

    Raises:
        ConfigError: `megabytes` is not a number of at least 0.
    """

    def __init__(self, megabytes: float = 256) -> None:
        self.recent = ByteLRU(megabytes, _size)

    def __call__(self, image: Tensor, network: SAM2SGP, fingerprint: str | None) -> ImageFeatures:
        """Features of images (B, 3, S, S) in [0, 1]; nobody may change them in place.

        Args:
            network: in evaluation mode.
            fingerprint: of the network, see `SupportBank.fingerprint`.
        """
        where = fingerprint, precision(image.device)
        keys = [digest_of(checksum({"image": row}), *where) for row in image]
        rows: dict[str, Any] = {key: self.recent.get(key) for key in keys}
        new = {key: number for number, key in enumerate(keys) if rows[key] is None}
        if new:
            encoded = network.encode(image[list(new.values())])
            for number, key in enumerate(new):
                # A row that shared its storage with the batch would keep all of it.
                rows[key] = encoded if len(new) == 1 else encoded[[number]]
                self.recent[key] = rows[key]
            if len(new) == len(keys):
                return encoded
        return rows[keys[0]] if len(keys) == 1 else ImageFeatures.concatenate([rows[key] for key in keys])


def _size(features: ImageFeatures) -> int:
    """Bytes of all tensors, each counted with the whole storage that it keeps."""
    values = [value for field in vars(features).values() for value in (field if isinstance(field, tuple) else (field,))]
    storages = [value.untyped_storage() for value in values if value is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
