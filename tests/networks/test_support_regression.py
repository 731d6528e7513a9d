"""The support regression equals ridge regression on the support pixels, and finds what tells foreground apart."""

import numpy as np
import torch

from sam2sgp.networks.support_regression import POSITION_FEATURES, SupportRegression

SIDE = 8
PIXELS = SIDE * SIDE


def levels(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, 6, SIDE // factor, SIDE // factor, generator=generator) for factor in (4, 2, 1)]


def regression() -> SupportRegression:
    torch.manual_seed(0)
    return SupportRegression([6, 6, 6], dim=5)


@torch.no_grad()
def test_scores_equal_ridge_regression_solved_directly():
    module = regression()
    support, query = module.features(levels(3)), module.features(levels(2, seed=1))
    masks = (torch.rand(3, 1, PIXELS, generator=torch.Generator().manual_seed(2)) > 0.7).float()
    whole, foreground = module.gram(support, masks)
    index = torch.tensor([[0, 1, 2]])
    scores = module(query[:1], whole[index][:, None], foreground[index, 0][:, None])
    x, y = support.flatten(0, 1).double().numpy(), 2 * masks.flatten().double().numpy() - 1
    share = (y > 0).mean()
    for row, weight in enumerate((np.ones_like(y), np.where(y > 0, 0.5 / share, 0.5 / (1 - share)))):
        ridge = np.exp(module.log_ridge.item()) * np.eye(module.width)
        ridge[-1, -1] = 0
        solution = np.linalg.solve((x * weight[:, None]).T @ x / len(x) + ridge, (x * (weight * y)[:, None]).mean(0))
        expected = query[0].double().numpy() @ solution
        np.testing.assert_allclose(scores[0, 0, row].numpy(), expected, atol=2e-3)


@torch.no_grad()
def test_a_linear_target_is_found_in_a_new_image():
    module = regression()
    support, query = module.features(levels(4)), module.features(levels(1, seed=5))
    masks = (support[..., 0] > 0.3).float()[:, None]
    whole, foreground = module.gram(support, masks)
    scores = module(query, whole[None, None], foreground[:, 0][None, None])
    found = scores[0, 0, 1] > 0
    assert (found == (query[0, :, 0] > 0.3)).float().mean() > 0.9


@torch.no_grad()
def test_empty_and_full_masks_give_background_and_foreground():
    module = regression()
    features = module.features(levels(2))
    for value in (0.0, 1.0):
        whole, foreground = module.gram(features, torch.full((2, 1, PIXELS), value))
        scores = module(features[:1], whole[None, None], foreground[:, 0][None, None])
        assert scores.isfinite().all()
        assert ((scores[0, 0, 0] > 0).float().mean() > 0.5) == bool(value)


def test_features_hold_position_and_one():
    module = regression()
    features = module.features(levels(1))
    assert features.shape == (1, PIXELS, 5 + POSITION_FEATURES + 1)
    assert (features[..., -1] == 1).all()
    assert features[0, 0, 5:7].tolist() == [-1.0, -1.0] and features[0, -1, 5:7].tolist() == [1.0, 1.0]
