"""The passes of dense.c against their fallback in torch: every float has the same bits."""

from __future__ import annotations

import itertools
import math
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from lapse_elmo import native
from lapse_elmo.model import dense
from lapse_elmo.model.dense import Rates, add_up, sum_of_squares, update

pytestmark = pytest.mark.skipif(native.load(dense.SOURCE) is None, reason="there is no C compiler")
SIZES = [0, 1, 15, 16, 17, 63, 1000, 1 << 15, (1 << 15) + 1, 300_016]
STATES = {"adam": 2, "adagrad": 1, "sgd": 0}


def random(*shape: int, seed: int = 0) -> Tensor:
    """Return numbers of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * 10.0 ** torch.randint(-12, 4, shape, generator=generator)


def both(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Iterate over C and the fallback, switching to each."""
    for switch in ("1", "0"):
        monkeypatch.setenv(native.SWITCH, switch)
        yield switch


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_updates(monkeypatch: pytest.MonkeyPatch, kind: str, size: int, scale: float) -> None:
    results = []
    for _ in both(monkeypatch):
        weights, *state = tensors = [random(size, seed=seed).abs() for seed in range(1 + STATES[kind])]
        for step in range(1, 4):
            rates = Rates(scale, 0.01 / step, 1e-7, 0.03 * step, square=scale)
            update(kind, weights, random(size, seed=10 + step), state, rates)
        results.append(tensors)
    assert_same(*results)


@pytest.mark.parametrize("kind", STATES)
def test_updates_by_special_numbers(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    special = [0.0, -0.0, 1e-45, 1e-39, 3e38, -3e38, math.inf, -math.inf, math.nan, 1.0]
    gradient, second = map(torch.tensor, zip(*itertools.product(special, map(abs, special)), strict=True))
    results = []
    for _ in both(monkeypatch):
        tensors = [torch.ones_like(second), *[second.clone() for _ in range(STATES[kind])]]
        update(kind, tensors[0], gradient, tensors[1:], Rates(0.5, 0.01, 0.0))
        results.append(tensors)
    assert_same(*results)


def test_other_threads_do_not_disturb_an_update() -> None:
    """The numbers of a step stay in memory while C reads them and other threads allocate arrays of their size."""
    weights, accumulators, gradient = torch.zeros(1 << 20), torch.ones(1 << 20), torch.ones(1 << 20)
    over, interval = threading.Event(), sys.getswitchinterval()

    def allocate() -> None:
        while not over.is_set():
            [np.full(7, 1e30, np.float32) for _ in range(50)]

    allocating = threading.Thread(target=allocate)
    allocating.start()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(60):
            update("adagrad", weights.zero_(), gradient, [accumulators.fill_(1.0)], Rates(1.0, 0.1, 0.0))
            assert weights.unique().tolist() == [pytest.approx(-0.1 / 2**0.5)]
    finally:
        over.set()
        allocating.join()
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("divisor", [1, 2, 3, 64])
def test_sums(monkeypatch: pytest.MonkeyPatch, ranks: int, size: int, divisor: int) -> None:
    results, squares = [], []
    for _ in both(monkeypatch):
        buffers = random(ranks, size + 32)
        squares.append(add_up(buffers[:, 16 : 16 + size], divisor, True, True))
        results.append([buffers])
    assert_same(*results)
    assert squares[0] == pytest.approx(squares[1], rel=1e-12)
    assert squares[0][0] == pytest.approx(float(random(ranks, size + 32)[:, 16 : 16 + size].double().square().sum()))


def test_squares_not_wanted() -> None:
    assert add_up(random(2, 40), 2, False, False) == (0.0, 0.0)
    before, after = add_up(random(2, 40), 2, True, False)
    assert before == pytest.approx(sum_of_squares(random(2, 40))) and after == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_squares_that_are_not_finite(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    for _ in both(monkeypatch):
        numbers = torch.ones(2, 70)
        numbers[1, 69] = value
        found = sum_of_squares(numbers), *add_up(numbers, 2, True, True)
        assert not any(map(math.isfinite, found))


def test_threads_do_not_matter() -> None:
    results, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            buffers = random(2, 300_016)
            results.append((sum_of_squares(buffers), add_up(buffers, 2, True, True), buffers))
        finally:
            torch.set_num_threads(before)
    assert results[0][:2] == results[1][:2] and torch.equal(results[0][2], results[1][2])


def test_wrong_tensors_are_asserted() -> None:
    with pytest.raises(AssertionError):
        update("adam", torch.zeros(3), torch.zeros(4), [torch.zeros(3), torch.zeros(3)], Rates(1.0, 0.1, 0.0))
    with pytest.raises(AssertionError):
        update("adagrad", torch.zeros(3), torch.zeros(3), [torch.zeros(3, dtype=torch.float64)], Rates(1.0, 0.1, 0.0))
    with pytest.raises(AssertionError):
        update("adam", torch.zeros(3), torch.zeros(3), [torch.zeros(3)], Rates(1.0, 0.1, 0.0))
