"""The norm of a mean gradient that nobody computes, from a sample of the gradients that it is the mean of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lapse_elmo.model.dense import sum_of_squares
from lapse_elmo.mpi.collectives import Collectives

STRIDE = 61  # a prime, so that the sample has all columns of matrices whose rows are a power of two


def sample_of(gradients: Sequence[Tensor]) -> Tensor:
    """Return every ``STRIDE``-th number of all gradients, one after another, on the CPU."""
    parts, first = [], 0
    for gradient in gradients:
        parts.append(gradient.reshape(-1)[first::STRIDE])
        first = (first - gradient.numel()) % STRIDE
    return torch.cat(parts).to("cpu")


def mean_squares(across: Collectives, share: float, sample: Tensor, square: float) -> tuple[float, float]:
    """Return an estimate of the squared norm of a weighted mean of gradients, and the mean of their squared norms.

    The estimate is the latter times the ratio of both in the sample, where large numbers appear in both.

    Args:
        across: Those who have the gradients (collective).
        share: The weight of one's own gradient; the sum of all weights is 1.
        sample: Of one's own gradient, as of :func:`sample_of`.
        square: Its whole squared norm.
    """
    numbers = torch.cat([sample, torch.tensor([sum_of_squares(sample), square])]).mul_(share)
    across.sum_(numbers.numpy())
    of_samples, of_all = numbers[-2:].tolist()
    # If all of the sample is zero, as if the gradients were all noise.
    ratio = sum_of_squares(numbers[:-2]) / of_samples if of_samples else share
    return ratio * of_all, of_all
