"""Negative sampling: distributions over the rows of a segment, and the sampling schemes of NuPS.

Schemes differ in when rows are drawn and how often a draw is reused:

==========  ============================================================  ==========================================
scheme      what happens                                                  distribution of a sample
==========  ============================================================  ==========================================
``naive``   drawn when pulled; rows may be anywhere                       exact
``preloc``  drawn when prepared, its intent announced                     exact
``pool``    a pool of draws is used ``POOL_REUSE`` times, reshuffled      exact for one sample; the samples of a pool
                                                                          are dependent
``local``   drawn when pulled, from the rows that are on the node         conditional on being local: exact where the
                                                                          whole segment is
==========  ============================================================  ==========================================

``sharing`` determines which workers draw the same samples. The distribution of a single sample does not depend on it,
but the joint distribution of one step's samples does, and with it how much averaging over ranks reduces the sampling
error of the gradient:

========  =========================================================================================================
sharing   the samples with one number
========  =========================================================================================================
``node``  equal for all workers of a node, so that a node of R workers touches the rows of one sample per step
          instead of up to R times as many; independent between nodes
``job``   equal for all workers
``none``  independent for all workers
========  =========================================================================================================

The scheme ``local`` draws from the rows that are on the node at the time of the draw. While rows move, these may differ
between two workers of a node. Without replacement, their samples then differ in the rows that moved; with replacement,
any of their rows may differ. With ``job``, nodes still draw differently, since they own different rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from lapse_elmo.log_uniform import log_uniform_probability
from lapse_elmo.rng import stream

SCHEMES = ("naive", "preloc", "pool", "local")
DISTRIBUTIONS = ("log-uniform", "uniform")
SHARING = ("node", "job", "none")
POOL_REUSE = 2  # samples taken from one pool


@dataclass(frozen=True)
class Distribution:
    """A distribution over the rows 0 to ``num_rows - 1``; log-uniform assumes that rows are sorted by frequency."""

    name: str
    num_rows: int

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Probability of each row, (num_rows,) float64."""
        if self.name == "uniform":
            return np.full(self.num_rows, 1.0 / self.num_rows)
        return log_uniform_probability(np.arange(self.num_rows), self.num_rows)

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Draw rows (count,) int64 independently (with replacement)."""
        if self.name == "uniform":
            return rng.integers(self.num_rows, size=count)
        rows = np.exp(rng.random(count) * np.log(self.num_rows + 1.0)).astype(np.int64) - 1
        return np.clip(rows, 0, self.num_rows - 1, out=rows)  # exp may round up to num_rows + 1

    def draw_distinct(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Draw independently until there are ``count`` distinct rows; return them (count,) int64 in the order drawn."""
        # Rare rows may take very many draws; the race has the same distribution at a fixed cost.
        tries = _expected_tries(self, count)
        if tries > 2 * self.num_rows:
            return _exponential_race(rng, np.arange(self.num_rows), self.probabilities, count)
        rows = self.draw(rng, int(1.05 * tries) + 64)
        while True:
            distinct, first = np.unique(rows, return_index=True)
            if distinct.size >= count:
                return rows[np.sort(first)[:count]]
            rows = np.concatenate([rows, self.draw(rng, count)])


@lru_cache(maxsize=8)
def _expected_tries(distribution: Distribution, count: int) -> float:
    """Return the n of independent draws with ``count`` distinct rows expected: sum of 1 - (1 - P)^n over rows."""
    if count >= distribution.num_rows:
        return np.inf
    log_miss = np.log1p(-distribution.probabilities)
    low = high = float(count)
    while -np.expm1(high * log_miss).sum() < count:
        high *= 2
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        if -np.expm1(middle * log_miss).sum() < count:
            low = middle
        else:
            high = middle
    return high


