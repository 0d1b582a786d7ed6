"""The softmax over all words, for evaluation, with the rows of the words coming in chunks."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

TARGETS_AT_ONCE = 256
CLASSES_AT_ONCE = 4096  # with 256 targets 4 MiB of float32 logits, which stay in the cache between passes


@torch.no_grad()
def full_softmax_nll(context: Tensor, chunks: Iterable[tuple[int, Tensor]], target: Tensor) -> Tensor:
    """nll of each target under the softmax over all V classes, in nats.

    Products are in the dtype of ``context``, sums over classes in float64.

    :param context: (N, D) predicting vectors; N may be 0.
    :param chunks: (first class, rows (n, D + 1)) that cover all classes once; a row's last entry is the bias.
    :param target: (N,) int64 classes in [0, V).
    :return: (N,) float64.
    """
    log_total = torch.full((len(context),), -math.inf, dtype=torch.float64, device=context.device)
    target_logit = torch.full_like(log_total, -math.inf)
    for first, rows in chunks:
        weight, bias = rows[:, :-1], rows[:, -1]
        here = (target >= first) & (target < first + len(rows))
        own = rows[target[here] - first].to(torch.float64)
        target_logit[here] = (context[here].to(torch.float64) * own[:, :-1]).sum(1) + own[:, -1]
        for low in range(0, len(rows), CLASSES_AT_ONCE):
            classes = slice(low, low + CLASSES_AT_ONCE)
            for start in range(0, len(context), TARGETS_AT_ONCE):
                targets = slice(start, start + TARGETS_AT_ONCE)
                logits = torch.addmm(bias[classes], context[targets], weight[classes].t())
                largest = logits.amax(1, keepdim=True)
                total = logits.sub_(largest).exp_().sum(1).to(torch.float64).log_().add_(largest[:, 0])
                log_total[targets] = torch.logaddexp(log_total[targets], total)
    return log_total - target_logit
