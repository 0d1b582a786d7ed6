"""Deterministic batches of one worker: which sentences, in which order, with which targets.

The sentences of a shard set are numbered through. A worker owns a contiguous range of the numbers, so it reads only its
own part of the shards; the ranges differ by at most one sentence, so all workers take the same number of steps. An
epoch's order is random at two levels, for reading in runs: the worker's range is cut into blocks of ``BLOCK`` sentences
whose order is shuffled; the sentences of ``POOL_BATCHES`` batches form a pool, in which they are sorted by length, with
noise, and cut into batches, whose order is shuffled, alike on all workers. A batch thus holds sentences of like length
from many places of the corpus, the workers have like work at a step, and every sentence comes once an epoch. Sorting
without noise is a little faster but learns less: where all sentences of a batch end at one place, each step teaches
that place (benchmarks/learning.md).

The size of the batches may grow from pool to pool (growth.py). It is a function of the number of sentences that all
workers together have trained before the pool, so every worker knows it without asking, and a resumed run repeats it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from lapse_elmo.corpus.shards import ShardSet
from lapse_elmo.corpus.vocabulary import BEGIN, END, PADDING
from lapse_elmo.growth import BatchGrowth
from lapse_elmo.rng import stream

T = TypeVar("T")

BLOCK = 256
POOL_BATCHES = 64
LENGTH_NOISE = 0.3  # deviation of the noise on the logarithm of the length


@dataclass(frozen=True)
class Batch:
    """B sentences of at most T positions, with what each direction predicts.

    Rows of the tables are classes (id - 1). Targets are numbered forward first, then backward: N = forward + backward.
    """

    ids: np.ndarray  # (B, T) int64, padded by 0
    num_tokens: int  # words, without boundaries and padding
    num_cut: int  # sentences longer than the limit
    input_rows: np.ndarray  # (U,) int64: distinct rows of the embedding table, ascending
    input_index: np.ndarray  # (B, T) int64 into input_rows, 0 where padded
    mask: np.ndarray  # (B, T) bool
    forward_places: np.ndarray  # (Nf,) int64 into the flattened (B * T): positions that predict the next token
    backward_places: np.ndarray  # (Nb,) likewise: positions that predict the previous one
    target_rows: np.ndarray  # (N,) int64: rows of the softmax table
    sentences: np.ndarray  # (B,) int64: numbers in the shard set, for error messages
    size: int  # sentences of a full batch at this step; B is smaller where a worker runs out of sentences

    @property
    def num_targets(self) -> int:
        return self.target_rows.size

    @property
    def num_positions(self) -> int:
        """Positions that hold a token or a boundary."""
        return int(self.mask.sum())


def make_batch(
    tokens: np.ndarray, offsets: np.ndarray, sentences: np.ndarray, max_length: int, boundaries: bool, size: int = 0
) -> Batch:
    """The batch of the sentences ``tokens[offsets[i]:offsets[i + 1]]``; ``size`` is a full batch's (0: this one's).

    A direction predicts at each position but its last: with boundaries a sentence of n tokens has n + 1 targets a
    direction, without them n - 1.
    """
    full = np.diff(offsets)
    lengths = np.minimum(full, max_length)
    extra = 2 if boundaries else 0
    widths = lengths + extra
    ids = np.full((lengths.size, int(widths.max(initial=0))), PADDING, np.int64)
    columns = np.arange(ids.shape[1])
    mask = columns < widths[:, None]
    inside = (columns >= extra // 2) & (columns < (widths - extra // 2)[:, None])
    kept = np.arange(tokens.size) - np.repeat(offsets[:-1], full) < np.repeat(lengths, full)
    ids[inside] = tokens[kept]
    if boundaries:
        ids[:, :1] = BEGIN
        ids[np.arange(lengths.size), widths - 1] = END
    input_rows, inverse = np.unique(ids[mask] - 1, return_inverse=True)
    index = np.zeros(ids.shape, np.int64)
    index[mask] = inverse
    forward = np.flatnonzero(mask[:, 1:] & mask[:, :-1])  # numbered in rows of T - 1
    rows, columns = np.divmod(forward, max(ids.shape[1] - 1, 1))
    places = rows * ids.shape[1] + columns
    flat = ids.reshape(-1)
    return Batch(
        ids=ids, num_tokens=int(lengths.sum()), num_cut=int((full > max_length).sum()), input_rows=input_rows,
        input_index=index, mask=mask, forward_places=places, backward_places=places + 1,
        target_rows=np.concatenate([flat[places + 1], flat[places]]) - 1, sentences=sentences,
        size=size or sentences.size,
    )


@dataclass(frozen=True)
class WorkerPart:
    """The range [first, end) of sentence numbers that one of ``num_workers`` workers owns."""

    first: int
    end: int

    @classmethod
    def of(cls, num_sentences: int, worker: int, num_workers: int) -> WorkerPart:
        return cls(num_sentences * worker // num_workers, num_sentences * (worker + 1) // num_workers)


@dataclass(frozen=True)
class Pool:
    """A pool of an epoch: the worker's sentences from ``first`` (in the epoch's order) on, in batches of ``size``.

    ``number`` counts the pools of the epoch, ``first_step`` and ``num_steps`` say which of its steps take them.
    """

    number: int
    first: int
    size: int
    first_step: int
    num_steps: int


class BatchStream:
    """The training batches of one worker.

    :param shards: the training shards. :param worker: this worker of ``num_workers``.
    :param growth: how many sentences a step takes.
    :param rest: for an epoch that another number of workers has begun: the sentences (ascending) of all workers that
        are left of it; None for whole epochs.
    """

    def __init__(
        self,
        shards: ShardSet,
        worker: int,
        num_workers: int,
        growth: BatchGrowth,
        seed: int,
        max_length: int,
        boundaries: bool,
        rest: np.ndarray | None = None,
    ) -> None:
        self.shards = shards
        self.worker = worker
        self.num_workers = num_workers
        self.growth = growth
        self.seed = seed
        self.max_length = max_length
        self.boundaries = boundaries
        self.num_all = shards.num_sentences if rest is None else rest.size  # sentences of all workers
        self.part = WorkerPart.of(self.num_all, worker, num_workers)
        self.longest = -(-self.num_all // num_workers)  # sentences of the largest part: decides the steps of all
        self._rest = None if rest is None else rest[self.part.first : self.part.end]
        self._pools: tuple[int, list[Pool]] = (-1, [])  # of the epoch asked for last

    def pools(self, epoch: int) -> list[Pool]:
        """The pools of an epoch, the same on all workers but for the last sentence."""
        made = self._pools  # read once: another thread may be reading ahead in the next epoch
        if made[0] != epoch:
            self._pools = made = epoch, self._make_pools(epoch)
        return made[1]

    def steps_of(self, epoch: int) -> int:
        """Steps of an epoch, equal on all workers."""
        pools = self.pools(epoch)
        return pools[-1].first_step + pools[-1].num_steps if pools else 0

    def trained_before(self, epoch: int, step: int) -> int:
        """Sentences of all workers, of all epochs, that are trained before ``step`` of ``epoch``."""
        return self._before(epoch) + min(self._taken(epoch, step) * self.num_workers, self.num_all)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from ``first_step`` on; a worker with fewer sentences ends with an empty batch."""
        order = self._block_order(epoch)
        for pool in self.pools(epoch):
            if pool.first_step + pool.num_steps <= first_step:
                continue
            numbers, tokens, offsets, members = self._pool(epoch, order, pool)
            members += [np.empty(0, np.int64)] * (pool.num_steps - len(members))
            for places in members[max(first_step - pool.first_step, 0) :]:
                yield self._batch(tokens, offsets, numbers, places, pool.size)

    def sentences_before(self, epoch: int, step: int) -> np.ndarray:
        """This worker's sentences (ascending) in an epoch's batches before ``step``."""
        order = self._block_order(epoch)
        found = [order[:0]]
        for pool in self.pools(epoch):
            if pool.first_step >= step:
                break
            if pool.first_step + pool.num_steps <= step:
                found.append(order[pool.first : pool.first + pool.size * pool.num_steps])
            else:
                numbers, _, _, members = self._pool(epoch, order, pool)
                found += [numbers[places] for places in members[: step - pool.first_step]]
        return np.sort(np.concatenate(found))

    @property
    def sentences(self) -> np.ndarray:
        """The numbers of this worker's sentences, ascending."""
        return np.arange(self.part.first, self.part.end) if self._rest is None else self._rest

    def _before(self, epoch: int) -> int:
        """Sentences of all workers trained before this stream's share of ``epoch``."""
        return (epoch + 1) * self.shards.num_sentences - self.num_all

    def _taken(self, epoch: int, step: int) -> int:
        """Sentences of the worker with the most of them that are taken before ``step``."""
        pools = self.pools(epoch)
        place = bisect_right(pools, step, key=lambda pool: pool.first_step) - 1
        return min(pools[place].first + (step - pools[place].first_step) * pools[place].size, self.longest)

    def _make_pools(self, epoch: int) -> list[Pool]:
        pools: list[Pool] = []
        first = first_step = 0
        while first < self.longest:
            trained = self._before(epoch) + first * self.num_workers
            size = min(self.growth.sentences(trained), self.longest)
            num_steps = min(POOL_BATCHES, -(-(self.longest - first) // size))
            pools.append(Pool(len(pools), first, size, first_step, num_steps))
            first, first_step = first + size * num_steps, first_step + num_steps
        return pools

    def _block_order(self, epoch: int) -> np.ndarray:
        """The part's sentence numbers, blocks shuffled."""
        sentences = self.sentences
        rng = stream(self.seed, "block order", epoch, self.worker)
        starts = rng.permutation(np.arange(0, sentences.size, BLOCK))
        blocks = [sentences[start : start + BLOCK] for start in starts]
        return np.concatenate(blocks) if blocks else np.empty(0, np.int64)

    def _pool(
        self, epoch: int, order: np.ndarray, pool: Pool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:
        """A pool's sentence numbers (ascending), their tokens and offsets, and its batches as places in the pool."""
        numbers = np.sort(order[pool.first : pool.first + pool.size * pool.num_steps])
        tokens, offsets = self.shards.read(numbers)
        return numbers, tokens, offsets, self._pool_batches(epoch, pool, np.diff(offsets))

    def _pool_batches(self, epoch: int, pool: Pool, lengths: np.ndarray) -> list[np.ndarray]:
        """The pool's batches as arrays of places in the pool."""
        size = pool.size
        rng = stream(self.seed, "length noise", epoch, self.worker, pool.number)
        noise = rng.normal(0.0, LENGTH_NOISE, lengths.size)
        by_length = np.argsort(np.log(np.maximum(lengths, 1)) + noise)
        # The same on all workers: at a step all have sentences of like length, and none waits long for the others.
        rng = stream(self.seed, "batch order", epoch, pool.number)
        # The incomplete batch, if any, should not always hold the longest sentences: let it start anywhere.
        rotated = np.roll(by_length, -size * int(rng.integers(max(lengths.size // size, 1))))
        batches = [rotated[i : i + size] for i in range(0, lengths.size, size)]
        full = [b for b in batches if b.size == size]
        rest = [b for b in batches if b.size < size]
        return [full[i] for i in rng.permutation(len(full))] + rest

    def _batch(
        self, tokens: np.ndarray, offsets: np.ndarray, numbers: np.ndarray, members: np.ndarray, size: int
    ) -> Batch:
        return make_batch(*select(tokens, offsets, members), numbers[members], self.max_length, self.boundaries, size)


def evaluation_batches(
    shards: ShardSet, worker: int, num_workers: int, batch_size: int, max_length: int, boundaries: bool
) -> Iterator[Batch]:
    """Every sentence of this worker's part once, in order."""
    part = WorkerPart.of(shards.num_sentences, worker, num_workers)
    for first in range(part.first, part.end, batch_size):
        numbers = np.arange(first, min(first + batch_size, part.end))
        yield make_batch(*shards.read(numbers), numbers, max_length, boundaries)


def select(tokens: np.ndarray, offsets: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and offsets of the sentences ``members``, in their order."""
    lengths = offsets[members + 1] - offsets[members]
    ends = np.cumsum(lengths)
    places = np.arange(int(lengths.sum())) + np.repeat(offsets[members] - (ends - lengths), lengths)
    return tokens[places], np.concatenate([[0], ends])
