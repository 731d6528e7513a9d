"""A network whose features are the image and whose memory of a mask is the mask."""

import torch
from torch import Tensor

from sam2sgp.networks import ImageFeatures, SupportMemory

SIZE = 8


class StubNetwork(torch.nn.Module):
    """Subclasses say what it segments. Counts what it encodes, and the most that it segments at a time."""

    image_size = SIZE

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.encoded = 0
        self.most = 0

    def encode(self, image: Tensor) -> ImageFeatures:
        self.encoded += len(image)
        return ImageFeatures(image, image, (image, image), None, None)

    def retrieval_embedding(self, features: ImageFeatures) -> Tensor:
        return torch.ones(len(features), 1)

    def encode_support(self, features: ImageFeatures, masks: Tensor) -> SupportMemory:
        return SupportMemory(masks.flatten(2)[:, :, None], None, None, None, None)
