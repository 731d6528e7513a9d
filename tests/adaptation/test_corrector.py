"""What a corrector is before it is trained, and what it reads of the network."""

import pytest
import torch

from sam2sgp.adaptation.corrector import LIMIT, Corrector, Trunk, bounded


def test_logits_are_bounded_in_order_and_with_their_sign():
    logits = torch.tensor([-100.0, -4.0, -0.1, 0.0, 0.1, 4.0])
    found = bounded(logits)
    assert found.abs().max() <= LIMIT and (found.diff() > 0).all() and torch.equal(found.sign(), logits.sign())
    torch.testing.assert_close(found[2:5], logits[2:5], atol=1e-3, rtol=0)


@pytest.mark.parametrize("shape", [(64, 64), (70, 33)])
def test_a_new_corrector_changes_nothing_and_a_trained_one_reads_image_and_logits(network, shape):
    torch.manual_seed(0)
    corrector = Corrector(Trunk(network), 2).eval()
    image, found = torch.rand(1, 3, *shape), torch.rand(1, 2, *shape)
    assert torch.equal(corrector(image, found), found)
    torch.nn.init.normal_(corrector.head.weight)
    changed = corrector(image, found) - found
    assert changed.shape == found.shape
    for other in (corrector(1 - image, found) - found, corrector(image, -found) + found):
        assert (other - changed).abs().max() > 1e-3


def test_the_trunk_belongs_to_the_network_and_is_not_trained(network):
    corrector = Corrector(Trunk(network), 1)
    own = {id(parameter) for parameter in network.parameters()}
    assert not own & {id(parameter) for parameter in corrector.parameters()}
    torch.nn.init.normal_(corrector.head.weight)
    corrector(torch.rand(1, 3, 64, 64), torch.zeros(1, 1, 64, 64)).sum().backward()
    assert all(parameter.grad is None for parameter in network.parameters())
    assert corrector.blocks[0].layers[0].weight.grad.abs().sum() > 0
