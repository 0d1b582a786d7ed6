"""The row-wise parts in C and in Triton against their fallbacks in torch, in every storage dtype; NaN stays NaN.

Without a GPU Triton's kernels are interpreted here, and compiled for two GPUs; with one, test_cuda.py runs them.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from lapse_elmo import native
from lapse_elmo.model.pointwise import SOURCE, NativePointwise, Pointwise, pointwise, triton_problem
from lapse_elmo.model.pointwise_torch import TorchPointwise, wide_dtype
from tests.mpi import ROOT

STORAGES = [torch.float32, torch.float64, torch.bfloat16]
# bfloat16 is rounded once by both; near a tie they may differ by a unit in the last of its 8 places.
CLOSE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 2e-6, "atol": 1e-6},
    torch.float64: {"rtol": 1e-13, "atol": 1e-13},
    torch.bfloat16: {"rtol": 8e-3, "atol": 1e-6},
}
ROWS, CELLS = 7, 37  # no multiple of a vector's width
GUARD = 16
# Tails of every size: fewer elements than a vector has, and up to two rounds of unrolled vectors and a rest.
NUM_ROWS, WIDTHS = st.integers(0, 9), st.integers(1, 150)


@pytest.fixture(scope="module")
def compiled() -> Callable[[torch.dtype], Pointwise]:
    if native.load(SOURCE) is None:
        pytest.skip(native.problem(SOURCE))

    def of(storage: torch.dtype) -> Pointwise:
        found = pointwise(torch.empty(0, dtype=storage))
        assert isinstance(found, NativePointwise)
        return found

    return of


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> Callable[[torch.dtype], Pointwise]:
    """Return the kernels in C or in Triton, as the parameter says."""
    if request.param == "C":
        return request.getfixturevalue("compiled")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    request.getfixturevalue("monkeypatch").setenv("TRITON_INTERPRET", "1")  # it is read at Triton's import as well
    pytest.importorskip("triton")
    kind = importlib.import_module("lapse_elmo.model.pointwise_triton").TritonPointwise()
    return lambda _: kind


def random(*shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).to(dtype)


def guarded(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return a copy of ``tensor``, and a view of the ``GUARD`` elements, all 7, that follow it in memory."""
    memory = torch.full((tensor.numel() + GUARD,), 7.0, dtype=tensor.dtype)
    return memory[:-GUARD].view(tensor.shape).copy_(tensor), memory[-GUARD:]


def both(
    call: Callable[[Pointwise, list[Tensor]], None], compiled: Pointwise, tensors: list[Tensor],
    close: dict[str, Any] | None = None,
) -> None:
    """``call`` by both kinds on copies of ``tensors`` leaves the same in them, and nothing behind them."""
    results = []
    for kind in (compiled, TorchPointwise()):
        mine, behind = zip(*(guarded(tensor) for tensor in tensors), strict=True)
        call(kind, list(mine))
        assert all((guard == 7.0).all() for guard in behind)
        results.append(mine)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **(close or CLOSE[ours.dtype]), equal_nan=True)


def check_lstm_step(
    kernels: Pointwise, storage: torch.dtype, clip: float, first: bool, num_rows: int = ROWS, width: int = CELLS
) -> None:
    wide = wide_dtype(storage)
    gates = random(num_rows, 4 * width, seed=1, dtype=storage, scale=4.0)
    bias, previous_cells = random(4 * width, seed=2, dtype=wide), random(num_rows + 2, width, seed=3, dtype=wide)
    cells, cell_output = torch.zeros(num_rows, width, dtype=wide), torch.zeros(num_rows, width, dtype=storage)
    before = None if first else previous_cells

    def cell_forward(kind: Pointwise, t: list[Tensor]) -> None:
        kind.cell_forward(t[0], bias, before, t[1], t[2], clip)

    both(cell_forward, kernels, [gates, cells, cell_output])
    start = [gates, cells, cell_output]
    cell_forward(TorchPointwise(), start)
    d_cell_output, d_cells = random(num_rows, width, seed=4, dtype=storage), random(num_rows, width, seed=5, dtype=wide)

    def cell_backward(kind: Pointwise, t: list[Tensor]) -> None:
        shown = t[1] if storage == wide else t[2]
        kind.cell_backward(t[0], before, t[1], shown, t[3].clone(), t[4], clip)

    both(cell_backward, kernels, [*start, d_cell_output, d_cells])


