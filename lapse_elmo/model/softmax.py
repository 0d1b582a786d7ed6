"""The sampled softmax, for training, and the expected counts of the log-uniform sampler.

Losses are negative log-likelihoods (nll) in nats, summed over the targets.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from lapse_elmo.log_uniform import log_uniform_probability
from lapse_elmo.model.pointwise import pointwise
from lapse_elmo.model.products import WHOLE_ROWS, Matmul

_NEWTON_STEPS = 100  # at most; 5 for V = 793,471 and S = 8,192


@functools.lru_cache(maxsize=64)
def expected_num_tries(num_classes: int, num_samples: int) -> float:
    """Return the number t of draws after which the expected number of distinct classes is S; infinite if S >= V.

    Solves sum_k 1 - (1 - P(k))^t = S by Newton's method, starting below the solution. The left side increases and is
    concave in t, so the steps never overshoot. Takes about 0.2 s for V = 793,471; the result is cached.
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
    """Return the log of each class's expected count among the S samples.

    Without replacement a class occurs at most once; its expected count is 1 - (1 - P)^tries. With replacement, it is
    S * P.

    Args:
        classes: Integer classes in [0, V), any shape.
        num_classes: V.
        num_samples: S.
        num_tries: Number of draws that the sampler needed for S distinct classes, as TensorFlow's and AllenNLP's
            samplers report it; None takes :func:`expected_num_tries`. Unused with replacement.
        replacement: Whether the samples are drawn with replacement.

    Returns:
        Float64, of the shape of ``classes``.
    """
    probability = log_uniform_probability(classes, num_classes)
    if replacement:
        return torch.log(num_samples * probability)
    tries = expected_num_tries(num_classes, num_samples) if num_tries is None else num_tries
    return torch.log(-torch.expm1(tries * torch.log1p(-probability)))


def sampled_softmax_nll(
    context: Tensor, softmax: Tensor, target_index: Tensor, sample_index: Tensor,
    log_expected: Tensor | None = None, *, chunk: int = 256, precision: str = "fp32",
) -> Tensor:
    """Return the nll of the targets in nats, summed; each target is normalized over itself and the shared samples.

    The logits of targets and samples are ``weight . context + bias - log_expected``. Samples that equal the target
    (accidental hits) are excluded for that target. If the samples are all U rows, each once, and ``log_expected`` is
    None, the result is exactly the full softmax over these rows.

    The forward pass also computes the gradients of ``context`` and ``softmax``, ``chunk`` targets at a time, so that
    the (N, S) logits never exist. ``backward`` only scales these gradients. Sums are float64 if ``context`` is float64,
    otherwise float32.

    Args:
        context: (N, D) context vectors; N may be 0.
        softmax: (U, D + 1) softmax rows of the distinct words: weights, and the bias in the last column.
        target_index: (N,) int64 row of each target, in [0, U).
        sample_index: (S,) int64 row of each sample, in [0, U); repeats allowed, S may be 0.
        log_expected: (U,) :func:`log_expected_count` of each row; receives no gradient. None means 0.
        chunk: Largest number of targets per chunk. Extra memory is about 2 * chunk * S + 4 * S * D elements.
        precision: Precision of the matrix products, ``fp32`` or ``bf16`` (:mod:`lapse_elmo.model.products`).

    Returns:
        A scalar; float64 if ``context`` is float64, otherwise float32.
    """
    return _SampledSoftmax.apply(context, softmax, target_index, sample_index, log_expected, chunk, precision)


class _SampledSoftmax(torch.autograd.Function):
    """Computes the loss and its gradients in one pass over chunks of targets."""

    @staticmethod
    def forward(
        ctx: Any, context: Tensor, softmax: Tensor, target_index: Tensor, sample_index: Tensor,
        log_expected: Tensor | None, chunk: int, precision: str,
    ) -> Tensor:
        wide = torch.float64 if context.dtype == torch.float64 else torch.float32
        values = context.detach().to(wide), softmax.detach().to(wide)
        bias_minus_log_q = values[1][:, -1] - (0.0 if log_expected is None else log_expected.to(wide))
        matmul = Matmul.of(precision, context)
        problem = _Problem(*values, bias_minus_log_q, target_index, sample_index, matmul, chunk)
        nll, d_context, d_softmax = problem.solve()
        ctx.save_for_backward(d_context.to(context.dtype), d_softmax.to(softmax.dtype))
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            gradient * upstream if needed else None
            for gradient, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:2], strict=True)
        ]
        return (*gradients, None, None, None, None, None)


