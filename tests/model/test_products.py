"""The compiled products of few rows with a prepacked weight, against torch's in float64; who multiplies what."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lapse_elmo import native
from lapse_elmo.model import prepacked
from lapse_elmo.model.prepacked import PREPACKED_SOURCE, Kernels, PrepackedWeight, Range
from lapse_elmo.model.products import HybridWeight, Matmul, TorchWeight, split_rows

KINDS = {"float32": torch.float32, "bfloat16 vectors": torch.bfloat16, "bfloat16 tiles": torch.bfloat16}


@pytest.fixture(params=KINDS, scope="module")
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Return the kernels for a storage dtype and an instruction set; skip the test if this machine has none."""
    found = prepacked.kernels(KINDS[request.param])
    if found is None:
        pytest.skip(native.problem(PREPACKED_SOURCE) or "this processor has no products of bfloat16")
    if request.param == "bfloat16 tiles" and not found.tiles:
        pytest.skip("this processor has no AMX")
    if request.param == "bfloat16 vectors" and found.tiles:
        library = native.load(PREPACKED_SOURCE)
        assert library is not None
        library.multiply_b.argtypes, library.multiply_b.restype = found.multiply.argtypes, None  # type: ignore
        return dataclasses.replace(found, multiply=library.multiply_b, tiles=False)
    return found


def storage_of(kernels: Kernels) -> torch.dtype:
    return torch.float32 if kernels.num_rows == 1 else torch.bfloat16


