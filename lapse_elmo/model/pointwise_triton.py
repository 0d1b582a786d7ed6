"""The pointwise kernels of an LSTM step in Triton: one kernel launch each, instead of ten to twenty torch operations.

They compute the same as pointwise_torch.py and pointwise.c (which has the formulas). Each program instance handles one
row and one block of columns. Rows are stored in float32, float64 or bfloat16; arithmetic is in the dtype of the cells.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lapse_elmo.model.pointwise_torch import TorchPointwise, wide_dtype

_BLOCK = 1024


@triton.jit
def _sigmoid(x):  # type: ignore[no-untyped-def]
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    large = 2 / (1 + tl.exp(-2 * x)) - 1
    if x.dtype == tl.float64:
        return large
    z = x * x
    p = ((((-0.0060751666 * z + 0.020982297) * z - 0.053847756) * z + 0.13332748) * z - 0.33333328) * z
    return tl.where(z < 0.390625, x + x * p, large)  # the subtraction in `large` cancels digits if x is small


@triton.jit
def _clip(x, CLIP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Clip to +-CLIP, preserving NaN."""
    clip = tl.full(x.shape, CLIP, x.dtype)  # Triton would round a Python constant to float32
    x = tl.where(x < -clip, -clip, x)
    return tl.where(x > clip, clip, x)


