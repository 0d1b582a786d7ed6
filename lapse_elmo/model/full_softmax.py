"""The softmax over all words, for evaluation, with the rows of the words coming in chunks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lapse_elmo.model.pointwise import pointwise
from lapse_elmo.model.two_threads import run_two_threads

TARGETS_AT_ONCE = 512
CLASSES_AT_ONCE = 2048  # with 512 targets 4 MiB of float32 logits, which stay in the cache between passes


class SoftmaxParts(NamedTuple):
    """What some classes add to the softmax of N predicting vectors, (N,) each.

    ``largest``: the largest logit. ``total``: the sum of exp(logit - largest), float64. ``target_logit``: the target's
    logit, float64, -inf where the target is none of the classes.
    """

    largest: Tensor
    total: Tensor
    target_logit: Tensor


@torch.no_grad()
def full_softmax_nll(context: Tensor, chunks: Iterable[tuple[int, Tensor]], target: Tensor) -> Tensor:
    """Return the nll of each target under the softmax over all V classes, in nats.

    Products are in the dtype of ``context``, sums over classes in float64.

    Args:
        context: (N, D) predicting vectors; N may be 0.
        chunks: (first class, rows (n, D + 1)) that cover all classes once; a row's last entry is the bias.
        target: (N,) int64 classes in [0, V).

    Returns:
        (N,) float64.
    """
    classes = ((torch.arange(first, first + len(rows), device=rows.device), rows) for first, rows in chunks)
    return nll_of([softmax_parts(context, classes, target)])


def nll_of(parts: Sequence[SoftmaxParts]) -> Tensor:
    """nll (N,) float64 of targets, from the parts of disjoint sets of classes that are all classes together."""
    (first, *others) = parts
    if not others:
        return torch.log(first.total).add_(first.largest).sub_(first.target_logit)
    largest = torch.stack([part.largest for part in parts]).amax(0)
    # A part without classes has a total of 0 and a largest logit of -inf, which adds nothing.
    total = sum(part.total * torch.exp((part.largest - largest).to(torch.float64)) for part in parts)
    target_logit = torch.stack([part.target_logit for part in parts]).amax(0)
    assert isinstance(total, Tensor)
    return total.log_().add_(largest).sub_(target_logit)


@torch.no_grad()
def softmax_parts(context: Tensor, chunks: Iterable[tuple[Tensor, Tensor]], target: Tensor) -> SoftmaxParts:
    """Return what the classes of ``chunks`` add to the softmax.

    Args:
        context: (N, D) predicting vectors; N may be 0.
        chunks: (classes (n,) int64 ascending, rows (n, D + 1)); a row's last entry is the bias.
        target: (N,) int64 classes, which need not be among those of ``chunks``.
    """
    largest = torch.full((len(context),), -math.inf, dtype=context.dtype, device=context.device)
    total = torch.zeros(len(context), dtype=torch.float64, device=context.device)
    target_logit = torch.full_like(total, -math.inf)
    half = -(-len(context) // 2)
    halves = slice(0, half), slice(half, len(context))
    for classes, rows in chunks:
        place = torch.searchsorted(classes, target).clamp_(max=len(classes) - 1)
        here = torch.nonzero(classes[place] == target)[:, 0]
        own = rows.index_select(0, place[here]).to(torch.float64)
        target_logit[here] = (context[here].to(torch.float64) * own[:, :-1]).sum(1) + own[:, -1]
        # (n, D) without the bias and whatever else the server's rows hold.
        weight, bias = rows[:, :-1].contiguous(), rows[:, -1].contiguous()

        def add(part: int, weight: Tensor = weight, bias: Tensor = bias) -> None:
            _add_classes(context[halves[part]], weight, bias, largest[halves[part]], total[halves[part]])

        run_two_threads(add, context.device, "full softmax (excl. matmul)")
    return SoftmaxParts(largest, total, target_logit)


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
