"""Drawing negative samples: distributions over the rows of a segment, and the schemes of NuPS.

Schemes differ in when rows are drawn and how often a draw is used again:

==========  ============================================================  ==========================================
scheme      what happens                                                  distribution of a sample
==========  ============================================================  ==========================================
``naive``   drawn when pulled; rows may be anywhere                       exact
``preloc``  drawn when prepared, its intent announced                     exact
``pool``    a pool of draws is used ``POOL_REUSE`` times, shuffled anew   exact for one sample; the samples of a pool
                                                                          are dependent
``local``   drawn when pulled, from the rows that are on the node         conditional on being local: exact where the
                                                                          whole segment is
==========  ============================================================  ==========================================

Who draws alike is a second choice (``sharing``). The distribution of one sample does not depend on it; the samples of
one step do, and with them how much the mean over ranks reduces the sampling error of the gradient:

========  =========================================================================================================
sharing   the samples with one number
========  =========================================================================================================
``node``  equal for all workers of a node, so that a node of R workers touches the rows of one sample per step
          instead of up to R times as many; independent between nodes
``job``   equal for all workers
``none``  independent for all workers
========  =========================================================================================================

The scheme ``local`` draws by the rows that are on the node at the moment of the draw, which may differ between two
workers of a node while rows move. Without replacement, such a row alone makes their samples differ; with replacement,
any of their rows may then differ. Under ``job``, nodes own different rows and therefore draw differently.
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
POOL_REUSE = 2


@dataclass(frozen=True)
class Distribution:
    """A distribution over rows 0 .. ``num_rows`` - 1; log-uniform supposes the most frequent row first."""

    name: str
    num_rows: int

    @cached_property
    def probabilities(self) -> np.ndarray:
        """P (num_rows,) float64."""
        if self.name == "uniform":
            return np.full(self.num_rows, 1.0 / self.num_rows)
        return log_uniform_probability(np.arange(self.num_rows), self.num_rows)

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """``count`` rows (count,) int64, drawn independently (with replacement)."""
        if self.name == "uniform":
            return rng.integers(self.num_rows, size=count)
        rows = np.exp(rng.random(count) * np.log(self.num_rows + 1.0)).astype(np.int64) - 1
        return np.clip(rows, 0, self.num_rows - 1, out=rows)  # exp may round up to num_rows + 1

    def draw_distinct(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """The first ``count`` distinct rows (count,) int64 of a sequence of independent draws, in their order."""
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
    """Independent draws after which ``count`` distinct rows are expected: sum over rows of 1 - (1 - P)^n = count."""
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
    """The samples of one worker, each a function of its number: a resumed run draws what it would have drawn.

    :param node: of the worker; it matters for ``sharing`` "node" alone.
    :param sharing: which workers draw the same samples, one of ``SHARING``.
    :ivar parts: a worker that does the work of so many draws the samples of workers ``worker * parts``, ... in turn.
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
        """The random stream of sample or pool ``number``, the same for all workers that share it."""
        group = {"node": (self.node,), "job": (), "none": (worker,)}[self.sharing]
        return stream(self.seed, purpose, *group, number)

    def draw(self, number: int, count: int, is_local: np.ndarray | None = None) -> np.ndarray:
        """Rows (count,) int64 of the worker's sample ``number``.

        :param is_local: for the scheme ``local``, (num_rows,) bool: which rows are on the node; None means all. Where
            they are fewer than ``count`` distinct ones, all of them are taken and the rest is drawn from elsewhere.
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
        if self.replacement:
            return self.distribution.draw(rng, count)
        return self.distribution.draw_distinct(rng, count)

    def _draw_local(self, rng: np.random.Generator, count: int, is_local: np.ndarray) -> np.ndarray:
        """As :meth:`_draw` under the condition that all rows are local, as far as there are enough of them."""
        here, probabilities = np.flatnonzero(is_local), self.distribution.probabilities
        if self.replacement:
            if not here.size:
                return self.distribution.draw(rng, count)
            bounds = np.cumsum(probabilities[here])
            indices = np.searchsorted(bounds, rng.random(count) * bounds[-1], side="right")
            return here[np.minimum(indices, here.size - 1)]
        # One time for each row of the segment, local or not: a row that comes or goes leaves the others' times as
        # they are, so workers that see different rows on their node still draw nearly alike.
        times = rng.standard_exponential(is_local.size) / probabilities
        local = here[_smallest(times[here], min(count, here.size))]
        if local.size == count:
            return local
        away = np.flatnonzero(~is_local)
        return np.concatenate([local, away[_smallest(times[away], count - local.size)]])


def _exponential_race(rng: np.random.Generator, rows: np.ndarray, probabilities: np.ndarray, count: int) -> np.ndarray:
    """The first ``count`` distinct of independent draws among ``rows``, in their order, by an exponential race.

    O(number of rows), however rare the last of them are.
    """
    return rows[_smallest(rng.standard_exponential(rows.size) / probabilities[rows], count)]


def _smallest(times: np.ndarray, count: int) -> np.ndarray:
    """Places (count,) of the ``count`` smallest of ``times``, ascending by time."""
    if not count:
        return np.empty(0, np.int64)
    nearest = np.argpartition(times, count - 1)[:count]
    return nearest[np.argsort(times[nearest])]
