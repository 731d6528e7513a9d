"""A batch of episodes as arguments of `SAM2SGP.forward`."""

import torch
from monai.engines.utils import PrepareBatch

from sam2sgp.support.sampler import EpisodeSupportSampler


class PrepareEpisodes(PrepareBatch):
    """Flatten E episodes of G images and let the sampler choose the support of each image.

    Args:
        sampler: chooses among the images of a query's episode.
    """

    def __init__(self, sampler: EpisodeSupportSampler) -> None:
        self.sampler = sampler

    def __call__(self, batchdata, device=None, non_blocking=False, **kwargs):
        """Batch of `EpisodeDataset` items -> (images (E*G, 3, S, S), masks (E*G, 1, S, S), (), network arguments)."""
        label = batchdata["label"]
        index = self.sampler(batchdata["patient"], label.flatten(2).amax(2) > 0, int(batchdata["seed"][0]))
        image, label = (
            batchdata[key].flatten(0, 1).to(device=device, non_blocking=non_blocking) for key in ("image", "label")
        )
        network_arguments = {"support_label": label, "support_index": torch.as_tensor(index, device=device)}
        if "frame_index" in batchdata:
            frames = batchdata["frame_index"]
            first = torch.arange(len(frames))[:, None, None] * frames.shape[1]
            frames = torch.where(frames < 0, frames, frames + first)
            network_arguments["frame_index"] = frames.flatten(0, 1).to(device)
            network_arguments["frame_distance"] = batchdata["frame_distance"].flatten(0, 1).to(device)
        return image, label, (), network_arguments