@dataclass(frozen=True)
class Sampler:
    """The samples of one worker. Each is a function of its number, so a resumed run draws the same ones.

    Args:
        distribution: What is drawn from.
        scheme: One of ``SCHEMES``.
        replacement: Whether a sample may contain a row more than once.
        seed: Seed of the run.
        worker: The worker's rank.
        node: The worker's node, used if ``sharing`` is "node".
        sharing: Which workers draw the same samples, one of ``SHARING``.
        parts: Number of workers that this one stands for (gradient accumulation): its samples are, in turn, those of
            the workers ``worker * parts`` to ``worker * parts + parts - 1``.
    """

    distribution: Distribution
    scheme: str
    replacement: bool
    seed: int
    worker: int
    node: int = 0
    sharing: str = "none"
    parts: int = 1

    def _stream(self, purpose: str, worker: int, number: int) -> np.random.Generator:
        """Return the random stream of sample or pool ``number``, equal for all workers that share it."""
        group = {"node": (self.node,), "job": (), "none": (worker,)}[self.sharing]
        return stream(self.seed, purpose, *group, number)

    def draw(self, number: int, count: int, is_local: np.ndarray | None = None) -> np.ndarray:
        """Return the rows of the worker's sample ``number``.

        Args:
            number: Counts the worker's samples.
            count: Rows per sample.
            is_local: For the scheme ``local``, the rows that are on the node, (num_rows,) bool; None means all. If
                fewer than ``count`` are local and ``replacement`` is off, all of them and some others are drawn.

        Returns:
            (count,) int64.
        """
        number, part = divmod(number, self.parts)
        worker = self.worker * self.parts + part
        if self.scheme == "local" and is_local is not None and not is_local.all():
            return self._draw_local(self._stream("sample", worker, number), count, is_local)
        if self.scheme != "pool":
            return self._draw(self._stream("sample", worker, number), count)
        pool = self._draw(self._stream("sample pool", worker, number // POOL_REUSE), count)
        return self._stream("sample order", worker, number).permutation(pool)

    def _draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Draw from all rows, (count,) int64."""
        if self.replacement:
            return self.distribution.draw(rng, count)
        return self.distribution.draw_distinct(rng, count)

    def _draw_local(self, rng: np.random.Generator, count: int, is_local: np.ndarray) -> np.ndarray:
        """Draw from the local rows, as :meth:`_draw` conditional on all rows being local if there are enough."""
        here, probabilities = np.flatnonzero(is_local), self.distribution.probabilities
        if self.replacement:
            if not here.size:
                return self.distribution.draw(rng, count)
            bounds = np.cumsum(probabilities[here])
            indices = np.searchsorted(bounds, rng.random(count) * bounds[-1], side="right")
            return here[np.minimum(indices, here.size - 1)]
        # An exponential race with a time for each row of the segment, local or not. A row that comes or goes does not
        # change the times of others, so workers that see different local rows still draw nearly the same ones.
        times = rng.standard_exponential(is_local.size) / probabilities
        local = here[_smallest(times[here], min(count, here.size))]
        if local.size == count:
            return local
        away = np.flatnonzero(~is_local)
        return np.concatenate([local, away[_smallest(times[away], count - local.size)]])


def _exponential_race(rng: np.random.Generator, rows: np.ndarray, probabilities: np.ndarray, count: int) -> np.ndarray:
    """Draw the first ``count`` distinct ones of independent draws among ``rows``, in order, by an exponential race.

    A row's first occurrence in a Poisson process of draws is exponential with its probability as rate. Takes O(rows),
    however rare the rows drawn last are.
    """
    return rows[_smallest(rng.standard_exponential(rows.size) / probabilities[rows], count)]


def _smallest(times: np.ndarray, count: int) -> np.ndarray:
    """Return the indices (count,) of the ``count`` smallest ``times``, in ascending order of time."""
    if not count:
        return np.empty(0, np.int64)
    nearest = np.argpartition(times, count - 1)[:count]
    return nearest[np.argsort(times[nearest])]
