"""The support prior carries the support's masks to where the query looks alike."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from sam2sgp.networks.support_prior import SupportPrior
from tests.helpers.small_network import network, square_masks


def test_prior_carries_the_mask_of_an_identical_support_image(images):
    """With the query itself as the only support, the match must find the mask again."""
    net = network()
    net.prior.log_temperature.data.fill_(6.0)
    features = net.encode(images[:1])
    mask = square_masks(1)
    memory = net.encode_support(features, mask).select(torch.zeros(1, 1, 1, dtype=torch.long))
    match = net.prior(features.prior_key, memory.prior_key, memory.prior_mask)
    truth = torch.nn.functional.avg_pool2d(mask, 4)
    assert (match[0, 0] - truth.flatten()).abs().mean() < 0.15
    maps = net._support_maps(features, memory)
    torch.testing.assert_close(maps[0, 3], torch.nn.functional.avg_pool2d(mask, 2)[0, 0])


@torch.no_grad()
def test_an_image_that_guides_several_classes_is_compared_with_once(images, monkeypatch):
    """Whatever items the classes share; slices of the own volume, that have a class's mask of their own, among them."""
    net = network()
    features = net.encode(images)
    masks = (torch.rand(5, 4, 64, 64, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    index = torch.tensor([[[0, 1], [0, 1], [1, 2], [2, 0]], [[3, 4], [4, 3], [3, 4], [4, 4]]])
    pool = net.encode_support(features, masks)
    memory = pool.select(index)
    frames = pool.select(index[:, :1, :1].expand(-1, 4, -1))
    memory = memory.beside(replace(frames, item=-1 - frames.item))
    query = features[:2]
    fused = net.prior(query.prior_key, memory.prior_key, memory.prior_mask)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    once = net.prior(query.prior_key, memory.prior_key, memory.prior_mask, memory.item)
    torch.testing.assert_close(once, fused, rtol=1e-5, atol=1e-6)
    assert (once[0, 0] - once[0, 2]).abs().max() > 0.01
    # Where nothing is shared, or numbers would not fit into a float, PyTorch's fused attention is called.
    with pytest.raises(TypeError):
        net.prior(query.prior_key, memory.prior_key, memory.prior_mask, torch.arange(24).reshape(2, 4, 3))
    net.prior.log_temperature.data.fill_(4.0)
    with pytest.raises(TypeError):
        net.prior(query.prior_key, memory.prior_key, memory.prior_mask, memory.item)


def test_a_match_is_the_mean_of_the_masks_weighted_by_similarity():
    """The equation of the module, computed in the open."""
    torch.manual_seed(0)
    prior = SupportPrior(8, dim=4)
    query, support = (F.normalize(torch.randn(*shape), dim=-1) for shape in ((2, 16, 4), (2, 3, 5, 4, 4)))
    masks = torch.rand(2, 3, 5, 64)
    found = prior(query, support, masks)
    coarse = F.avg_pool2d(masks.unflatten(-1, (8, 8)).flatten(0, 2), 4).reshape(2, 3, 20)
    weights = (30.0 * torch.einsum("bpd,bcnd->bcpn", query, support.flatten(2, 3))).softmax(-1)
    torch.testing.assert_close(found, torch.einsum("bcpn,bcn->bcp", weights, coarse), atol=1e-5, rtol=1e-4)


def test_keys_of_support_are_pooled_to_the_embeddings_grid():
    prior = SupportPrior(8, levels=2, dim=4)
    keys = prior.keys([torch.rand(1, 8, 2, 2), torch.rand(1, 8, 4, 4)])
    pooled = prior.support_keys(keys)
    assert keys.shape == (1, 16, 4) and pooled.shape == (1, 4, 4)
    expected = F.normalize(keys.unflatten(1, (4, 4))[:, :2, :2].mean((1, 2)), dim=-1)
    torch.testing.assert_close(pooled[:, 0], expected)
    torch.testing.assert_close(pooled.norm(dim=-1), torch.ones(1, 4))


def test_maps_hold_logits_probabilities_and_bounded_scores():
    prior = SupportPrior(8, regression=True)
    match, position = torch.full((1, 1, 2, 2), 0.8), torch.full((1, 1, 4, 4), 0.25)
    maps = prior.maps(match, position, torch.tensor([9.0, -9.0])[None, :, None, None].expand(1, 2, 4, 4))
    logits = torch.logit(torch.tensor([0.8, 0.25]))
    expected = torch.tensor([*(0.2 * logits), 0.8, 0.25, 3.0, -3.0])
    torch.testing.assert_close(maps[0, :, 1, 1], expected)
    weighted = (prior.logit_weights * torch.tensor([*logits, 3.0, -3.0])).sum()
    torch.testing.assert_close(prior.logits(maps)[0, 0, 0, 0], weighted)
