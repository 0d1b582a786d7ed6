"""The softmax over all words, for evaluation, with the rows of the words coming in chunks."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

_TARGET_CHUNK = 512
_LOGITS = 1 << 23  # logits held at once: 32 MiB of float32


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
        step = max(1, min(_TARGET_CHUNK, _LOGITS // len(rows)))
        for start in range(0, len(context), step):
            logits = torch.addmm(bias, context[start : start + step], weight.t())
            largest = logits.amax(1, keepdim=True)
            total = logits.sub_(largest).exp_().sum(1).to(torch.float64).log_().add_(largest[:, 0])
            log_total[start : start + step] = torch.logaddexp(log_total[start : start + step], total)
    return log_total - target_logit
