"""The refinement corrects nothing at first, and convolves what classes share once."""

import pytest
import torch
from monai.networks.blocks.dynunet_block import UnetResBlock

from sam2sgp.networks.refinement import ClassesBlock, Refinement, _block
from tests.helpers.small_network import SIZE, network, square_masks


def test_a_new_refinement_changes_nothing(images):
    support, masks = torch.rand(4, 3, SIZE, SIZE), square_masks(4)
    on, off = network(), network(refinement=False)
    off.load_state_dict({k: v for k, v in on.state_dict().items() if "refinement" not in k})
    torch.testing.assert_close(on(images, support, masks), off(images, support, masks))


@pytest.mark.parametrize("image_first", [True, False])
def test_what_classes_share_is_convolved_once_with_the_same_result(image_first):
    torch.manual_seed(0)
    block = _block(ClassesBlock, 8 + 3, 8).eval()
    image, own = torch.rand(2, 8, 6, 6), torch.rand(6, 3, 6, 6)
    if not image_first:
        image, own = torch.rand(2, 3, 6, 6), torch.rand(6, 8, 6, 6)
    repeated = image.repeat_interleave(3, 0)
    both = torch.cat([repeated, own] if image_first else [own, repeated], 1)
    torch.testing.assert_close(block(image, own, image_first), UnetResBlock.forward(block, both))


def test_a_correction_depends_on_the_maps_the_logits_and_the_image():
    torch.manual_seed(0)
    net = Refinement(8, 2, (4, 8, 8)).eval()
    torch.nn.init.normal_(net.head.weight)
    given = {
        "levels": [torch.rand(2, 8, 2, 2), torch.rand(2, 8, 4, 4), torch.rand(2, 4, 8, 8)],
        "maps": torch.rand(2, 2, 8, 8),
        "pseudo": torch.randn(2, 1, 8, 8),
        "logits": torch.randn(2, 1, 8, 8),
    }
    before = net(**given)
    assert before.shape == (2, 1, 8, 8)
    for name in ("maps", "pseudo", "logits"):
        assert (net(**given | {name: -given[name]}) - before).abs().max() > 1e-3, name
    for number, level in enumerate(given["levels"]):
        levels = [-level if n == number else other for n, other in enumerate(given["levels"])]
        assert (net(**given | {"levels": levels}) - before).abs().max() > 1e-3, number