@triton.jit
def _cell_forward(  # type: ignore[no-untyped-def]
    gates, bias, previous_cells, cells, cell_output, C, CLIP: tl.constexpr, HAS_CLIP: tl.constexpr,
    HAS_PREVIOUS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    row, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_bounds, gate_ptr = k < C, gates + row * 4 * C + k
    i = _sigmoid(tl.load(gate_ptr, in_bounds).to(WIDE) + tl.load(bias + k, in_bounds))
    f = _sigmoid(tl.load(gate_ptr + C, in_bounds).to(WIDE) + tl.load(bias + C + k, in_bounds))
    g = _tanh(tl.load(gate_ptr + 2 * C, in_bounds).to(WIDE) + tl.load(bias + 2 * C + k, in_bounds))
    o = _sigmoid(tl.load(gate_ptr + 3 * C, in_bounds).to(WIDE) + tl.load(bias + 3 * C + k, in_bounds))
    c = i * g
    if HAS_PREVIOUS:
        c += f * tl.load(previous_cells + row * C + k, in_bounds)
    if HAS_CLIP:
        c = _clip(c, CLIP)
    tl.store(cells + row * C + k, c, in_bounds)
    tl.store(cell_output + row * C + k, o * _tanh(c), in_bounds)
    tl.store(gate_ptr, i, in_bounds)
    tl.store(gate_ptr + C, f, in_bounds)
    tl.store(gate_ptr + 2 * C, g, in_bounds)
    tl.store(gate_ptr + 3 * C, o, in_bounds)


@triton.jit
def _cell_backward(  # type: ignore[no-untyped-def]
    gates, previous_cells, cells, cell_output, d_cell_output, d_cells, C, CLIP: tl.constexpr, HAS_CLIP: tl.constexpr,
    HAS_PREVIOUS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    row, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_bounds, gate_ptr = k < C, gates + row * 4 * C + k
    i, f = tl.load(gate_ptr, in_bounds).to(WIDE), tl.load(gate_ptr + C, in_bounds).to(WIDE)
    g, o = tl.load(gate_ptr + 2 * C, in_bounds).to(WIDE), tl.load(gate_ptr + 3 * C, in_bounds).to(WIDE)
    c = tl.load(cells + row * C + k, in_bounds)
    tanh_c, d_m = _tanh(c), tl.load(d_cell_output + row * C + k, in_bounds).to(WIDE)
    d_c = tl.load(d_cells + row * C + k, in_bounds) + d_m * o * (1 - tanh_c * tanh_c)
    if HAS_CLIP:
        d_c = tl.where(tl.abs(c) >= tl.full(c.shape, CLIP, WIDE), 0.0, d_c)
    tl.store(cell_output + row * C + k, o * tanh_c, in_bounds)  # may overwrite the cells, which have been read
    tl.store(gate_ptr, d_c * g * i * (1 - i), in_bounds)
    if HAS_PREVIOUS:
        tl.store(gate_ptr + C, d_c * tl.load(previous_cells + row * C + k, in_bounds) * f * (1 - f), in_bounds)
    else:
        tl.store(gate_ptr + C, tl.full(f.shape, 0.0, WIDE), in_bounds)
    tl.store(gate_ptr + 2 * C, d_c * i * (1 - g * g), in_bounds)
    tl.store(gate_ptr + 3 * C, d_m * tanh_c * o * (1 - o), in_bounds)
    tl.store(d_cells + row * C + k, d_c * f, in_bounds)


@triton.jit
def _clip_forward(  # type: ignore[no-untyped-def]
    hidden, mask, D, CLIP: tl.constexpr, HAS_CLIP: tl.constexpr, HAS_MASK: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_bounds, offset = k < D, tl.program_id(0).to(tl.int64) * D + k
    h = tl.load(hidden + offset, in_bounds).to(WIDE)
    if HAS_CLIP:
        h = _clip(h, CLIP)
    if HAS_MASK:
        h *= tl.load(mask + offset, in_bounds)
    tl.store(hidden + offset, h, in_bounds)


@triton.jit
def _clip_backward(  # type: ignore[no-untyped-def]
    d_hidden, d_recurrent, hidden, mask, D, CLIP: tl.constexpr, HAS_CLIP: tl.constexpr, HAS_MASK: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_bounds, offset = k < D, tl.program_id(0).to(tl.int64) * D + k
    d = tl.load(d_hidden + offset, in_bounds).to(WIDE) + tl.load(d_recurrent + offset, in_bounds).to(WIDE)
    scale = tl.full(d.shape, 1.0, WIDE)
    if HAS_MASK:
        scale = tl.load(mask + offset, in_bounds)
        d *= scale
    if HAS_CLIP:
        bound = (scale * tl.full(d.shape, CLIP, WIDE)).to(hidden.dtype.element_ty).to(WIDE)  # rounded like hidden
        d = tl.where(tl.abs(tl.load(hidden + offset, in_bounds).to(WIDE)) >= bound, 0.0, d)
    tl.store(d_hidden + offset, d, in_bounds)


class TritonPointwise(TorchPointwise):
    """The backend for GPUs: the kernels above for the steps of an LSTM, torch for everything else.

    A kernel gets some other tensor in place of an argument that is None, and does not read it.
    """

    def cell_forward(
        self, gates: Tensor, bias: Tensor, previous_cells: Tensor | None, cells: Tensor, cell_output: Tensor,
        clip: float,
    ) -> None:
        _launch(
            _cell_forward, cells, gates, bias, cells if previous_cells is None else previous_cells, cells, cell_output,
            **_constexprs(gates, clip), HAS_PREVIOUS=previous_cells is not None,
        )

    def cell_backward(
        self, gates: Tensor, previous_cells: Tensor | None, cells: Tensor, cell_output: Tensor, d_cell_output: Tensor,
        d_cells: Tensor, clip: float,
    ) -> None:
        _launch(
            _cell_backward, cells, gates, cells if previous_cells is None else previous_cells, cells, cell_output,
            d_cell_output, d_cells, **_constexprs(gates, clip), HAS_PREVIOUS=previous_cells is not None,
        )

    def clip_forward(self, hidden: Tensor, mask: Tensor | None, clip: float) -> None:
        if mask is not None or clip < math.inf:
            _launch(
                _clip_forward, hidden, hidden, hidden if mask is None else mask, **_constexprs(hidden, clip),
                HAS_MASK=mask is not None,
            )

    def clip_backward(
        self, d_hidden: Tensor, d_recurrent: Tensor, hidden: Tensor, mask: Tensor | None, clip: float
    ) -> None:
        _launch(
            _clip_backward, hidden, d_hidden, d_recurrent, hidden, hidden if mask is None else mask,
            **_constexprs(hidden, clip), HAS_MASK=mask is not None,
        )


def _launch(kernel: Any, rows: Tensor, *pointers: Tensor, **constants: Any) -> None:
    """Run a kernel over all ``rows`` (n, width) and their columns.

    Triton launches kernels on torch's current device, not on that of their tensors.
    """
    with torch.cuda.device_of(rows):
        kernel[_grid(rows)](*pointers, rows.shape[1], **constants)


def _grid(rows: Tensor) -> tuple[int, int]:
    return len(rows), triton.cdiv(rows.shape[1], _BLOCK)


def _constexprs(stored: Tensor, clip: float) -> dict[str, Any]:
    """Return the compile-time constants that all kernels take."""
    wide = tl.float64 if wide_dtype(stored.dtype) == torch.float64 else tl.float32
    has_clip = clip < math.inf
    return {"CLIP": clip if has_clip else 0.0, "HAS_CLIP": has_clip, "WIDE": wide, "BLOCK": _BLOCK}


def check(device: torch.device) -> None:
    """Run one small LSTM step on ``device`` and compare it with the torch backend.

    Raises:
        RuntimeError: If the results differ.
        Exception: Any exception of Triton's, its compiler or the driver.
    """
    results = []
    for backend in (TritonPointwise(), TorchPointwise()):
        generator = torch.Generator().manual_seed(1)
        gates, bias, previous_cells, cells, d_cells = (
            torch.randn(*shape, generator=generator).to(device) for shape in ((3, 20), (20,), (3, 5), (3, 5), (3, 5))
        )
        cell_output, d_cell_output = torch.empty_like(cells), d_cells.clone()
        backend.cell_forward(gates, bias, previous_cells, cells, cell_output, 0.5)
        backend.clip_forward(cell_output, None, 0.4)
        backend.clip_backward(d_cell_output, d_cells, cell_output, None, 0.4)
        backend.cell_backward(gates, previous_cells, cells, cells, d_cell_output, d_cells, 0.5)
        results.append(torch.cat([gates, cells, cell_output, d_cells], 1))
    if not torch.allclose(results[0], results[1], rtol=1e-4, atol=1e-5):
        raise RuntimeError("the Triton kernels' results differ from torch's")
