"""The training step's forward pass runs in the precision asked for."""

import pytest
import torch

from sam2sgp.inferers.episode import EpisodeInferer


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_network_computes_in_it_and_the_loss_in_single_precision(precision, dtype):
    seen, layer = [], torch.nn.Linear(4, 2)

    def network(inputs, scale):
        seen.append(layer(inputs).dtype)
        return {"logits": scale * layer(inputs)}

    found = EpisodeInferer(precision)(torch.ones(3, 4), network, scale=2)["logits"]
    assert seen == [dtype] and found.dtype == torch.float32
    torch.testing.assert_close(found, 2 * layer(torch.ones(3, 4)), atol=0.05, rtol=0.02)
