"""Handlers of a training run."""

from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine
from torch import nn
from torch.optim.swa_utils import AveragedModel

from sam2sgp.engines import GradientClipping, TrainingProgress, growing_average, warmup_stable_decay


def engine(iteration: int, accumulation: int = 1, epoch_length: int = 10) -> SimpleNamespace:
    state = SimpleNamespace(iteration=iteration, epoch_length=epoch_length)
    return SimpleNamespace(state=state, accumulation_steps=accumulation, scaler=None, optimizer=None)


@pytest.mark.parametrize("iteration, clipped", [(1, False), (3, False), (4, True), (8, True), (9, False), (10, True)])
def test_gradients_are_clipped_only_before_a_step(iteration, clipped):
    parameter = nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 10.0)
    GradientClipping([parameter], max_norm=1.0)(engine(iteration, accumulation=4))
    assert parameter.grad.norm() == pytest.approx(1.0 if clipped else 20.0, rel=1e-4)


def test_moving_average_follows_the_weights_with_growing_inertia():
    source = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(source.weight)
    averaged = AveragedModel(source, avg_fn=growing_average(0.5))
    averaged.update_parameters(source)
    nn.init.ones_(source.weight)
    expected = 0.0
    for count in range(1, 6):
        averaged.update_parameters(source)
        weight = min(0.5, (1 + count) / (10 + count))
        expected = weight * expected + (1 - weight)
        assert averaged.module.weight.item() == pytest.approx(expected)
    assert averaged.module.weight is not source.weight


def test_progress_bar_does_not_swallow_what_ends_the_training():
    def fail(*_):
        raise ValueError("broken batch")

    trainer = Engine(fail)
    TrainingProgress(disable=True).attach(trainer)
    with pytest.raises(ValueError, match="broken batch"):
        trainer.run([0], max_epochs=1)


def test_a_run_is_the_same_whatever_its_length_until_its_learning_rate_falls():
    short, long = warmup_stable_decay(4, 20, 5), warmup_stable_decay(4, 100, 5)
    assert [short(step) for step in range(15)] == [long(step) for step in range(15)]
    assert [short(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert [short(step) for step in range(15, 21)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    assert long(50) == 1.0
