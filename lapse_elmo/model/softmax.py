"""The sampled softmax over words, for training, and the log-uniform sampler's expected counts.

Losses are negative log-likelihoods (nll), summed over targets, in nats.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_NEWTON_STEPS = 100


def log_uniform_probability(classes: Tensor, num_classes: int) -> Tensor:
    """P(k) = log((k + 2) / (k + 1)) / log(V + 1), the chance that one log-uniform draw gives class k.

    This is TensorFlow's log-uniform candidate sampler: nearly Zipf's law for classes in the order of frequency.

    :param classes: integer classes in [0, V), any shape.
    :return: float64, of the same shape.
    """
    return torch.log1p(1.0 / (classes.to(torch.float64) + 1.0)) / math.log(num_classes + 1.0)


@functools.lru_cache(maxsize=64)
def expected_num_tries(num_classes: int, num_samples: int) -> float:
    """The number t of draws after which S distinct classes are expected: sum_k 1 - (1 - P(k))^t = S.

    Infinite where S >= V. Solved by Newton's method from below (the left side grows and is concave in t, so the steps
    never overshoot); about 0.2 s for V = 793,471, and remembered.
    """
    if num_samples >= num_classes:
        return math.inf
    log_miss = torch.log1p(-log_uniform_probability(torch.arange(num_classes), num_classes))
    tries = float(num_samples)
    for _ in range(_NEWTON_STEPS):
        miss = torch.exp(tries * log_miss)
        shortfall = num_samples - float((1.0 - miss).sum())
        change = shortfall / float((-log_miss * miss).sum())
        tries += change
        if change <= 1e-10 * tries:
            break
    return tries


def log_expected_count(
    classes: Tensor, num_classes: int, num_samples: int, num_tries: float | None = None, *, replacement: bool = False
) -> Tensor:
    """Log of how often each class is expected among the S samples of a draw.

    Without replacement a class occurs at most once, and is expected 1 - (1 - P)^tries times; with replacement S * P.

    :param classes: integer classes in [0, V), any shape.
    :param num_classes: V.
    :param num_samples: S.
    :param num_tries: draws that were needed to find S distinct classes (as TensorFlow's and AllenNLP's samplers
        count them); None takes :func:`expected_num_tries`. Not used with replacement.
    :return: float64, of the same shape.
    """
    probability = log_uniform_probability(classes, num_classes)
    if replacement:
        return torch.log(num_samples * probability)
    tries = expected_num_tries(num_classes, num_samples) if num_tries is None else num_tries
    return torch.log(-torch.expm1(tries * torch.log1p(-probability)))


def sampled_softmax_nll(
    context: Tensor,
    weight: Tensor,
    bias: Tensor,
    target_index: Tensor,
    sample_index: Tensor,
    log_expected: Tensor | None = None,
    chunk: int = 256,
) -> Tensor:
    """Summed nll of the targets, each against itself and the shared samples, in nats.

    A logit is ``weight . context + bias - log_expected``, for targets and samples alike. A sample that equals the
    target is left out for that target, however often it was drawn. Where the samples are all rows, each once, and
    ``log_expected`` is None, this is exactly the full softmax over these rows.

    The gradients of ``context``, ``weight`` and ``bias`` are computed here, in the forward pass, ``chunk`` targets at
    a time, so that the (N, S) logits never exist; ``backward`` only scales them. It therefore runs once per call.
    Sums are float64 for a float64 ``context`` and float32 for any other.

    :param context: (N, D) predicting vectors; N may be 0.
    :param weight: (U, D) softmax rows of the distinct words.
    :param bias: (U,) their biases.
    :param target_index: (N,) int64 row of each target, in [0, U).
    :param sample_index: (S,) int64 rows of the samples, in [0, U), repeats allowed; S may be 0.
    :param log_expected: (U,) :func:`log_expected_count` of each row; no gradient.
    :param chunk: targets at a time; extra memory is about 2 * chunk * S floats.
    :return: a scalar, float64 for a float64 ``context`` and else float32.
    """
    return _SampledSoftmax.apply(context, weight, bias, target_index, sample_index, log_expected, chunk)


class _SampledSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        context: Tensor,
        weight: Tensor,
        bias: Tensor,
        target_index: Tensor,
        sample_index: Tensor,
        log_expected: Tensor | None,
        chunk: int,
    ) -> Tensor:
        wide = torch.float64 if context.dtype == torch.float64 else torch.float32
        offset = bias.to(wide) if log_expected is None else (bias.to(wide) - log_expected.to(wide))
        needs_gradients = any(ctx.needs_input_grad[:3])
        nll, gradients = _nll_and_gradients(
            context.to(wide), weight.to(wide), offset, target_index, sample_index, chunk, needs_gradients
        )
        if needs_gradients:
            likes = (context, weight, bias)
            ctx.save_for_backward(*(g.to(like.dtype) for g, like in zip(gradients, likes, strict=True)))
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            gradient * upstream if needed else None
            for gradient, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
        ]
        return (*gradients, None, None, None, None)


def _nll_and_gradients(
    context: Tensor,
    weight: Tensor,
    offset: Tensor,
    target_index: Tensor,
    sample_index: Tensor,
    chunk: int,
    needs_gradients: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Summed nll, and its gradients for ``context``, ``weight`` and ``offset`` where they are needed."""
    num_targets, num_samples = len(context), len(sample_index)
    sample_weight, sample_offset = weight.index_select(0, sample_index), offset.index_select(0, sample_index)
    hit_rows, hit_columns, hit_ends = _hits(target_index, sample_index, chunk)
    buffer = context.new_empty(min(chunk, num_targets), num_samples)
    nll = context.new_zeros(())
    if needs_gradients:
        d_context, d_weight, d_offset = (torch.zeros_like(value) for value in (context, weight, offset))
        d_sample_weight, d_sample_offset = torch.zeros_like(sample_weight), torch.zeros_like(sample_offset)
    for number, start in enumerate(range(0, num_targets, chunk)):
        rows = slice(start, min(start + chunk, num_targets))
        hits = slice(hit_ends[number], hit_ends[number + 1])
        some, targets = context[rows], target_index[rows]
        target_weight = weight.index_select(0, targets)
        target_logit = (some * target_weight).sum(1) + offset.index_select(0, targets)
        logits = torch.addmm(sample_offset, some, sample_weight.t(), out=buffer[: len(some)])
        logits[hit_rows[hits] - start, hit_columns[hits]] = -math.inf
        # Shifted by the largest logit of each row, so that no exponential overflows and one of them is 1.
        largest = torch.maximum(logits.amax(1), target_logit) if num_samples else target_logit
        odds = logits.sub_(largest[:, None]).exp_()
        target_odds = (target_logit - largest).exp_()
        total = odds.sum(1).add_(target_odds)
        nll += (total.log() + largest - target_logit).sum()
        if not needs_gradients:
            continue
        # The gradient of a logit is its probability, odds / total (less 1 for the target). Dividing the small factors
        # by the totals instead of the odds spares a pass over the (chunk, S) matrix.
        share = total.reciprocal()
        d_target = (target_odds * share).sub_(1.0)
        torch.mm(odds, sample_weight, out=d_context[rows]).mul_(share[:, None])
        d_context[rows].addcmul_(d_target[:, None], target_weight)
        d_sample_weight.addmm_(odds.t(), some * share[:, None])
        d_sample_offset.addmv_(odds.t(), share)
        d_weight.index_add_(0, targets, some * d_target[:, None])
        d_offset.index_add_(0, targets, d_target)
    if not needs_gradients:
        return nll, ()
    d_weight.index_add_(0, sample_index, d_sample_weight)
    d_offset.index_add_(0, sample_index, d_sample_offset)
    return nll, (d_context, d_weight, d_offset)


def _hits(target_index: Tensor, sample_index: Tensor, chunk: int) -> tuple[Tensor, Tensor, list[int]]:
    """Each (target, sample) pair of equal rows, by target, and where each chunk's pairs end (starting with 0)."""
    ordered, columns = torch.sort(sample_index, stable=True)
    first = torch.searchsorted(ordered, target_index)
    counts = torch.searchsorted(ordered, target_index, right=True) - first
    rows = torch.repeat_interleave(torch.arange(len(target_index), device=target_index.device), counts)
    ends = torch.cumsum(counts, 0)
    nth = torch.arange(len(rows), device=rows.device) - (ends - counts)[rows]
    bounds = [0, *ends[chunk - 1 :: chunk].tolist()]
    if len(target_index) % chunk:
        bounds.append(len(rows))
    return rows, columns[first[rows] + nth], bounds
