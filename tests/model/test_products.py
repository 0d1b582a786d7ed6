"""The compiled products of few rows with a packed matrix, against torch's in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lapse_elmo import native
from lapse_elmo.model.products import PACKED_SOURCE, PackedFactor, Products, TorchFactor

STORAGES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=STORAGES, ids=str)
def products(request: pytest.FixtureRequest) -> Products:
    """Those of a storage for which there is compiled code on this machine."""
    found = Products(request.param)
    if not isinstance(found.factor(torch.ones(2, 2)), PackedFactor):
        pytest.skip(native.problem(PACKED_SOURCE) or "this processor has no products of bfloat16")
    return found


def random(*shape: int, seed: int, storage: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(storage)


def bound(storage: torch.dtype, num_terms: int) -> float:
    """Of the rounding of a sum of so many products of normal numbers, and of its result."""
    return 1e-6 * num_terms if storage == torch.float32 else 1e-6 * num_terms + 2.0**-8 * 4 * num_terms**0.5


@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_all_shapes(products: Products, transposed: bool) -> None:
    """Rows of every remainder, whole panels of columns and parts of one; both orders of the matrix in memory."""
    shapes = itertools.product([1, 2, 5, 12, 13, 32, 37], [2, 16, 130], [1, 31, 32, 70])
    for num_rows, num_terms, num_columns in shapes:
        second = random(num_terms, num_columns, seed=1, storage=products.storage)
        second = second.t().contiguous().t() if transposed else second
        first = random(num_rows, num_terms, seed=2, storage=products.storage)
        start = random(num_rows, num_columns, seed=3, storage=products.storage)
        factor, exact = products.factor(second), first.double() @ second.double()
        assert isinstance(factor, PackedFactor)
        atol = bound(products.storage, num_terms)
        guarded = torch.full((num_rows + 1, num_columns), 7.0, dtype=products.storage)
        torch.testing.assert_close(factor.into(guarded[:-1], first).double(), exact, rtol=0.0, atol=atol)
        assert bool((guarded[-1] == 7.0).all())  # nothing is written behind the last row
        torch.testing.assert_close(
            factor.add_into(start.clone(), first).double(), start.double() + exact, rtol=0.0, atol=atol
        )


def test_a_row_has_the_same_bits_whatever_comes_with_it(products: Products) -> None:
    """So results depend neither on the batch around a sentence nor on the number of threads."""
    factor = products.factor(random(256, 1000, seed=1, storage=products.storage))
    first = random(50, 256, seed=2, storage=products.storage)
    together = factor.into(first.new_empty(50, 1000), first)
    for row in range(50):
        assert torch.equal(factor.into(first.new_empty(1, 1000), first[row : row + 1])[0], together[row])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(factor.into(first.new_empty(50, 1000), first), together)
    finally:
        torch.set_num_threads(threads)


def test_nan_and_infinity_pass_through(products: Products) -> None:
    second = random(4, 40, seed=1, storage=products.storage)
    second[2, 5], second[1, 33] = float("nan"), float("inf")
    out = products.factor(second).into(second.new_empty(3, 40), torch.ones(3, 4, dtype=products.storage))
    assert out[:, 5].isnan().all() and out[:, 33].isinf().all()
    assert out.isfinite().sum() == 3 * 38


def test_torch_takes_what_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(Products(torch.float64).factor(torch.ones(4, 4, dtype=torch.float64)), TorchFactor)
    assert isinstance(Products(torch.bfloat16).factor(torch.ones(3, 4)), TorchFactor)  # rows go in pairs
    monkeypatch.setenv(native.SWITCH, "0")
    factor = Products(torch.float32).factor(torch.eye(4))
    assert isinstance(factor, TorchFactor)
    first = random(2, 4, seed=1, storage=torch.float32)
    assert torch.equal(factor.add_into(first.clone(), first), 2 * first)