def random(*shape: int, seed: int, storage: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(storage)


def assert_close(found: Tensor, first: Tensor, second: Tensor, start: Tensor | float = 0.0) -> None:
    """Check against the worst-case error of float32 sums in any order, rounded to 8 bits once for bfloat16."""
    exact = first.double() @ second.double() + start
    magnitude = first.double().abs() @ second.double().abs() + torch.as_tensor(start).abs()
    allowed = 2.0**-24 * (len(second) + 2) * magnitude
    if found.dtype == torch.bfloat16:
        allowed = allowed + 2.0**-8 * exact.abs()
    assert bool(((found.double() - exact).abs() <= allowed).all()), ((found.double() - exact).abs() / allowed).max()


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(0, 300), num_terms=st.one_of(st.integers(1, 160), st.integers(2000, 2200)),
    num_columns=st.integers(1, 300), transposed=st.booleans(), seed=st.integers(0, 9),
)
def test_products_of_all_shapes(
    kernels: Kernels, num_rows: int, num_terms: int, num_columns: int, transposed: bool, seed: int
) -> None:
    """Tails of rows, terms and columns; one block of terms and two; both orders of the weight in memory."""
    storage, num_terms = storage_of(kernels), -(-num_terms // kernels.num_rows) * kernels.num_rows
    second = random(num_terms, num_columns, seed=seed, storage=storage)
    second = second.t().contiguous().t() if transposed else second
    first = random(num_rows, num_terms, seed=seed + 1, storage=storage)
    start = random(num_rows, num_columns, seed=seed + 2, storage=storage)
    prepacked = PrepackedWeight(kernels, second)
    guarded = torch.full((num_rows + 2, num_columns), 7.0, dtype=storage)
    assert_close(prepacked.mm_into(guarded[1:-1], first), first, second)
    assert bool((guarded[[0, -1]] == 7.0).all())  # nothing is written before the first row or behind the last
    assert_close(prepacked.addmm_into(start.clone(), first), first, second, start.double())


def test_a_row_has_the_same_bits_whatever_comes_with_it(kernels: Kernels) -> None:
    """A row's bits depend neither on the other rows of the batch nor on the number of threads."""
    storage = storage_of(kernels)
    for num_terms in (256, 2100):
        prepacked = PrepackedWeight(kernels, random(num_terms, 1000, seed=1, storage=storage))
        first = random(50, num_terms, seed=2, storage=storage)
        together = prepacked.mm_into(first.new_empty(50, 1000), first)
        for row in range(50):
            assert torch.equal(prepacked.mm_into(first.new_empty(1, 1000), first[row : row + 1])[0], together[row])
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            assert torch.equal(prepacked.mm_into(first.new_empty(50, 1000), first), together)
        finally:
            torch.set_num_threads(threads)


def test_nan_and_infinity_pass_through(kernels: Kernels) -> None:
    storage = storage_of(kernels)
    second = random(4, 40, seed=1, storage=storage)
    second[2, 5], second[1, 33] = float("nan"), float("inf")
    out = PrepackedWeight(kernels, second).mm_into(second.new_empty(3, 40), torch.ones(3, 4, dtype=storage))
    assert out[:, 5].isnan().all() and out[:, 33].isinf().all()
    assert out.isfinite().sum() == 3 * 38


def test_wrong_operands_do_not_reach_c(kernels: Kernels) -> None:
    storage = storage_of(kernels)
    prepacked = PrepackedWeight(kernels, torch.ones(4, 40, dtype=storage))
    first, out = torch.ones(3, 4, dtype=storage), torch.ones(3, 40, dtype=storage)
    for bad_out, bad_first in (
        (out[:2], first), (out, first[:, :2]), (out[:, :39], first), (torch.ones(40, 3, dtype=storage).t(), first),
        (out, torch.ones(4, 3, dtype=storage).t()), (out.double(), first), (out, first.double()),
    ):
        with pytest.raises(AssertionError):
            prepacked.mm_into(bad_out, bad_first)


def test_torch_takes_what_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(Matmul(torch.float64).prepare(torch.ones(4, 4, dtype=torch.float64)), TorchWeight)
    assert isinstance(Matmul(torch.bfloat16).prepare(torch.ones(3, 4)), TorchWeight)  # rows go in pairs
    monkeypatch.setenv(native.SWITCH, "0")
    unpacked = Matmul(torch.float32).prepare(torch.eye(4))
    assert isinstance(unpacked, TorchWeight)
    first = random(2, 4, seed=1, storage=torch.float32)
    assert torch.equal(unpacked.addmm_into(first.clone(), first), 2 * first)


class TestChoice:
    """The number of rows decides whether prepacked.c or torch multiplies."""

    @pytest.fixture(autouse=True)
    def compiled(self) -> None:
        if prepacked.kernels(torch.float32) is None:
            pytest.skip(native.problem(PREPACKED_SOURCE))

    def test_the_number_of_rows_decides(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("lapse_elmo.model.products.rows_prepacked", lambda storage, strided: Range(2, 4))
        matmul, weight = Matmul(torch.float32), random(6, 8, seed=1, storage=torch.float32)
        within, above, below = (matmul.prepare(weight, sizes) for sizes in ([4, 2], [9, 5], [1, 1]))
        assert isinstance(within, PrepackedWeight) and isinstance(above, TorchWeight) and isinstance(below, TorchWeight)
        for sizes in ([5, 1], [3, 1], [5, 3], []):
            either = matmul.prepare(weight, sizes)
            assert isinstance(either, HybridWeight)
            for size in (1, 2, 4, 5):
                first = random(size, 6, seed=2, storage=torch.float32)
                side, start = within if 2 <= size <= 4 else above, torch.ones(size, 8)
                assert torch.equal(either.mm_into(start.clone(), first), side.mm_into(start.clone(), first))
                assert torch.equal(either.addmm_into(start.clone(), first), side.addmm_into(start.clone(), first))

    @pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("tiles", [False, True])
    @pytest.mark.parametrize("strided", [False, True])
    def test_the_choice_depends_on_the_machine_alone(
        self, monkeypatch: pytest.MonkeyPatch, storage: torch.dtype, tiles: bool, strided: bool
    ) -> None:
        some = Kernels(lambda *_: None, lambda *_: None, 1, tiles)
        monkeypatch.setattr(prepacked, "kernels", lambda storage: some)
        rows = prepacked.rows_prepacked(storage, strided)
        assert (32 in rows) == (not tiles or storage == torch.bfloat16 or strided)
        assert (1000 in rows) == (not tiles)
        monkeypatch.setattr(prepacked, "kernels", lambda storage: None)
        assert 32 not in prepacked.rows_prepacked(storage, strided)

    def test_a_plan_says_what_multiplies(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for tiles, precision, line in (
            (False, "fp32", "fp32: forward by prepacked.c; backward by prepacked.c"),
            (True, "fp32", "fp32: forward by prepacked.c for 8 to 127 rows, else by torch; backward by torch"),
            (True, "bf16", "bf16: forward by AMX tiles for 1 to 192 rows, else by torch; backward by AMX tiles for"),
        ):
            some = Kernels(lambda *_: None, lambda *_: None, 1, tiles)
            monkeypatch.setattr(prepacked, "kernels", lambda storage, some=some: some)
            assert prepacked.describe(precision).removeprefix("products of the LSTM's steps, ").startswith(line)


@pytest.mark.parametrize("matmul", [Matmul(torch.float32), Matmul(torch.bfloat16), Matmul(torch.bfloat16, True)])
@example(num_rows=0)
@example(num_rows=1)
@given(num_rows=st.integers(0, 700))
@settings(max_examples=40, deadline=None)
def test_products_over_a_varying_number_of_rows(matmul: Matmul, num_rows: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    first, second, weight = (
        torch.randn(*shape, generator=generator).to(matmul.storage) for shape in ((num_rows, 5), (num_rows, 7), (5, 3))
    )
    error = 1e-2 if matmul.storage == torch.bfloat16 else 1e-5

    def check(found: Tensor, wanted: Tensor, dtype: torch.dtype = matmul.storage) -> None:
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=error, atol=error * max(num_rows, 1) ** 0.5)

    check(matmul.mm(first, weight), first.double() @ weight.double())
    outer = first.double().t() @ second.double()
    check(matmul.sum_outer(first, second), outer)
    for dtype in {matmul.storage, torch.float32}:
        before = torch.ones(5, 7, dtype=dtype)
        check(matmul.add_outer_into(before, first, second), outer + 1, dtype)


def test_few_numbers_of_rows_are_multiplied() -> None:
    """Few distinct numbers of rows are multiplied, with at most a sixteenth of additional rows."""
    seen = set()
    for num_rows in range(10_000):
        parts = split_rows(num_rows)
        seen |= {num_rows} if parts is None else {parts.main, parts.padded_rest}
        if parts is not None:
            assert parts.main + parts.rest == num_rows and 0 < parts.rest <= parts.padded_rest <= parts.main
            assert parts.main + parts.padded_rest <= num_rows * 17 / 16
    assert len(seen) < 60
    assert {rows for rows in range(16, 1000) if split_rows(rows) is None and rows % 16 == 0} >= set(range(16, 257, 16))
    assert split_rows(272) is not None and split_rows(27) is not None
