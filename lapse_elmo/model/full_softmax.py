"""The softmax over the whole vocabulary, for evaluation, computed over chunks of the softmax table.

Each chunk of classes updates a running maximum and a running sum of exponentials per target (online softmax), so the
(N, V) logits never exist.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lapse_elmo.model.pointwise import pointwise
from lapse_elmo.model.products import Matmul
from lapse_elmo.model.two_threads import run_two_threads

TARGET_BLOCK = 512
CLASS_BLOCK = 2048  # 512 x 2048 float32 logits are 4 MiB, which stay in the cache between passes


class SoftmaxParts(NamedTuple):
    """Partial softmax of N context vectors over a subset of the classes.

    Attributes:
        running_max: (N,) largest logit, in the dtype of the context vectors; -inf for an empty subset.
        running_sum: (N,) float64, sum of exp(logit - running_max).
        target_logit: (N,) float64 logit of the target, -inf if the target is not in the subset.
    """

    running_max: Tensor
    running_sum: Tensor
    target_logit: Tensor


@torch.no_grad()
def full_softmax_nll(context: Tensor, chunks: Iterable[tuple[int, Tensor]], target: Tensor) -> Tensor:
    """Return the nll of each target under the softmax over all V classes, in nats.

    Logits are computed in the dtype of ``context``, sums over classes in float64.

    Args:
        context: (N, D) context vectors; N may be 0.
        chunks: Pairs (first class, rows (n, D + 1)) that cover each class once; the last column is the bias.
        target: (N,) int64 classes in [0, V).

    Returns:
        (N,) float64.
    """
    classes = ((torch.arange(first, first + len(rows), device=rows.device), rows) for first, rows in chunks)
    return nll_of([softmax_parts(context, classes, target)])


def nll_of(parts: Sequence[SoftmaxParts]) -> Tensor:
    """Return the nll (N,) float64 of the targets from partial softmaxes whose subsets partition the classes."""
    (first, *others) = parts
    if not others:
        return torch.log(first.running_sum).add_(first.running_max).sub_(first.target_logit)
    running_max = torch.stack([part.running_max for part in parts]).amax(0)
    # A part without classes has running_sum 0 and running_max -inf, so it contributes nothing.
    total = sum(part.running_sum * torch.exp((part.running_max - running_max).to(torch.float64)) for part in parts)
    target_logit = torch.stack([part.target_logit for part in parts]).amax(0)
    assert isinstance(total, Tensor)
    return total.log_().add_(running_max).sub_(target_logit)


@torch.no_grad()
def softmax_parts(context: Tensor, chunks: Iterable[tuple[Tensor, Tensor]], target: Tensor) -> SoftmaxParts:
    """Return the partial softmax over the classes of ``chunks``.

    Args:
        context: (N, D) context vectors; N may be 0.
        chunks: Pairs (classes (n,) int64 ascending, rows (n, D + 1)); the last column is the bias.
        target: (N,) int64 classes, which need not be among those of ``chunks``.
    """
    running_max = torch.full((len(context),), -math.inf, dtype=context.dtype, device=context.device)
    running_sum = torch.zeros(len(context), dtype=torch.float64, device=context.device)
    target_logit = torch.full_like(running_sum, -math.inf)
    middle = -(-len(context) // 2)
    slices = slice(0, middle), slice(middle, len(context))  # one per thread
    for classes, rows in chunks:
        index = torch.searchsorted(classes, target).clamp_(max=len(classes) - 1)
        present = torch.nonzero(classes[index] == target)[:, 0]
        target_rows = rows.index_select(0, index[present]).to(torch.float64)
        target_logit[present] = (context[present].to(torch.float64) * target_rows[:, :-1]).sum(1) + target_rows[:, -1]
        # Matrix products and kernels want contiguous memory: copy the bias column off.
        weight, bias = rows[:, :-1].contiguous(), rows[:, -1].contiguous()

        def add(part: int, weight: Tensor = weight, bias: Tensor = bias) -> None:
            _add_classes(context[slices[part]], weight, bias, running_max[slices[part]], running_sum[slices[part]])

        run_two_threads(add, context.device, "full softmax (excl. matmul)")
    return SoftmaxParts(running_max, running_sum, target_logit)


def _add_classes(context: Tensor, weight: Tensor, bias: Tensor, running_max: Tensor, running_sum: Tensor) -> None:
    """Update ``running_max`` and ``running_sum`` of all context vectors in place with further classes."""
    kernels, products = pointwise(context), Matmul.of("fp32", context)
    buffer = context.new_empty(min(TARGET_BLOCK, len(context)) * min(CLASS_BLOCK, len(weight)))
    for low in range(0, len(weight), CLASS_BLOCK):
        classes = slice(low, min(low + CLASS_BLOCK, len(weight)))
        block_bias, transposed = bias[classes], weight[classes].t()
        for start in range(0, len(context), TARGET_BLOCK):
            targets = slice(start, min(start + TARGET_BLOCK, len(context)))
            shape = targets.stop - targets.start, classes.stop - classes.start
            logits = products.mm_into(buffer[: shape[0] * shape[1]].view(shape), context[targets], transposed)
            kernels.softmax_totals(logits, block_bias, running_max[targets], running_sum[targets])