def check_clip(
    kernels: Pointwise, storage: torch.dtype, clip: float, masked: bool, num_rows: int = ROWS, width: int = CELLS
) -> None:
    wide = wide_dtype(storage)
    hidden = random(num_rows, width, seed=1, dtype=storage)
    drawn = random(num_rows + 3, width, seed=2, dtype=wide)
    mask = (drawn > 0).to(wide).div_(0.7) if masked else None
    both(lambda kind, t: kind.clip_forward(t[0], mask, clip), kernels, [hidden])
    TorchPointwise().clip_forward(hidden, mask, clip)
    upstream, later = random(num_rows, width, seed=3, dtype=storage), random(num_rows + 1, width, seed=4, dtype=storage)
    both(lambda kind, t: kind.clip_backward(t[0], later, hidden, mask, clip), kernels, [upstream])


def check_softmax_rows(kernels: Pointwise, storage: torch.dtype, num_samples: int, num_rows: int = ROWS) -> None:
    wide = wide_dtype(storage)
    logits = random(num_rows, num_samples, seed=1, dtype=storage, scale=5.0)
    logits[:, ::3] = -math.inf
    bias_minus_log_q, target = random(num_samples, seed=2, dtype=wide), random(num_rows, seed=3, dtype=wide, scale=5.0)
    target[:1] = 500.0  # all exp_logits of the samples vanish
    outputs = [torch.zeros(num_rows, dtype=wide) for _ in range(3)]
    both(
        lambda kind, t: kind.softmax_rows(t[0], bias_minus_log_q, target, *t[1:]), kernels,
        [logits, *outputs, random(num_samples, seed=4, dtype=wide)], CLOSE[storage],
    )


def check_softmax_totals(kernels: Pointwise, storage: torch.dtype, bounds: list[int], num_rows: int = ROWS) -> None:
    """With the classes in parts from each of ``bounds`` to the next."""
    width = bounds[-1]
    logits, bias = random(num_rows, width, seed=1, dtype=storage, scale=30.0), random(width, seed=2, dtype=storage)
    largest, total = torch.full((num_rows,), -math.inf, dtype=storage), torch.zeros(num_rows, dtype=torch.float64)

    def call(kind: Pointwise, t: list[Tensor]) -> None:
        for part in map(slice, bounds, bounds[1:]):
            kind.softmax_totals(logits[:, part].contiguous(), bias[part].contiguous(), t[0], t[1])

    both(call, kernels, [largest, total], CLOSE[storage])  # parts are summed in the storage dtype
    call(kernels, [largest, total])
    torch.testing.assert_close(
        largest.double() + total.log(), torch.logsumexp((logits + bias).double(), 1), rtol=1e-6, atol=1e-6
    )


