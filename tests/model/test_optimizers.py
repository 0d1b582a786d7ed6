"""The dense optimizer against torch.optim."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lapse_elmo.model.optimizers import DenseOptimizer, sum_of_squares

RATE, EPSILON = 0.2, 1e-7


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("initial", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_equals_torch_exactly(initial: float, dtype: torch.dtype) -> None:
    ours = [random(40, 7).to(dtype), random(33, seed=1).to(dtype), random(300, 1001, seed=2).to(dtype)]
    theirs = [value.clone().requires_grad_() for value in ours]
    optimizer = DenseOptimizer(ours, RATE, initial, EPSILON)
    expected = torch.optim.Adagrad(theirs, lr=RATE, initial_accumulator_value=initial, eps=EPSILON)
    for step in range(5):
        for index, value in enumerate(theirs):
            value.grad = random(*value.shape, seed=10 * step + index).to(dtype) * 10.0**-step
        optimizer.step([value.grad for value in theirs if value.grad is not None])
        expected.step()
        for index, value in enumerate(theirs):
            assert torch.equal(ours[index], value.detach())
            assert torch.equal(optimizer.accumulators[index], expected.state[value]["sum"])


def test_scale_acts_on_the_gradient() -> None:
    first, second = random(5), random(5)
    gradient = random(5, seed=3)
    DenseOptimizer([first], RATE).step([gradient], scale=0.25)
    DenseOptimizer([second], RATE).step([gradient * 0.25])
    assert torch.equal(first, second) and torch.equal(gradient, random(5, seed=3))


def test_gradient_descent_equals_torch() -> None:
    ours = random(8, 3)
    theirs = ours.clone().requires_grad_()
    theirs.grad = random(8, 3, seed=1)
    optimizer = DenseOptimizer([ours], RATE, initial_accumulator=None)
    optimizer.step([theirs.grad])
    torch.optim.SGD([theirs], lr=RATE).step()
    assert torch.equal(ours, theirs.detach())
    assert optimizer.state_dict() == {"accumulators": []}


def test_state_can_be_saved_and_restored() -> None:
    gradients = [random(4, 2, seed=5)]
    whole, resumed = random(4, 2), random(4, 2)
    first = DenseOptimizer([whole], RATE)
    first.step(gradients)
    first.step(gradients)
    early = DenseOptimizer([resumed], RATE)
    early.step(gradients)
    later = DenseOptimizer([resumed], RATE)
    later.load_state_dict(early.state_dict())
    later.step(gradients)
    assert torch.equal(whole, resumed)
    with pytest.raises(ValueError, match="expected"):
        DenseOptimizer([random(3)], RATE).load_state_dict(first.state_dict())


def test_sum_of_squares() -> None:
    for shape in ((0,), (1,), (3, 5), (700, 701)):
        values = random(*shape)
        assert sum_of_squares(values) == pytest.approx(float(values.double().square().sum()), rel=1e-7)
    assert math.isnan(sum_of_squares(torch.tensor([1.0, math.nan])))
