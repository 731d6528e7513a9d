"""A batch of episodes becomes one batch of images, whose support stays in its episode."""

import numpy as np
import torch

from sam2sgp.engines.prepare import PrepareEpisodes


def batch(episodes: int = 2, images: int = 3, size: int = 4) -> dict:
    label = torch.zeros(episodes, images, 1, size, size)
    label[:, :2, :, 1:3] = 1
    image = torch.arange(episodes * images).view(episodes, images, 1, 1, 1).expand(-1, -1, 3, size, size)
    return {"image": image.float(), "label": label, "patient": torch.zeros(episodes, images), "seed": torch.tensor([7])}


def test_images_and_labels_are_flattened_in_order_and_the_sampler_sees_what_holds_the_target():
    seen = []

    def sampler(patient, holds, seed):
        seen.append((patient.shape, holds.tolist(), seed))
        return np.arange(12).reshape(6, 2)

    images, label, arguments, more = PrepareEpisodes(sampler)(batch(), torch.device("cpu"))
    assert images.shape == (6, 3, 4, 4) and images[:, 0, 0, 0].tolist() == list(range(6)) and arguments == ()
    assert seen == [((2, 3), [[True, True, False]] * 2, 7)]
    assert torch.equal(more["support_label"], label) and more["support_index"].tolist()[5] == [10, 11]
    assert "frame_index" not in more


def test_neighbouring_slices_are_numbered_within_the_whole_batch_and_none_stays_none():
    frames = torch.tensor([[[-1, 1], [0, 2], [1, -1]]]).expand(2, -1, -1)
    given = batch() | {"frame_index": frames, "frame_distance": torch.ones(2, 3, 2, dtype=torch.long)}
    *_, more = PrepareEpisodes(lambda *_: np.zeros((6, 1), int))(given, torch.device("cpu"))
    assert more["frame_index"].tolist() == [[-1, 1], [0, 2], [1, -1], [-1, 4], [3, 5], [4, -1]]
    assert more["frame_distance"].shape == (6, 2)
