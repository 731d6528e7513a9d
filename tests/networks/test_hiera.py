"""SAM2's encoder in less memory: blocks in bands, and no positional encodings that nobody asks for."""

import pytest
import torch
from sam2.modeling.backbones.hieradet import MultiScaleBlock
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sam2sgp.networks import SAM2SGP, hiera
from sam2sgp.networks.hiera import BandedBlock, in_bands


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = function(*args, **kwargs)
        given = {leaf.untyped_storage().data_ptr() for leaf in _tensors([args, kwargs])}
        made = [leaf for leaf in _tensors(found) if leaf.untyped_storage().data_ptr() not in given]
        self.bytes = max([self.bytes, *(leaf.nbytes for leaf in made)])
        return found


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


# At 36 rows, the last one of a window of 8 is half outside.
@pytest.mark.parametrize(("window", "pool", "rows"), [(8, None, 32), (8, (2, 2), 32), (8, None, 36), (8, (2, 2), 36)])
@torch.inference_mode()
def test_a_block_in_bands_gives_what_it_gives_in_one_go(monkeypatch, window, pool, rows):
    torch.manual_seed(0)
    block = MultiScaleBlock(16, 32, num_heads=2, q_stride=pool, window_size=window).eval()
    x = torch.randn(2, rows, 24, 16)
    expected = block(x)
    in_bands(block)
    heights = []
    block.norm1.register_forward_pre_hook(lambda _, inputs: heights.append(inputs[0].shape[1]))
    monkeypatch.setattr(hiera, "BAND_BYTES", 2 * window * 2 * 24 * 128 * 4)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-5)
    assert heights == [16, 16] + [4] * (rows == 36)
    assert expected.std() > 0.1


@torch.inference_mode()
def test_a_block_in_which_all_places_attend_to_each_other_stays_whole(monkeypatch):
    torch.manual_seed(0)
    block = MultiScaleBlock(16, 16, num_heads=2).eval()
    x = torch.randn(1, 8, 8, 16)
    expected = block(x)
    in_bands(block)
    monkeypatch.setattr(hiera, "BAND_BYTES", 1)
    assert type(block) is BandedBlock
    assert torch.equal(block(x), expected)


def test_without_gradients_no_tensor_of_the_encoder_is_larger_than_its_finest_level(monkeypatch):
    monkeypatch.setattr(hiera, "BAND_BYTES", 2**20)
    torch.manual_seed(0)
    network = SAM2SGP("tiny", 256, lora={"r": 2, "alpha": 2}).eval()
    image = torch.rand(1, 3, 256, 256)
    finest = 256 * 64 * 64 * 4
    with torch.no_grad(), LargestTensor() as largest:
        found = network.encode(image)
    assert largest.bytes == finest
    with LargestTensor() as whole:
        expected = network.encode(image)
    assert whole.bytes > finest
    torch.testing.assert_close(found.embedding, expected.embedding, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_only_the_embeddings_positions_are_encoded():
    network = SAM2SGP("nano", 64).eval()
    found = network.encode(torch.rand(1, 3, 64, 64))
    assert list(network.position_encoding.cache) == [(8, 8)]
    assert found.position.shape == found.embedding.shape
