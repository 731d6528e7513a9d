"""Classes as a batch dimension."""

import torch

from sam2sgp.networks.rows import for_each_class


def test_rows_of_an_image_are_adjacent_and_their_gradients_add_up():
    values = torch.rand(3, 2, 4, requires_grad=True)
    assert torch.equal(for_each_class(values, 5), values.repeat_interleave(5, 0))
    for_each_class(values, 5).sum().backward()
    assert torch.equal(values.grad, torch.full_like(values, 5.0))
    assert for_each_class(values, 1).data_ptr() == values.data_ptr()