def check_column_sums(kernels: Pointwise, storage: torch.dtype, num_rows: int, width: int) -> None:
    rows = random(num_rows, width, seed=1, dtype=storage)
    ours, theirs = (kind.column_sums(rows) for kind in (kernels, TorchPointwise()))
    assert ours.dtype == theirs.dtype == wide_dtype(storage)
    torch.testing.assert_close(ours, rows.to(ours.dtype).sum(0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(theirs, rows.to(ours.dtype).sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kernels", ["C", "Triton"], indirect=True)
@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("clip", [0.3, math.inf])
@pytest.mark.parametrize("first", [False, True])
def test_lstm_step(kernels: Callable, storage: torch.dtype, clip: float, first: bool) -> None:
    check_lstm_step(kernels(storage), storage, clip, first)


@pytest.mark.parametrize("kernels", ["C", "Triton"], indirect=True)
@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("clip", [0.5, math.inf])
@pytest.mark.parametrize("masked", [False, True])
def test_clip_forward_and_backward(kernels: Callable, storage: torch.dtype, clip: float, masked: bool) -> None:
    check_clip(kernels(storage), storage, clip, masked)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@given(num_rows=NUM_ROWS, width=WIDTHS, clip=st.sampled_from([0.4, math.inf]), flag=st.booleans())
def test_lstm_steps_of_all_shapes(
    compiled: Callable, storage: torch.dtype, num_rows: int, width: int, clip: float, flag: bool
) -> None:
    check_lstm_step(compiled(storage), storage, clip, flag, num_rows, width)
    check_clip(compiled(storage), storage, clip, flag, num_rows, width)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@given(num_rows=NUM_ROWS, width=WIDTHS)
@example(num_rows=ROWS, width=1500)
def test_softmax_of_all_shapes(compiled: Callable, storage: torch.dtype, num_rows: int, width: int) -> None:
    check_softmax_rows(compiled(storage), storage, width - 1, num_rows)
    if storage != torch.bfloat16:
        check_softmax_totals(compiled(storage), storage, sorted({0, width // 7, width // 2, width}), num_rows)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@given(num_rows=st.integers(0, 70), width=WIDTHS)
@example(num_rows=300, width=700)
def test_column_sums_of_all_shapes(compiled: Callable, storage: torch.dtype, num_rows: int, width: int) -> None:
    check_column_sums(compiled(storage), storage, num_rows, width)


def test_exponentials_are_exact_to_the_last_places(compiled: Callable) -> None:
    """Exponentials, as seen in the softmax's exp_logits, the gates and the cell output, are exact to a few ulps."""
    x = torch.cat([torch.linspace(-104.0, 0.0, 400_001), torch.linspace(-1e-3, 0.0, 4_001)])
    exp_logits, out = x[None].clone(), [torch.empty(1) for _ in range(3)]
    compiled(torch.float32).softmax_rows(exp_logits, torch.zeros_like(x), torch.zeros(1), *out, torch.zeros_like(x))
    exact = x.double().exp()
    normal = exact > 2e-38
    assert float((exp_logits[0].double() / exact - 1)[normal].abs().max()) < 2e-7
    assert not exp_logits[0][x < -87.4].any()
    x = torch.cat([torch.linspace(-20.0, 20.0, 400_001), torch.linspace(-0.01, 0.01, 4_001)])
    gates = torch.cat([x, x, x, x])[None].clone()
    cells, cell_output = torch.empty(1, len(x)), torch.empty(1, len(x))
    compiled(torch.float32).cell_forward(gates, torch.zeros(4 * len(x)), None, cells, cell_output, math.inf)
    i, _, g, _ = gates[0].double().chunk(4)
    assert float((i / x.double().sigmoid() - 1).abs().max()) < 4e-7
    tanh = x.double().tanh()
    assert float(((g - tanh) / tanh.abs().clamp(min=1e-30)).abs().max()) < 4e-7


def wrong(tensor: Tensor) -> Iterator[Tensor]:
    """Tensors that C would misread in place of ``tensor``: of another dtype, width, or order in memory."""
    yield tensor.to(torch.float16)
    yield torch.cat([tensor, tensor], -1)
    yield tensor.t().contiguous().t() if tensor.ndim == 2 else tensor.repeat_interleave(2)[::2]


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_wrong_tensors_do_not_reach_c(compiled: Callable, storage: torch.dtype) -> None:
    wide, kind = wide_dtype(storage), compiled(storage)

    def rows(width: int = 3, dtype: torch.dtype = storage) -> Tensor:
        return torch.zeros(2, width, dtype=dtype)

    def vector(size: int, dtype: torch.dtype = wide) -> Tensor:
        return torch.zeros(size, dtype=dtype)

    cells = [rows(dtype=wide) for _ in range(3)]
    cases: list[tuple[Callable, list[Tensor], tuple[float, ...]]] = [
        (kind.cell_forward, [rows(12), vector(12), *cells[:2], rows()], (1.0,)),
        (kind.cell_backward, [rows(12), *cells[:2], rows(), rows(), cells[2]], (1.0,)),
        (kind.clip_forward, [rows(), rows(dtype=wide)], (1.0,)),
        (kind.clip_backward, [rows(), rows(), rows(), rows(dtype=wide)], (1.0,)),
        (kind.column_sums, [rows()], ()),
        (kind.softmax_rows, [rows(), vector(3), *(vector(2) for _ in range(4)), vector(3)], ()),
        (kind.softmax_totals, [rows(), vector(3), vector(2), vector(2, torch.float64)], ()),
    ]
    for call, tensors, rest in cases:
        call(*tensors, *rest)
        for place, tensor in enumerate(tensors):
            bad = list(wrong(tensor))
            if len(tensors) == 1:
                del bad[1]  # any width fits if there is no other tensor
            elif not (call == kind.clip_forward and place == 0):  # the mask may have more rows
                bad.append(tensor[:-1])
            for other in bad:
                with pytest.raises(AssertionError):
                    call(*tensors[:place], other, *tensors[place + 1 :], *rest)


@pytest.mark.parametrize("kernels", ["C", "Triton"], indirect=True)
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_nan_passes_through(kernels: Callable, storage: torch.dtype) -> None:
    """No clip, maximum or mask replaces NaN by a number, which would hide that a model has diverged."""
    wide, kind = wide_dtype(storage), kernels(storage)
    nan = torch.full((1, 5), math.nan)
    gates, cells, cell_output = torch.zeros(1, 20), torch.empty(1, 5, dtype=wide), torch.empty(1, 5, dtype=storage)
    gates[:, :5] = math.nan
    gates = gates.to(storage)
    kind.cell_forward(gates, torch.zeros(20, dtype=wide), None, cells, cell_output, 3.0)
    assert cells.isnan().all() and cell_output.isnan().all()
    d_cells = torch.zeros(1, 5, dtype=wide)
    kind.cell_backward(gates, None, cells, cell_output, torch.ones(1, 5, dtype=storage), d_cells, 3.0)
    assert gates[:, :5].isnan().all() and d_cells.isnan().all()
    hidden = nan.to(storage)
    kind.clip_forward(hidden, None, 3.0)
    assert hidden.isnan().all()
    upstream = torch.ones(1, 5, dtype=storage)
    kind.clip_backward(upstream, nan.to(storage), torch.zeros(1, 5, dtype=storage), None, 3.0)
    assert upstream.isnan().all()
    outputs = [torch.empty(2, dtype=wide) for _ in range(3)]
    logits = torch.zeros(2, 9, dtype=storage)
    logits[0, 4] = math.nan
    zeros = torch.zeros(9, dtype=wide)
    kind.softmax_rows(logits, zeros, torch.tensor([0.0, math.nan], dtype=wide), *outputs, zeros.clone())
    assert outputs[0].isnan().all()


@pytest.mark.parametrize("kernels", ["Triton"], indirect=True)
def test_triton_runs_on_the_device_of_the_tensors(kernels: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the current one, as Triton does by itself: a model may be on another GPU."""
    module, inside, launched = importlib.import_module("lapse_elmo.model.pointwise_triton"), [], []

    @contextlib.contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        inside.append(tensor)
        yield
        inside.pop()

    class Kernel:
        def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
            return lambda *pointers, **_: launched.append(any(pointers[0].device == one.device for one in inside))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for name in ("_cell_forward", "_cell_backward", "_clip_forward", "_clip_backward"):
        monkeypatch.setattr(module, name, Kernel())
    kind, cells, gates = kernels(torch.float32), torch.zeros(2, 3), torch.zeros(2, 12)
    kind.cell_forward(gates, gates[0], None, cells, cells, 1.0)
    kind.cell_backward(gates, None, cells, cells, cells, cells, 1.0)
    kind.clip_forward(cells, None, 1.0)
    kind.clip_backward(cells, cells, cells, None, 1.0)
    assert launched == [True] * 4 and not inside


def test_kernels_become_machine_code() -> None:
    """The kernels compile for Ampere and Hopper; Triton's interpreter accepts code that its compiler refuses."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.model.compile_kernels", "80", "90"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * 4 * 3 * 2
    assert all(int(line.split()[-1]) > 1000 for line in lines)


def test_what_triton_cannot_do_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """If Triton cannot compile, torch replaces the kernels, and the log has one line about it."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    why = triton_problem(torch.device("cuda"))
    assert why and "\n" not in why
    monkeypatch.setenv(native.SWITCH, "0")
    assert native.SWITCH in triton_problem(torch.device("cuda"))
