"""Memory attention: the same as SAM2's, also on coarser memory and for many classes at once."""

import pytest
import torch

from sam2sgp.errors import ConfigError
from sam2sgp.networks import SAM2SGP, memory_attention
from sam2sgp.networks.memory_attention import attend_to_memory, rotation

SIZE = 64


def network(**settings) -> SAM2SGP:
    torch.manual_seed(0)
    return SAM2SGP("nano", SIZE, **settings).eval()


def memory(net: SAM2SGP, batch: int, classes: int, items: int, places: int) -> torch.Tensor:
    return torch.randn(batch, classes, items, net.memory_encoder.out_proj.out_channels, places)


@torch.no_grad()
def test_result_equals_sam2s_own_module():
    net = network()
    side = SIZE // 8
    embedding, position = torch.randn(2, 96, side, side), torch.randn(2, 96, side, side)
    tokens, encoding = (memory(net, 2, 3, 4, side**2) for _ in range(2))
    found = attend_to_memory(net.memory_attention, embedding, position, tokens, encoding)
    rows = [values.repeat_interleave(3, 0).flatten(2).permute(2, 0, 1) for values in (embedding, position)]
    ours = [values.permute(2, 4, 0, 1, 3).flatten(2, 3).flatten(0, 1) for values in (tokens, encoding)]
    expected = net.memory_attention(rows[0], ours[0], rows[1], ours[1])
    torch.testing.assert_close(found.flatten(2).permute(2, 0, 1), expected, atol=1e-5, rtol=1e-5)


def test_a_pooled_token_lies_at_the_centre_of_its_places():
    cross = network().memory_attention.layers[0].cross_attn_image
    angles = [rotation(8, pool, cross, torch.device("cpu")).angle() for pool in (1, 2)]
    # The slower frequencies, which do not turn around within the grid, are linear in the place.
    slow = slice(6, 12)
    mean = angles[0].unflatten(0, (4, 2, 4, 2)).mean((1, 3)).flatten(0, 1)
    torch.testing.assert_close(angles[1][:, slow], mean[:, slow])


@torch.no_grad()
def test_pooling_constant_memory_changes_nothing_but_its_size():
    plain, pooled = network(), network(memory_pool=4)
    pooled.load_state_dict(plain.state_dict())
    for net in (plain, pooled):  # positions set aside, four equal tokens weigh as much as their mean
        for layer in net.memory_attention.layers:
            layer.cross_attn_image.k_proj.weight.zero_()
    image, support = torch.rand(2, 3, SIZE, SIZE), torch.rand(3, 3, SIZE, SIZE)
    masks = torch.zeros(3, 2, SIZE, SIZE)
    masks[:, 0, :20], masks[:, 1, 30:] = 1, 1
    found = [net.encode_support(net.encode(support), masks) for net in (plain, pooled)]
    assert [memory.tokens.shape[-1] for memory in found] == [64, 4]
    torch.testing.assert_close(plain(image, support, masks), pooled(image, support, masks), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_pooled_memory_is_read_at_its_places():
    net = network(memory_pool=2)
    image, support = torch.rand(1, 3, SIZE, SIZE), torch.rand(3, 3, SIZE, SIZE)
    masks = torch.zeros(3, 1, SIZE, SIZE)
    masks[..., :20] = 1
    features, pool = net.encode(image), net.encode_support(net.encode(support), masks)
    index = torch.tensor([[[0, 1, 2]]])
    found = net._condition(features, pool.select(index), 1)
    pool.tokens = pool.tokens.flip(-1)
    assert (net._condition(features, pool.select(index), 1) - found).abs().max() > 1e-3


@pytest.mark.parametrize("pool", [0.5, 3, -1, True])
def test_a_pool_that_does_not_divide_the_grid_is_an_error(pool):
    with pytest.raises(ConfigError, match="memory_pool"):
        network(memory_pool=pool)


@torch.no_grad()
def test_averaging_narrow_memory_first_changes_nothing(monkeypatch):
    torch.manual_seed(0)
    net = SAM2SGP("tiny", SIZE).eval()
    side = SIZE // 16
    embedding, position = torch.randn(2, 256, side, side), torch.randn(2, 256, side, side)
    tokens, encoding = (torch.randn(2, 3, 4, 64, side**2) for _ in range(2))
    averaged = []
    own = memory_attention._average_first
    monkeypatch.setattr(memory_attention, "_average_first", lambda *args: averaged.append(1) or own(*args))
    monkeypatch.setattr(memory_attention, "WEIGHT_BYTES", 6 * 4 * 64 * 5)  # five queries at a time
    arguments = (net.memory_attention, embedding, position, tokens, encoding)
    found = attend_to_memory(*arguments)
    assert len(averaged) == len(net.memory_attention.layers)
    with torch.enable_grad():
        expected = attend_to_memory(*arguments)
    assert len(averaged) == len(net.memory_attention.layers)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
