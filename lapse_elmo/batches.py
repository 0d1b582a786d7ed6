"""Deterministic batches of one worker: which sentences, in which order, with which targets.

The sentences of a shard set are numbered consecutively. A worker owns a contiguous range of the numbers, so it
reads only its own part of the shards. The ranges differ by at most one sentence, so all workers take the same number of
steps.

The order of an epoch is shuffled at two levels, so that sentences are read in runs: the worker's range is cut into
blocks of ``BLOCK`` sentences, whose order is shuffled. The sentences of ``POOL_BATCHES`` batches form a pool, in which
they are sorted by length, with noise, and cut into batches. So a batch holds sentences of similar length from many
places of the corpus, and every sentence is used once per epoch. Sorting without noise is slightly faster but learns
less: if all sentences of a batch end at the same position, a step mostly learns about that position
(benchmarks/learning.md).

A step takes as long as the longest batch of all workers. So each worker sorts the batches of a pool by their number of
words, unless they are very small, then shuffles them in the same way as all others: at each step, the batches of all
workers have about the same place among the batches of their pools, and about the same number of words.

The size of the batches may grow from pool to pool (growth.py). It depends only on the number of sentences that all
workers have trained before the pool, so every worker computes it alone, and a resumed run repeats it. While the batch
of all workers has fewer sentences than there are workers, they take turns: a step gives most of them an empty batch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lapse_elmo.corpus.shard_file import select
from lapse_elmo.corpus.shards import ShardSet, WorkerPart
from lapse_elmo.corpus.vocabulary import BEGIN, END, PADDING
from lapse_elmo.growth import BatchGrowth
from lapse_elmo.model.packing import Packing
from lapse_elmo.rng import stream

BLOCK = 256  # a run of sentences that is read at once; smaller blocks mix better, and cost more reads
POOL_BATCHES = 64  # enough to find sentences of similar length for each batch
LENGTH_NOISE = 0.3  # standard deviation of the noise that is added to the logarithm of the length
FEWEST_SORTED = 4  # sentences of a batch; smaller ones, sorted by words, would make all sentences of a step alike


@dataclass(frozen=True)
class Batch:
    """B sentences, packed (:class:`Packing`), with the targets of both directions.

    Table rows are classes (id - 1). There are N targets, the forward ones first, then the backward ones. Both are in
    the order of the packed rows from the second step on: each of these and the one before it in its sentence
    (``packing.previous``) predict each other.
    """

    packing: Packing  # on the CPU
    ids: np.ndarray  # (packed rows,) int64
    num_tokens: int  # words, without boundaries
    num_cut: int  # sentences that were cut because they are longer than the limit
    input_rows: np.ndarray  # (U,) int64: distinct rows of the embedding table, ascending
    input_index: np.ndarray  # (packed rows,) int64 into input_rows
    target_rows: np.ndarray  # (N,) int64: rows of the softmax table
    distinct_targets: np.ndarray  # the distinct ones of them, ascending
    sentences: np.ndarray  # (B,) int64: their numbers in the shard set
    size: int  # sentences of a full batch at this step; B is smaller if a worker runs out of sentences
    turns: int = 1  # one in ``turns`` workers has sentences at this step

    @property
    def num_targets(self) -> int:
        """N, the number of targets of both directions."""
        return self.target_rows.size

    @property
    def num_positions(self) -> int:
        """Positions, each of which holds a token or a boundary."""
        return self.ids.size


def make_batch(
    tokens: np.ndarray, offsets: np.ndarray, sentences: np.ndarray, max_length: int, boundaries: bool, size: int = 0,
    turns: int = 1,
) -> Batch:
    """Return the batch of the sentences ``tokens[offsets[i]:offsets[i + 1]]``.

    Each direction predicts at all of its positions except the last one: with boundaries a sentence of n tokens has
    n + 1 targets per direction, without them n - 1.

    Args:
        tokens: Token ids of all sentences, one after another.
        offsets: (B + 1,) where each sentence begins, and the end of the last one.
        sentences: (B,) numbers of the sentences in the shard set.
        max_length: Longer sentences are cut to this many tokens.
        boundaries: Whether to put <S> and </S> around each sentence.
        size: Sentences of a full batch at this step; 0 for those of this batch.
        turns: One in ``turns`` workers has sentences at this step.
    """
    full = np.diff(offsets)  # uncut lengths
    lengths = np.minimum(full, max_length).astype(np.int64)
    edge = 1 if boundaries else 0  # positions before and after the words
    packing = Packing.of_lengths(lengths + 2 * edge)
    rows, positions = np.divmod(packing.tokens.numpy(), max(packing.num_positions, 1))
    # At boundaries the index is that of a neighbour, or one before the first or after the last token.
    ids = np.append(tokens, PADDING).astype(np.int64)[offsets[rows] + positions - edge]
    if boundaries:
        ids[: packing.second_step] = BEGIN
        ids[packing.last.numpy()] = END
    # Each distinct word is pulled once, however often the batch has it; `index` finds it again at each position.
    input_rows, index = np.unique(ids - 1, return_inverse=True)
    # Pairs of neighbouring positions: the left one predicts forward, the right one backward; BiLM.context_vectors has
    # the same order.
    left, right = ids[packing.previous.numpy()], ids[packing.second_step :]
    target_rows = np.concatenate([right, left]) - 1
    return Batch(
        packing=packing, ids=ids, num_tokens=int(lengths.sum()), num_cut=int((full > max_length).sum()),
        input_rows=input_rows, input_index=index, target_rows=target_rows, distinct_targets=np.unique(target_rows),
        sentences=sentences, size=size or sentences.size, turns=turns,
    )


@dataclass(frozen=True)
class EpochShare:
    """A rank's share of some sentences of an epoch, which ascend from rank to rank.

    Attributes:
        num_all: Sentences of all ranks.
        first: How many of them are of the ranks before this one.
        numbers: (n,) int64, those of this rank, ascending.
    """

    num_all: int
    first: int
    numbers: np.ndarray

    def of(self, part: WorkerPart) -> np.ndarray:
        """Return the sentences of a worker of this rank, given its range of all of them."""
        return self.numbers[part.first - self.first : part.end - self.first]


@dataclass(frozen=True)
class Pool:
    """A pool of an epoch: consecutive sentences in the worker's order of the epoch, cut into batches.

    Attributes:
        number: Index of the pool in the epoch.
        first: Index of its first sentence in the order of the epoch.
        size: Sentences per batch.
        num_batches: Batches of a worker.
        turns: Steps per batch: at each step, one in ``turns`` workers takes a batch.
        first_step: The first step of the epoch that takes a batch of this pool.
    """

    number: int
    first: int
    size: int
    num_batches: int
    turns: int
    first_step: int

    @property
    def num_steps(self) -> int:
        """Steps that take its batches."""
        return self.num_batches * self.turns


class BatchStream:
    """The training batches of one worker.

    Args:
        shards: The training shards.
        worker: Index of this worker.
        num_workers: The number of workers.
        growth: The number of sentences per step.
        seed: The seed of the run.
        max_length: Longer sentences are cut to this many tokens.
        boundaries: Whether to put <S> and </S> around each sentence.
        rest: When resuming an epoch that another number of workers has begun: what is left of it, of which the worker's
            rank has a share. None for whole epochs.
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
        rest: EpochShare | None = None,
    ) -> None:
        self.shards = shards
        self.worker = worker
        self.num_workers = num_workers
        self.growth = growth
        self.seed = seed
        self.max_length = max_length
        self.boundaries = boundaries
        self.num_all = shards.num_sentences if rest is None else rest.num_all  # sentences of all workers
        self.part = WorkerPart.of(self.num_all, worker, num_workers)
        # Sentences of the largest part; at least one, so that an epoch of which nothing is left has a last step, too.
        self.longest = max(-(-self.num_all // num_workers), 1)
        self._rest = None if rest is None else rest.of(self.part)
        self._pools: tuple[int, list[Pool]] = (-1, [])  # those of the epoch requested last

    def pools(self, epoch: int) -> list[Pool]:
        """Return the pools of an epoch, which are the same on all workers except for the last sentence."""
        made = self._pools  # read once: a thread that reads ahead may replace it by the next epoch's
        if made[0] != epoch:
            self._pools = made = epoch, self._make_pools(epoch)
        return made[1]

    def steps_of(self, epoch: int) -> int:
        """Return the number of steps of an epoch, which is the same on all workers."""
        pools = self.pools(epoch)
        return pools[-1].first_step + pools[-1].num_steps if pools else 0

    def trained_before(self, epoch: int, step: int) -> int:
        """Return the sentences that all workers have trained, in all epochs, before ``step`` of ``epoch``."""
        # Within a pool, a full round of turns gives every worker one batch; of a round that has begun, the workers
        # whose turns are over have theirs. Each turn has num_workers // turns of them, and the first turns one more.
        pools = self.pools(epoch)
        pool = pools[bisect_right(pools, step, key=lambda pool: pool.first_step) - 1]
        rounds, rest = divmod(step - pool.first_step, pool.turns)
        workers = rest * (self.num_workers // pool.turns) + min(rest, self.num_workers % pool.turns)
        taken = (pool.first + rounds * pool.size) * self.num_workers + workers * pool.size
        return self._before(epoch) + min(taken, self.num_all)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from ``first_step`` on; empty ones once this worker has no sentences left."""
        order = self._block_order(epoch)
        for pool in self.pools(epoch):
            if pool.first_step + pool.num_steps <= first_step:
                continue
            numbers, tokens, offsets, members = self._pool(epoch, order, pool)
            for step in range(max(first_step - pool.first_step, 0), pool.num_steps):
                place, turn = divmod(step, pool.turns)
                takes_part = turn == self.worker % pool.turns and place < len(members)
                places = members[place] if takes_part else np.empty(0, np.int64)
                yield make_batch(
                    *select(tokens, offsets, places), numbers[places], self.max_length, self.boundaries, pool.size,
                    pool.turns,
                )

    def sentences_before(self, epoch: int, step: int) -> np.ndarray:
        """Return this worker's sentences (ascending) in the batches of an epoch before ``step``."""
        order = self._block_order(epoch)
        found = [order[:0]]
        for pool in self.pools(epoch):
            if pool.first_step >= step:
                break
            if pool.first_step + pool.num_steps <= step:
                found.append(order[pool.first : pool.first + pool.size * pool.num_batches])
            else:
                numbers, _, _, members = self._pool(epoch, order, pool)
                steps = step - pool.first_step - self.worker % pool.turns  # from this worker's first turn on
                found += [numbers[places] for places in members[: max(-(-steps // pool.turns), 0)]]
        return np.sort(np.concatenate(found))

    def first_words(self) -> np.ndarray:
        """Return the number of words of each batch of the first pool of a run, (batches,) int64."""
        _, _, offsets, members = self._pool(0, self._block_order(0), self.pools(0)[0])
        lengths = self._lengths(offsets)
        return np.array([lengths[places].sum() for places in members])

    @property
    def sentences(self) -> np.ndarray:
        """The numbers of this worker's sentences, ascending."""
        return np.arange(self.part.first, self.part.end) if self._rest is None else self._rest

    def _before(self, epoch: int) -> int:
        """Return the sentences that all workers have trained before this stream's share of ``epoch``."""
        return (epoch + 1) * self.shards.num_sentences - self.num_all

    def _make_pools(self, epoch: int) -> list[Pool]:
        pools: list[Pool] = []
        first = first_step = 0
        # All workers count by the longest part, so that they take the same steps; others may end with an empty batch.
        while first < self.longest:
            trained = self._before(epoch) + first * self.num_workers
            # As if all workers had trained `first` sentences each: a number that every worker knows without asking.
            size, turns = min(self.growth.sentences(trained), self.longest), self.growth.turns(trained)
            # With many turns a pool has fewer batches, so that the global batch can grow after as many steps.
            num_batches = min(max(POOL_BATCHES // turns, 1), -(-(self.longest - first) // size))
            pool = Pool(len(pools), first, size, num_batches, turns, first_step)
            pools.append(pool)
            first, first_step = first + size * num_batches, first_step + pool.num_steps
        return pools

    def _block_order(self, epoch: int) -> np.ndarray:
        """Return the part's sentence numbers, in shuffled blocks."""
        sentences = self.sentences
        # Keyed by epoch and worker, not drawn from a running generator: an epoch can be resumed at any step.
        rng = stream(self.seed, "block order", epoch, self.worker)
        starts = rng.permutation(np.arange(0, sentences.size, BLOCK))
        blocks = [sentences[start : start + BLOCK] for start in starts]
        return np.concatenate(blocks) if blocks else np.empty(0, np.int64)

    def _pool(
        self, epoch: int, order: np.ndarray, pool: Pool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:
        """Return a pool's sentence numbers (ascending), their tokens and offsets, and its batches as indices."""
        # Ascending, so that the blocks are read as runs; the order of training is made by _pool_batches.
        numbers = np.sort(order[pool.first : pool.first + pool.size * pool.num_batches])
        tokens, offsets = self.shards.read(numbers)
        return numbers, tokens, offsets, self._pool_batches(epoch, pool, self._lengths(offsets))

    def _lengths(self, offsets: np.ndarray) -> np.ndarray:
        """Return how many words of each sentence are trained, given the offsets (n + 1,) of all."""
        return np.minimum(np.diff(offsets), self.max_length)

    def _pool_batches(self, epoch: int, pool: Pool, lengths: np.ndarray) -> list[np.ndarray]:
        """Return the pool's batches as arrays of indices into its sentences."""
        size = pool.size
        rng = stream(self.seed, "length noise", epoch, self.worker, pool.number)
        noise = rng.normal(0.0, LENGTH_NOISE, lengths.size)
        by_length = np.argsort(np.log(np.maximum(lengths, 1)) + noise)
        # The same on all workers: at each step all have batches of similar length, and none waits long for others.
        rng = stream(self.seed, "batch order", epoch, pool.number)
        # Cut at a random place, so that the incomplete batch, if any, does not always hold the longest sentences.
        rotated = np.roll(by_length, -size * int(rng.integers(max(lengths.size // size, 1))))
        batches = [rotated[i : i + size] for i in range(0, lengths.size, size)]
        full = [b for b in batches if b.size == size]
        if size >= FEWEST_SORTED:
            full.sort(key=lambda batch: int(lengths[batch].sum()))
        rest = [b for b in batches if b.size < size]
        # The incomplete batch comes last on every worker: their pools differ by one sentence at most, and so in this
        # batch alone.
        return [full[i] for i in rng.permutation(len(full))] + rest


def evaluation_batches(
    shards: ShardSet, worker: int, num_workers: int, batch_size: int, max_length: int, boundaries: bool
) -> Iterator[Batch]:
    """Yield batches of every sentence of this worker's part once, in order."""
    part = WorkerPart.of(shards.num_sentences, worker, num_workers)
    for first in range(part.first, part.end, batch_size):
        numbers = np.arange(first, min(first + batch_size, part.end))
        yield make_batch(*shards.read(numbers), numbers, max_length, boundaries)
