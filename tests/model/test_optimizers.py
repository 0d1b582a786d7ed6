"""The dense optimizer against torch.optim."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from lapse_elmo.model.dense import sum_of_squares
from lapse_elmo.model.optimizers import DenseOptimizer, DenseRule

RATE, EPSILON = 0.2, 1e-7


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ADAGRADS = [DenseRule("adagrad", initial, EPSILON) for initial in (0.0, 0.1, 1.0)]
RULES = [DenseRule("adam", epsilon=EPSILON), DenseRule("sgd"), *ADAGRADS]


def torchs(rule: DenseRule, values: list[Tensor]) -> torch.optim.Optimizer:
    """Return torch's optimizer for the same rule."""
    if rule.kind == "adam":
        return torch.optim.Adam(values, lr=RATE, eps=rule.epsilon, foreach=False)
    if rule.kind == "sgd":
        return torch.optim.SGD(values, lr=RATE)
    return torch.optim.Adagrad(values, lr=RATE, initial_accumulator_value=rule.initial_accumulator, eps=rule.epsilon)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_equal_torchs(rule: DenseRule, dtype: torch.dtype) -> None:
    """To the last bit in float64; in float32 but for the square root, which torch does not always round correctly."""
    exact = dtype is torch.float64 or rule.kind == "sgd"
    tolerance = 0.0 if exact else 1e-6
    ours = [random(40, 7).to(dtype), random(33, seed=1).to(dtype), random(300, 1001, seed=2).to(dtype)]
    theirs = [value.clone().requires_grad_() for value in ours]
    optimizer = DenseOptimizer(ours, rule, RATE)
    expected = torchs(rule, theirs)
    for step in range(5):
        for index, value in enumerate(theirs):
            value.grad = random(*value.shape, seed=10 * step + index).to(dtype) * 10.0**-step
        optimizer.step([value.grad for value in theirs if value.grad is not None])
        expected.step()
        for index, value in enumerate(theirs):
            torch.testing.assert_close(ours[index], value.detach(), rtol=tolerance, atol=tolerance)
            keys = {"first_moments": "exp_avg", "second_moments": "exp_avg_sq", "accumulators": "sum"}
            for name, tensors in optimizer.state.items():
                assert torch.equal(tensors[index], expected.state[value][keys[name]])


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_scale_acts_on_the_gradient(rule: DenseRule) -> None:
    first, second = random(5), random(5)
    gradient = random(5, seed=3)
    DenseOptimizer([first], rule, RATE).step([gradient], scale=0.25)
    DenseOptimizer([second], rule, RATE).step([gradient * 0.25])
    assert torch.equal(first, second) and torch.equal(gradient, random(5, seed=3))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_state_can_be_saved_and_restored(rule: DenseRule) -> None:
    gradients = [random(4, 2, seed=5)]
    whole, resumed = random(4, 2), random(4, 2)
    first = DenseOptimizer([whole], rule, RATE)
    first.step(gradients)
    first.step(gradients)
    early = DenseOptimizer([resumed], rule, RATE)
    early.step(gradients)
    later = DenseOptimizer([resumed], rule, RATE)
    saved = early.named_state(["weight"])
    assert set(later.named_state(["weight"])) == set(saved)
    for name, tensor in later.named_state(["weight"]).items():
        tensor.copy_(saved[name])
    later.step(gradients)
    assert torch.equal(whole, resumed)


def test_sum_of_squares() -> None:
    for shape in ((0,), (1,), (3, 5), (700, 701)):
        values = random(*shape)
        assert sum_of_squares(values) == pytest.approx(float(values.double().square().sum()), rel=1e-7)
    assert math.isnan(sum_of_squares(torch.tensor([1.0, math.nan])))


def test_averages_are_weighted_means_of_the_parameters_over_the_last_steps() -> None:
    fraction, last = 0.5, 64
    averaged = torch.zeros(3, requires_grad=True)
    optimizer = DenseOptimizer([averaged], DenseRule("sgd", average=fraction), 1.0)
    assert optimizer.averages is not None
    (mean,) = optimizer.averages.means
    expected = averaged.detach().clone()
    for number in range(1, last + 1):
        optimizer.step([torch.full((3,), -1.0)])
        rate = 8 / (fraction * number)  # 16 steps are half of 32: until then the window has one step of eight
        if rate >= 1:
            expected = averaged.detach().clone()
        elif number % 8 == 0:
            expected += rate * (averaged.detach() - expected)
        assert averaged.tolist() == [number] * 3
        torch.testing.assert_close(mean, expected)
    assert last * (1 - fraction) < float(mean[0]) < last


@pytest.mark.parametrize("rule", RULES)
def test_averages_change_neither_the_steps_nor_the_state(rule: DenseRule) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(5, 7, generator=generator)
    plain, averaged = values.clone(), values.clone()
    without = DenseOptimizer([plain], rule, 0.1)
    with_averages = DenseOptimizer([averaged], dataclasses.replace(rule, average=0.3), 0.1)
    for _ in range(40):
        gradient = torch.randn(5, 7, generator=generator)
        without.step([gradient])
        with_averages.step([gradient])
    assert torch.equal(plain, averaged)
    ours, theirs = with_averages.named_state(["w"]), without.named_state(["w"])
    assert int(ours.pop("num_steps")) == 40 and set(theirs) - {"num_steps"} == set(ours)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert with_averages.averages is not None and not torch.equal(with_averages.averages.means[0], averaged)
