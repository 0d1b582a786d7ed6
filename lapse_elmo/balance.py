"""How evenly the batches of a step are divided among the ranks: a step takes as long as the longest of them."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from lapse_elmo.batches import BatchStream
from lapse_elmo.config.training import Config
from lapse_elmo.corpus.shards import ShardSet
from lapse_elmo.growth import BatchGrowth

_MOST_SAMPLED = 16  # ranks whose batches are made; more would not change the estimate of the spread much


def longest_batch(config: Config, shards: ShardSet, num_ranks: int) -> float:
    """Return how many times the mean number of words of a rank the longest batch of a step has, with full batches.

    The words of the ranks at a step are taken to be normally distributed, with the standard deviation of a sample of
    the ranks; the maximum of n such numbers is expected at the quantile (n - pi / 8) / (n - pi / 4 + 1) (Blom 1958,
    *Statistical Estimates and Transformed Beta-Variables*).

    Args:
        config: The options.
        shards: The training shards.
        num_ranks: Ranks of the job, at most as many as there are sentences.
    """
    if num_ranks == 1:
        return 1.0
    sampled = np.unique(np.linspace(0, num_ranks - 1, _MOST_SAMPLED).astype(int))
    words = np.array([_words(config, shards, int(rank), num_ranks) for rank in sampled], np.float64)
    spread = float(words.std(axis=0, ddof=1).mean() / words.mean())
    highest = NormalDist().inv_cdf((num_ranks - math.pi / 8) / (num_ranks - math.pi / 4 + 1))
    return 1.0 + spread * highest


def _words(config: Config, shards: ShardSet, rank: int, num_ranks: int) -> np.ndarray:
    """Return the words of a rank at each step of its first pool, the last step excepted, which may be incomplete."""
    training, num_workers = config.training, num_ranks * config.training.accumulate
    growth = BatchGrowth(training.batch_size, num_workers)
    parts = [
        BatchStream(
            shards, rank * training.accumulate + part, num_workers, growth, training.seed, config.data.max_length,
            config.data.boundaries,
        ).first_words()
        for part in range(training.accumulate)
    ]
    shortest = min(map(len, parts))
    return sum((part[: max(shortest - 1, 1)] for part in parts), np.zeros(1))
