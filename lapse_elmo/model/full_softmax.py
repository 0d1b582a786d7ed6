"""The softmax over all words, for evaluation, with the rows of the words coming in chunks."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lapse_elmo.model.lanes import both
from lapse_elmo.model.pointwise import pointwise

TARGETS_AT_ONCE = 512
CLASSES_AT_ONCE = 2048  # with 512 targets 4 MiB of float32 logits, which stay in the cache between passes


@torch.no_grad()
def full_softmax_nll(context: Tensor, chunks: Iterable[tuple[int, Tensor]], target: Tensor) -> Tensor:
    """nll of each target under the softmax over all V classes, in nats.

    Products are in the dtype of ``context``, sums over classes in float64.

    :param context: (N, D) predicting vectors; N may be 0.
    :param chunks: (first class, rows (n, D + 1)) that cover all classes once; a row's last entry is the bias.
    :param target: (N,) int64 classes in [0, V).
    :return: (N,) float64.
    """
    largest = torch.full((len(context),), -math.inf, dtype=context.dtype, device=context.device)
    total = torch.zeros(len(context), dtype=torch.float64, device=context.device)
    target_logit = torch.full_like(total, -math.inf)
    half = -(-len(context) // 2)
    halves = slice(0, half), slice(half, len(context))
    for first, rows in chunks:
        here = torch.nonzero((target >= first) & (target < first + len(rows)))[:, 0]
        own = rows.index_select(0, target[here] - first).to(torch.float64)
        target_logit[here] = (context[here].to(torch.float64) * own[:, :-1]).sum(1) + own[:, -1]
        # (n, D) without the bias and whatever else the server's rows hold.
        weight, bias = rows[:, :-1].contiguous(), rows[:, -1].contiguous()

        def add(part: int, weight: Tensor = weight, bias: Tensor = bias) -> None:
            _add_classes(context[halves[part]], weight, bias, largest[halves[part]], total[halves[part]])

        both(add, context.device, "full softmax, but products")
    return total.log_().add_(largest).sub_(target_logit)


def _add_classes(context: Tensor, weight: Tensor, bias: Tensor, largest: Tensor, total: Tensor) -> None:
    """Bring ``largest`` and ``total`` of all predicting vectors up to date with more classes."""
    kernels = pointwise(context)
    buffer = context.new_empty(min(TARGETS_AT_ONCE, len(context)) * min(CLASSES_AT_ONCE, len(weight)))
    for low in range(0, len(weight), CLASSES_AT_ONCE):
        classes = slice(low, min(low + CLASSES_AT_ONCE, len(weight)))
        some, transposed = bias[classes], weight[classes].t()
        for start in range(0, len(context), TARGETS_AT_ONCE):
            targets = slice(start, min(start + TARGETS_AT_ONCE, len(context)))
            shape = targets.stop - targets.start, classes.stop - classes.start
            logits = torch.mm(context[targets], transposed, out=buffer[: shape[0] * shape[1]].view(shape))
            kernels.softmax_totals(logits, some, largest[targets], total[targets])