class _Problem:
    """One evaluation of the summed nll and of its gradients with respect to ``context`` and ``softmax``."""

    def __init__(
        self, context: Tensor, softmax: Tensor, bias_minus_log_q: Tensor, target_index: Tensor, sample_index: Tensor,
        matmul: Matmul, chunk: int,
    ) -> None:
        self.context, self.softmax, self.bias_minus_log_q = context, softmax, bias_minus_log_q
        self.target_index, self.sample_index = target_index, sample_index
        self.matmul = matmul
        num_chunks = max(1, -(-len(context) // chunk))  # of nearly equal sizes
        unit = WHOLE_ROWS if chunk >= WHOLE_ROWS else 1
        self.chunk = chunk = max(-(-len(context) // (num_chunks * unit)), 1) * unit
        padding = -len(context) % unit
        self.padded_context = pad(context, (0, 0, 0, padding)) if padding else context
        weight = softmax[:, :-1]
        samples = weight.index_select(0, sample_index)
        self.sample_weight = matmul.cast_weight(samples)
        self.sample_bias_minus_log_q = bias_minus_log_q.index_select(0, sample_index)
        self.target_weight = weight.index_select(0, target_index)
        self.target_logit = (context * self.target_weight).sum(1).add_(bias_minus_log_q.index_select(0, target_index))
        self.accidental_hits = _accidental_hits(target_index, sample_index, chunk)
        self.nll, self.d_target = torch.empty_like(self.target_logit), torch.empty_like(self.target_logit)
        self.d_context = torch.empty_like(self.padded_context)

    def solve(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the nll and the gradients of ``context`` and ``softmax``."""
        with torch.profiler.record_function("softmax (excl. matmul)"):
            d_samples = self._run_chunks()
        d_context = self.d_context[: len(self.context)].addcmul_(self.d_target[:, None], self.target_weight)
        # target_weight is not needed any more and has the right shape for the targets' part.
        d_targets = self.target_weight.copy_(self.context).mul_(self.d_target[:, None])
        # Rows that are both sample and target, or several targets, get all of their gradients: index_add_ adds repeats.
        d_softmax = torch.zeros_like(self.softmax).index_add_(0, self.sample_index, d_samples)
        d_softmax.index_add_(0, self.target_index, torch.cat([d_targets, self.d_target[:, None]], 1))
        return self.nll.sum(), d_context, d_softmax

    def _run_chunks(self) -> Tensor:
        """Process all chunks; return the gradient (S, D + 1) of the samples' rows."""
        matmul, (hit_rows, hit_columns, hit_ends) = self.matmul, self.accidental_hits
        num_samples, width = self.sample_weight.shape
        d_samples = self.context.new_zeros(num_samples, width + 1)
        d_weight, d_bias = d_samples[:, :-1], torch.zeros_like(self.sample_bias_minus_log_q)
        most = min(self.chunk, len(self.padded_context))
        buffer = self.context.new_empty(most, num_samples, dtype=matmul.storage)
        kernels, transposed = pointwise(buffer), self.sample_weight.t()
        for start in range(0, len(self.context), self.chunk):
            rows, padded = slice(start, min(start + self.chunk, len(self.context))), slice(start, start + self.chunk)
            context, d_context = self.padded_context[padded], self.d_context[padded]
            products = matmul.mm_into(buffer[: len(context)], matmul.cast(context), transposed)
            logits = products[: rows.stop - start]
            chunk_index = start // self.chunk
            hits = slice(hit_ends[chunk_index], hit_ends[chunk_index + 1])
            if hits.stop > hits.start:
                logits[hit_rows[hits] - start, hit_columns[hits]] = -math.inf
            inv_sum = self.context.new_zeros(len(context))
            kernels.softmax_rows(
                logits, self.sample_bias_minus_log_q, self.target_logit[rows], self.nll[rows], inv_sum[: len(logits)],
                self.d_target[rows], d_bias,
            )
            # softmax_rows has replaced the logits by exp(logit - max) in place.
            exp_logits = products
            # d nll / d logit is the sample's probability, exp_logits * inv_sum (minus 1 for the target). Scaling the
            # (chunk, D) factors by inv_sum instead of the (chunk, S) matrix saves a pass over the larger one. Rows of
            # padding are scaled by 0.
            torch.mul(matmul.mm(exp_logits, self.sample_weight), inv_sum[:, None], out=d_context)
            matmul.add_outer_into(d_weight, exp_logits, matmul.cast(context * inv_sum[:, None]))
        d_samples[:, -1] = d_bias
        return d_samples


def _accidental_hits(target_index: Tensor, sample_index: Tensor, chunk: int) -> tuple[Tensor, Tensor, list[int]]:
    """Find the (target, sample) pairs with equal rows.

    Returns:
        The targets' and the samples' indices of the pairs, ordered by target, and the bounds of each chunk of targets
        in them: chunk i has the pairs from bounds[i] to bounds[i + 1].
    """
    # A comparison of all N targets with all S samples would be a matrix of the size that chunks avoid. In the sorted
    # samples, those equal to a target are a run from `first` on, of `counts` samples: usually one or none, several if
    # the samples were drawn with replacement.
    ordered, columns = torch.sort(sample_index, stable=True)
    first = torch.searchsorted(ordered, target_index)
    counts = torch.searchsorted(ordered, target_index, right=True) - first
    # One entry per pair; `nth` counts the pairs of a target from 0.
    rows = torch.repeat_interleave(torch.arange(len(target_index), device=target_index.device), counts)
    ends = torch.cumsum(counts, 0)
    nth = torch.arange(len(rows), device=rows.device) - (ends - counts)[rows]
    # As numbers on the host, once: to look up the bounds of each chunk on a GPU would wait for it each time.
    bounds = [0, *ends[chunk - 1 :: chunk].tolist()]
    if len(target_index) % chunk:
        bounds.append(len(rows))
    return rows, columns[first[rows] + nth], bounds
