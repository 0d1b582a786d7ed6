"""The pointwise kernels in torch: the fallback for any device, and the reference that the other backends must match.

:class:`lapse_elmo.model.pointwise.Pointwise` documents the methods.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def wide_dtype(storage: torch.dtype) -> torch.dtype:
    """Return the dtype of cells, biases and sums for rows stored in ``storage``."""
    return torch.float64 if storage == torch.float64 else torch.float32


class TorchPointwise:
    """The backend in torch, for any device; reuses its scratch buffers from call to call."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def cell_forward(
        self, gates: Tensor, bias: Tensor, previous_cells: Tensor | None, cells: Tensor, cell_output: Tensor,
        clip: float,
    ) -> None:
        size, width = cells.shape
        activated = gates if gates.dtype == cells.dtype else gates.to(cells.dtype)
        activated.add_(bias)
        activated[:, : 2 * width].sigmoid_()
        activated[:, 2 * width : 3 * width].tanh_()
        activated[:, 3 * width :].sigmoid_()
        i, f, g, o = activated.chunk(4, 1)
        torch.mul(i, g, out=cells)
        if previous_cells is not None:
            cells.addcmul_(f, previous_cells[:size])
        if clip < math.inf:
            cells.clamp_(-clip, clip)
        if activated is gates:
            torch.tanh(cells, out=cell_output).mul_(o)
        else:
            cell_output.copy_(torch.tanh(cells).mul_(o))
            gates.copy_(activated)

    def cell_backward(
        self, gates: Tensor, previous_cells: Tensor | None, cells: Tensor, cell_output: Tensor, d_cell_output: Tensor,
        d_cells: Tensor, clip: float,
    ) -> None:
        sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
        tanh_backward = torch.ops.aten.tanh_backward.grad_input
        size = len(cells)
        activated = gates if gates.dtype == cells.dtype else gates.to(cells.dtype)
        d_m = d_cell_output if gates.dtype == cells.dtype else d_cell_output.to(cells.dtype)
        i, f, g, o = activated.chunk(4, 1)
        tanh_cells = torch.tanh(cells, out=self._buffer("tanh", cells)[:size])
        product = torch.mul(d_m, tanh_cells, out=self._buffer("product", cells)[:size])
        tanh_backward(d_m.mul_(o), tanh_cells, grad_input=d_m)
        d_cells.add_(d_m)
        if clip < math.inf:
            d_cells.masked_fill_(cells.abs() >= clip, 0.0)
        if activated is gates:
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
        if activated is not gates:
            gates.copy_(activated)

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
        row_max = torch.maximum(exp_logits.amax(1), target) if exp_logits.shape[1] else target
        exp_logits.sub_(row_max[:, None]).exp_()
        exp_target = (target - row_max).exp_()
        row_sum = exp_logits.sum(1).add_(exp_target)
        torch.sub(row_sum.log().add_(row_max), target, out=nll)
        torch.reciprocal(row_sum, out=inv_sum)
        torch.mul(exp_target, inv_sum, out=d_target).sub_(1.0)
        if exp_logits is not logits:
            # Round to the storage dtype, so that d_bias sees the same values as the other gradients.
            exp_logits = logits.copy_(exp_logits).to(bias_minus_log_q.dtype)
        d_bias.addmv_(exp_logits.t(), inv_sum)

    def softmax_totals(self, logits: Tensor, bias: Tensor, running_max: Tensor, running_sum: Tensor) -> None:
        exp_logits = logits if logits.dtype == bias.dtype else logits.to(bias.dtype)
        exp_logits.add_(bias)
        new_max = torch.maximum(exp_logits.amax(1), running_max)
        block_sum = exp_logits.sub_(new_max[:, None]).exp_().sum(1)
        running_sum.mul_((running_max - new_max).to(running_sum.dtype).exp_()).add_(block_sum)
        running_max.copy_(new_max)

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        """Return a scratch tensor with at least the rows of ``like``; a pass allocates it at its largest step."""
        buffer: Any = self._buffers.get(name)
        if (
            buffer is None or len(buffer) < len(like) or buffer.shape[1:] != like.shape[1:]
            or buffer.dtype != like.dtype
        ):
            buffer = self._buffers[name] = torch.empty_like(like)
        return buffer
