"""The norm of a mean gradient that nobody computes, from a sample of the gradients that it is the mean of."""

from __future__ import annotations

import torch
from torch import Tensor

from lapse_elmo.model.dense import sum_of_squares
from lapse_elmo.mpi.collectives import Collectives

STRIDE = 61  # a prime, so that the sample has all columns of matrices whose rows are a power of two


def mean_squares(across: Collectives, share: float, sample: Tensor, square: float) -> tuple[float, float]:
    """Return an estimate of the squared norm of a weighted mean of gradients, and the mean of their squared norms.

    The estimate is the latter times the ratio of both in the sample, where large numbers appear in both.

    Args:
        across: Those who have the gradients (collective).
        share: The weight of one's own gradient; the sum of all weights is 1.
        sample: Every ``STRIDE``-th number of one's own gradient, on the CPU.
        square: Its whole squared norm.
    """
    numbers = torch.cat([sample, torch.tensor([sum_of_squares(sample), square])]).mul_(share)
    across.sum_(numbers.numpy())
    of_samples, of_all = numbers[-2:].tolist()
    # If all of the sample is zero, as if the gradients were all noise.
    ratio = sum_of_squares(numbers[:-2]) / of_samples if of_samples else share
    return ratio * of_all, of_all
