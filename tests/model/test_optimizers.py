"""Deltas and the dense optimizer against torch.optim, dense and with coalesced sparse gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lapse_elmo.model.optimizers import DenseOptimizer, adagrad_delta, sgd_delta, sum_of_squares

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


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_rows_equal_torch_with_sparse_gradients() -> None:
    table, accumulator = random(20, 6), torch.ones(20, 6)
    theirs = torch.nn.Parameter(table.clone())
    expected = torch.optim.Adagrad([theirs], lr=RATE, initial_accumulator_value=1.0, eps=EPSILON)
    for step in range(6):
        keys = torch.randint(20, (30,), generator=torch.Generator().manual_seed(step))  # with repeats
        gradient = random(30, 6, seed=step)
        theirs.grad = torch.sparse_coo_tensor(keys[None], gradient, (20, 6), check_invariants=True).coalesce()
        expected.step()
        rows, place = torch.unique(keys, return_inverse=True)
        summed = torch.zeros(len(rows), 6).index_add_(0, place, gradient)
        weight_delta, accumulator_delta = adagrad_delta(summed, accumulator[rows], RATE, EPSILON)
        table.index_add_(0, rows, weight_delta)
        accumulator.index_add_(0, rows, accumulator_delta)
        torch.testing.assert_close(table, theirs.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(accumulator, expected.state[theirs]["sum"], rtol=1e-6, atol=0.0)


def test_rows_and_dense_agree_and_out_is_used() -> None:
    gradient, accumulator = random(9, 4), random(9, 4, seed=1).abs()
    expected = adagrad_delta(gradient, accumulator, RATE, EPSILON)
    push = torch.full((9, 8), 7.0)
    found = adagrad_delta(gradient, accumulator, RATE, EPSILON, out=(push[:, :4], push[:, 4:]))
    assert torch.equal(push, torch.cat(expected, 1)) and found[0].data_ptr() == push.data_ptr()
    dense, before = random(9, 4, seed=2), random(9, 4, seed=2)
    optimizer = DenseOptimizer([dense], RATE, 0.0, EPSILON)
    optimizer.accumulators[0].copy_(accumulator)
    optimizer.step([gradient])
    torch.testing.assert_close(dense, before + expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(optimizer.accumulators[0], accumulator + expected[1], rtol=1e-6, atol=0.0)


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
    gradient = random(3)
    assert sgd_delta(gradient, RATE, out=gradient) is gradient


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
