"""The row-wise parts of the LSTM and of the softmax in torch, for any device: what the others are compared with.

What they do is said in pointwise.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def wide_dtype(storage: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and state for rows stored in ``storage``."""
    return torch.float64 if storage == torch.float64 else torch.float32


class TorchPointwise:
    """In torch, on any device; buffers are kept from call to call."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def cell_forward(
        self, gates: Tensor, bias: Tensor, previous_cells: Tensor | None, cells: Tensor, cell_output: Tensor,
        clip: float,
    ) -> None:
        size, width = cells.shape
        active = gates if gates.dtype == cells.dtype else gates.to(cells.dtype)
        active.add_(bias)
        active[:, : 2 * width].sigmoid_()
        active[:, 2 * width : 3 * width].tanh_()
        active[:, 3 * width :].sigmoid_()
        i, f, g, o = active.chunk(4, 1)
        torch.mul(i, g, out=cells)
        if previous_cells is not None:
            cells.addcmul_(f, previous_cells[:size])
        if clip < math.inf:
            cells.clamp_(-clip, clip)
        if active is gates:
            torch.tanh(cells, out=cell_output).mul_(o)
        else:
            cell_output.copy_(torch.tanh(cells).mul_(o))
            gates.copy_(active)

    def cell_backward(
        self, gates: Tensor, previous_cells: Tensor | None, cells: Tensor, cell_output: Tensor, d_cell_output: Tensor,
        d_cells: Tensor, clip: float,
    ) -> None:
        sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
        tanh_backward = torch.ops.aten.tanh_backward.grad_input
        size = len(cells)
        active = gates if gates.dtype == cells.dtype else gates.to(cells.dtype)
        d_m = d_cell_output if gates.dtype == cells.dtype else d_cell_output.to(cells.dtype)
        i, f, g, o = active.chunk(4, 1)
        tanh_cells = torch.tanh(cells, out=self._buffer("tanh", cells)[:size])
        product = torch.mul(d_m, tanh_cells, out=self._buffer("product", cells)[:size])
        tanh_backward(d_m.mul_(o), tanh_cells, grad_input=d_m)
        d_cells.add_(d_m)
        if clip < math.inf:
            d_cells.masked_fill_(cells.abs() >= clip, 0.0)
        if active is gates:
            torch.mul(o, tanh_cells, out=cell_output)
        else:
            cell_output.copy_(o * tanh_cells)
        sigmoid_backward(product, o, grad_input=o)
        d_input_gate, d_candidate = torch.mul(d_cells, g, out=product), torch.mul(d_cells, i, out=tanh_cells)
        sigmoid_backward(d_input_gate, i, grad_input=i)
        tanh_backward(d_candidate, g, grad_input=g)
        if previous_cells is None:
            d_cells.mul_(f)
            f.zero_()
        else:
            torch.mul(d_cells, previous_cells[:size], out=product)
            d_cells.mul_(f)
            sigmoid_backward(product, f, grad_input=f)
        if active is not gates:
            gates.copy_(active)

    def clip_forward(self, hidden: Tensor, mask: Tensor | None, clip: float) -> None:
        if clip < math.inf:
            hidden.clamp_(-clip, clip)
        if mask is not None:
            hidden.mul_(mask[: len(hidden)])

    def clip_backward(
        self, d_hidden: Tensor, d_recurrent: Tensor, hidden: Tensor, mask: Tensor | None, clip: float
    ) -> None:
        size = len(hidden)
        d_hidden.add_(d_recurrent[:size])
        if mask is not None:
            d_hidden.mul_(mask[:size])
        if clip < math.inf:
            bound = clip if mask is None else (mask[:size] * clip).to(hidden.dtype)
            d_hidden.masked_fill_(hidden.abs() >= bound, 0.0)

    def column_sums(self, rows: Tensor) -> Tensor:
        return rows.sum(0, dtype=wide_dtype(rows.dtype))

    def softmax_rows(
        self, logits: Tensor, bias_minus_log_q: Tensor, target: Tensor, nll: Tensor, inv_sum: Tensor, d_target: Tensor,
        d_bias: Tensor,
    ) -> None:
        exp_logits = logits if logits.dtype == bias_minus_log_q.dtype else logits.to(bias_minus_log_q.dtype)
        exp_logits.add_(bias_minus_log_q)
        largest = torch.maximum(exp_logits.amax(1), target) if exp_logits.shape[1] else target
        exp_logits.sub_(largest[:, None]).exp_()
        own = (target - largest).exp_()
        total = exp_logits.sum(1).add_(own)
        torch.sub(total.log().add_(largest), target, out=nll)
        torch.reciprocal(total, out=inv_sum)
        torch.mul(own, inv_sum, out=d_target).sub_(1.0)
        if exp_logits is not logits:
            exp_logits = logits.copy_(exp_logits).to(bias_minus_log_q.dtype)  # rounded, as the other gradients see them
        d_bias.addmv_(exp_logits.t(), inv_sum)

    def softmax_totals(self, logits: Tensor, bias: Tensor, largest: Tensor, total: Tensor) -> None:
        exp_logits = logits if logits.dtype == bias.dtype else logits.to(bias.dtype)
        exp_logits.add_(bias)
        top = torch.maximum(exp_logits.amax(1), largest)
        some = exp_logits.sub_(top[:, None]).exp_().sum(1)
        total.mul_((largest - top).to(total.dtype).exp_()).add_(some)
        largest.copy_(top)

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        """Return a scratch tensor of at least ``like``'s rows, which the first and largest step of a pass makes."""
        kept: Any = self._kept.get(name)
        if kept is None or len(kept) < len(like) or kept.shape[1:] != like.shape[1:] or kept.dtype != like.dtype:
            kept = self._kept[name] = torch.empty_like(like)
        return kept
