"""The row-wise parts of an LSTM step on a GPU: one kernel each, where torch's operations would be ten or twenty.

The same in other words as pointwise_torch.py and pointwise.c, a program for each row and block of columns. Rows are
stored in float32, float64 or bfloat16 and computed with in the dtype of the cells.
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
    return tl.where(z < 0.390625, x + x * p, large)  # for a small x the difference loses digits


@triton.jit
def _bounded(x, CLIP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Clip to +-CLIP; a NaN passes. Triton would round a bare constant to float32."""
    clip = tl.full(x.shape, CLIP, x.dtype)
    x = tl.where(x < -clip, -clip, x)
    return tl.where(x > clip, clip, x)


@triton.jit
def _cell_forward(  # type: ignore[no-untyped-def]
    gates, bias, previous_cells, cells, cell_output, C, CLIP: tl.constexpr, CLIPS: tl.constexpr,
    CONTINUES: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    row, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, at = k < C, gates + row * 4 * C + k
    i = _sigmoid(tl.load(at, inside).to(WIDE) + tl.load(bias + k, inside))
    f = _sigmoid(tl.load(at + C, inside).to(WIDE) + tl.load(bias + C + k, inside))
    g = _tanh(tl.load(at + 2 * C, inside).to(WIDE) + tl.load(bias + 2 * C + k, inside))
    o = _sigmoid(tl.load(at + 3 * C, inside).to(WIDE) + tl.load(bias + 3 * C + k, inside))
    c = i * g
    if CONTINUES:
        c += f * tl.load(previous_cells + row * C + k, inside)
    if CLIPS:
        c = _bounded(c, CLIP)
    tl.store(cells + row * C + k, c, inside)
    tl.store(cell_output + row * C + k, o * _tanh(c), inside)
    tl.store(at, i, inside)
    tl.store(at + C, f, inside)
    tl.store(at + 2 * C, g, inside)
    tl.store(at + 3 * C, o, inside)


@triton.jit
def _cell_backward(  # type: ignore[no-untyped-def]
    gates, previous_cells, cells, cell_output, d_cell_output, d_cells, C, CLIP: tl.constexpr, CLIPS: tl.constexpr,
    CONTINUES: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    row, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, at = k < C, gates + row * 4 * C + k
    i, f = tl.load(at, inside).to(WIDE), tl.load(at + C, inside).to(WIDE)
    g, o = tl.load(at + 2 * C, inside).to(WIDE), tl.load(at + 3 * C, inside).to(WIDE)
    c = tl.load(cells + row * C + k, inside)
    shown, d_shown = _tanh(c), tl.load(d_cell_output + row * C + k, inside).to(WIDE)
    d_c = tl.load(d_cells + row * C + k, inside) + d_shown * o * (1 - shown * shown)
    if CLIPS:
        d_c = tl.where(tl.abs(c) >= tl.full(c.shape, CLIP, WIDE), 0.0, d_c)
    tl.store(cell_output + row * C + k, o * shown, inside)  # perhaps where the cells were
    tl.store(at, d_c * g * i * (1 - i), inside)
    if CONTINUES:
        tl.store(at + C, d_c * tl.load(previous_cells + row * C + k, inside) * f * (1 - f), inside)
    else:
        tl.store(at + C, tl.full(f.shape, 0.0, WIDE), inside)
    tl.store(at + 2 * C, d_c * i * (1 - g * g), inside)
    tl.store(at + 3 * C, d_shown * shown * o * (1 - o), inside)
    tl.store(d_cells + row * C + k, d_c * f, inside)


@triton.jit
def _clip_forward(  # type: ignore[no-untyped-def]
    hidden, mask, D, CLIP: tl.constexpr, CLIPS: tl.constexpr, DROPS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, at = k < D, tl.program_id(0).to(tl.int64) * D + k
    h = tl.load(hidden + at, inside).to(WIDE)
    if CLIPS:
        h = _bounded(h, CLIP)
    if DROPS:
        h *= tl.load(mask + at, inside)
    tl.store(hidden + at, h, inside)


@triton.jit
def _clip_backward(  # type: ignore[no-untyped-def]
    d_hidden, d_recurrent, hidden, mask, D, CLIP: tl.constexpr, CLIPS: tl.constexpr, DROPS: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, at = k < D, tl.program_id(0).to(tl.int64) * D + k
    d = tl.load(d_hidden + at, inside).to(WIDE) + tl.load(d_recurrent + at, inside).to(WIDE)
    kept = tl.full(d.shape, 1.0, WIDE)
    if DROPS:
        kept = tl.load(mask + at, inside)
        d *= kept
    if CLIPS:
        bound = (kept * tl.full(d.shape, CLIP, WIDE)).to(hidden.dtype.element_ty).to(WIDE)  # as hidden was rounded
        d = tl.where(tl.abs(tl.load(hidden + at, inside).to(WIDE)) >= bound, 0.0, d)
    tl.store(d_hidden + at, d, inside)


class TritonPointwise(TorchPointwise):
    """The steps of an LSTM by the kernels above, the rest by torch."""

    def cell_forward(
        self, gates: Tensor, bias: Tensor, previous_cells: Tensor | None, cells: Tensor, cell_output: Tensor,
        clip: float,
    ) -> None:
        _cell_forward[_grid(cells)](
            gates, bias, cells if previous_cells is None else previous_cells, cells, cell_output, cells.shape[1],
            **_how(gates, clip), CONTINUES=previous_cells is not None,
        )

    def cell_backward(
        self, gates: Tensor, previous_cells: Tensor | None, cells: Tensor, cell_output: Tensor, d_cell_output: Tensor,
        d_cells: Tensor, clip: float,
    ) -> None:
        _cell_backward[_grid(cells)](
            gates, cells if previous_cells is None else previous_cells, cells, cell_output, d_cell_output, d_cells,
            cells.shape[1], **_how(gates, clip), CONTINUES=previous_cells is not None,
        )

    def clip_forward(self, hidden: Tensor, mask: Tensor | None, clip: float) -> None:
        if mask is not None or clip < math.inf:
            _clip_forward[_grid(hidden)](
                hidden, hidden if mask is None else mask, hidden.shape[1],
                **_how(hidden, clip), DROPS=mask is not None,
            )

    def clip_backward(
        self, d_hidden: Tensor, d_recurrent: Tensor, hidden: Tensor, mask: Tensor | None, clip: float
    ) -> None:
        _clip_backward[_grid(hidden)](
            d_hidden, d_recurrent, hidden, hidden if mask is None else mask, hidden.shape[1],
            **_how(hidden, clip), DROPS=mask is not None,
        )


def _grid(rows: Tensor) -> tuple[int, int]:
    return len(rows), triton.cdiv(rows.shape[1], _BLOCK)


def _how(stored: Tensor, clip: float) -> dict[str, Any]:
    """Return what is known when a kernel is compiled; a tensor that a kernel does not read may be any."""
    wide = tl.float64 if wide_dtype(stored.dtype) == torch.float64 else tl.float32
    clips = clip < math.inf
    return {"CLIP": clip if clips else 0.0, "CLIPS": clips, "WIDE": wide, "BLOCK": _BLOCK}


def check(device: torch.device) -> None:
    """Compare a step on ``device`` with torch's.

    Raises:
        RuntimeError: If it differs; and whatever Triton raises.
    """
    results = []
    for kind in (TritonPointwise(), TorchPointwise()):
        generator = torch.Generator().manual_seed(1)
        gates, bias, previous_cells, cells, d_cells = (
            torch.randn(*shape, generator=generator).to(device) for shape in ((3, 20), (20,), (3, 5), (3, 5), (3, 5))
        )
        cell_output, d_cell_output = torch.empty_like(cells), d_cells.clone()
        kind.cell_forward(gates, bias, previous_cells, cells, cell_output, 0.5)
        kind.clip_forward(cell_output, None, 0.4)
        kind.clip_backward(d_cell_output, d_cells, cell_output, None, 0.4)
        kind.cell_backward(gates, previous_cells, cells, cells, d_cell_output, d_cells, 0.5)
        results.append(torch.cat([gates, cells, cell_output, d_cells], 1))
    if not torch.allclose(results[0], results[1], rtol=1e-4, atol=1e-5):
        raise RuntimeError("its results differ from torch's")
