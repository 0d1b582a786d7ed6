"""The row-wise parts in C and in Triton against their fallbacks in torch, in every storage dtype; NaN stays NaN.

Without a GPU Triton's kernels are interpreted here, and compiled for two GPUs; with one, test_cuda.py runs them.
"""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
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


@pytest.fixture
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
    """By parameter in C or in Triton."""
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


def both(
    call: Callable[[Pointwise, list[Tensor]], None], compiled: Pointwise, tensors: list[Tensor],
    close: dict[str, Any] | None = None,
) -> None:
    """``call`` by both kinds on copies of ``tensors`` leaves the same in them."""
    results = []
    for kind in (compiled, TorchPointwise()):
        mine = [tensor.clone() for tensor in tensors]
        call(kind, mine)
        results.append(mine)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **(close or CLOSE[ours.dtype]), equal_nan=True)


@pytest.mark.parametrize("kernels", ["C", "Triton"], indirect=True)
@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("clip", [0.3, math.inf])
@pytest.mark.parametrize("first", [False, True])
def test_lstm_step(kernels: Callable, storage: torch.dtype, clip: float, first: bool) -> None:
    wide = wide_dtype(storage)
    gates = random(ROWS, 4 * CELLS, seed=1, dtype=storage, scale=4.0)
    bias, previous_cells = random(4 * CELLS, seed=2, dtype=wide), random(ROWS + 2, CELLS, seed=3, dtype=wide)
    cells, cell_output = torch.zeros(ROWS, CELLS, dtype=wide), torch.zeros(ROWS, CELLS, dtype=storage)
    before = None if first else previous_cells

    def cell_forward(kind: Pointwise, t: list[Tensor]) -> None:
        kind.cell_forward(t[0], bias, before, t[1], t[2], clip)

    both(cell_forward, kernels(storage), [gates, cells, cell_output])
    start = [gates, cells, cell_output]
    cell_forward(TorchPointwise(), start)
    d_cell_output, d_cells = random(ROWS, CELLS, seed=4, dtype=storage), random(ROWS, CELLS, seed=5, dtype=wide)

    def cell_backward(kind: Pointwise, t: list[Tensor]) -> None:
        shown = t[1] if storage == wide else t[2]
        kind.cell_backward(t[0], before, t[1], shown, t[3].clone(), t[4], clip)

    both(cell_backward, kernels(storage), [*start, d_cell_output, d_cells])


@pytest.mark.parametrize("kernels", ["C", "Triton"], indirect=True)
@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("clip", [0.5, math.inf])
@pytest.mark.parametrize("masked", [False, True])
def test_clip_forward_and_backward(kernels: Callable, storage: torch.dtype, clip: float, masked: bool) -> None:
    wide = wide_dtype(storage)
    hidden = random(ROWS, CELLS, seed=1, dtype=storage)
    drawn = random(ROWS + 3, CELLS, seed=2, dtype=wide)
    mask = (drawn > 0).to(wide).div_(0.7) if masked else None
    both(lambda kind, t: kind.clip_forward(t[0], mask, clip), kernels(storage), [hidden])
    TorchPointwise().clip_forward(hidden, mask, clip)
    upstream, later = random(ROWS, CELLS, seed=3, dtype=storage), random(ROWS + 1, CELLS, seed=4, dtype=storage)
    both(lambda kind, t: kind.clip_backward(t[0], later, hidden, mask, clip), kernels(storage), [upstream])


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("num_samples", [0, 1, 1500])
def test_softmax_rows(compiled: Callable, storage: torch.dtype, num_samples: int) -> None:
    wide = wide_dtype(storage)
    logits = random(ROWS, num_samples, seed=1, dtype=storage, scale=5.0)
    logits[:, ::3] = -math.inf
    bias_minus_log_q, target = random(num_samples, seed=2, dtype=wide), random(ROWS, seed=3, dtype=wide, scale=5.0)
    target[0] = 500.0  # all exp_logits of the samples vanish
    outputs = [torch.zeros(ROWS, dtype=wide) for _ in range(3)]
    both(
        lambda kind, t: kind.softmax_rows(t[0], bias_minus_log_q, target, *t[1:]), compiled(storage),
        [logits, *outputs, random(num_samples, seed=4, dtype=wide)], CLOSE[storage],
    )


@pytest.mark.parametrize("storage", [torch.float32, torch.float64], ids=str)
def test_softmax_totals(compiled: Callable, storage: torch.dtype) -> None:
    logits, bias = random(ROWS, 700, seed=1, dtype=storage, scale=30.0), random(700, seed=2, dtype=storage)
    largest, total = torch.full((ROWS,), -math.inf, dtype=storage), torch.zeros(ROWS, dtype=torch.float64)

    def call(kind: Pointwise, t: list[Tensor]) -> None:
        for part in (slice(0, 100), slice(100, 400), slice(400, 700)):
            kind.softmax_totals(logits[:, part].contiguous(), bias[part].contiguous(), t[0], t[1])

    both(call, compiled(storage), [largest, total], CLOSE[storage])  # parts are summed in the storage dtype
    call(compiled(storage), [largest, total])
    torch.testing.assert_close(
        largest.double() + total.log(), torch.logsumexp((logits + bias).double(), 1), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_column_sums(compiled: Callable, storage: torch.dtype) -> None:
    for num_rows, num_columns in ((0, 5), (1, 1), (300, 700)):
        rows = random(num_rows, num_columns, seed=1, dtype=storage)
        ours, theirs = (kind.column_sums(rows) for kind in (compiled(storage), TorchPointwise()))
        assert ours.dtype == theirs.dtype == wide_dtype(storage)
        torch.testing.assert_close(ours, rows.to(ours.dtype).sum(0), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(theirs, rows.to(ours.dtype).sum(0), rtol=1e-5, atol=1e-4)


def test_exponentials_are_exact_to_the_last_places(compiled: Callable) -> None:
    """Through the only doors that there are: the softmax's exp_logits, the gates and the cell output."""
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


@pytest.mark.parametrize("kernels", ["C", "Triton"], indirect=True)
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_nan_passes_through(kernels: Callable, storage: torch.dtype) -> None:
    """A model that has diverged must be seen to: no clip, maximum or mask may hide it."""
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


def test_kernels_become_machine_code() -> None:
    """For Ampere and Hopper; the compiler refuses what the interpreter lets pass."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.model.compile_kernels", "80", "90"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * 4 * 3 * 2
    assert all(int(line.split()[-1]) > 1000 for line in lines)


def test_what_triton_cannot_do_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no GPU, a compiler that fails is one line in the log, and nothing else."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    why = triton_problem(torch.device("cuda"))
    assert why and "\n" not in why
    monkeypatch.setenv(native.SWITCH, "0")
    assert native.SWITCH in triton_problem(torch.device("cuda"))
