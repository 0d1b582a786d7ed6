"""Deterministic batches of one worker: which sentences, in which order, with which targets.

The sentences of a shard set are numbered through. A worker owns a contiguous range of the numbers, so it reads only its
own part of the shards; the ranges differ by at most one sentence, so all workers take the same number of steps. An
epoch's order is random at two levels, for reading in runs: the worker's range is cut into blocks of ``BLOCK`` sentences
whose order is shuffled; the sentences of ``POOL_BATCHES`` batches form a pool, in which they are sorted by length, with
noise, and cut into batches, whose order is shuffled, alike on all workers. A batch thus holds sentences of like length
from many places of the corpus, the workers have like work at a step, and every sentence comes once an epoch. Sorting
without noise is a little faster but learns less: where all sentences of a batch end at one place, each step teaches
that place (benchmarks/learning.md).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from lapse_elmo.corpus.shards import ShardSet
from lapse_elmo.corpus.vocabulary import BEGIN, END, PADDING
from lapse_elmo.rng import stream

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

    @property
    def num_targets(self) -> int:
        return self.target_rows.size

    @property
    def num_positions(self) -> int:
        """Positions that hold a token or a boundary."""
        return int(self.mask.sum())


def make_batch(
    tokens: np.ndarray, offsets: np.ndarray, sentences: np.ndarray, max_length: int, boundaries: bool
) -> Batch:
    """The batch of the sentences ``tokens[offsets[i]:offsets[i + 1]]``.

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
    )


@dataclass(frozen=True)
class WorkerPart:
    """The range [first, end) of sentence numbers that one of ``num_workers`` workers owns."""

    first: int
    end: int

    @classmethod
    def of(cls, num_sentences: int, worker: int, num_workers: int) -> WorkerPart:
        return cls(num_sentences * worker // num_workers, num_sentences * (worker + 1) // num_workers)


class BatchStream:
    """The training batches of one worker.

    :param shards: the training shards. :param worker: this worker of ``num_workers``.
    :param rest: for an epoch that another number of workers has begun: the sentences (ascending) that are this
        worker's now, and the number of steps that the worker with the most of them needs.
    """

    def __init__(
        self,
        shards: ShardSet,
        worker: int,
        num_workers: int,
        batch_size: int,
        seed: int,
        max_length: int,
        boundaries: bool,
        rest: tuple[np.ndarray, int] | None = None,
    ) -> None:
        self.shards = shards
        self.worker = worker
        self.batch_size = batch_size
        self.seed = seed
        self.max_length = max_length
        self.boundaries = boundaries
        self.part = WorkerPart.of(shards.num_sentences, worker, num_workers)
        longest = -(-shards.num_sentences // num_workers)
        self.steps_per_epoch = -(-longest // batch_size)  # of the largest part: equal on all workers
        self._rest: np.ndarray | None = None
        if rest is not None:
            self._rest, self.steps_per_epoch = rest

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from ``first_step`` on; a worker with fewer sentences ends with an empty batch."""
        order = self._block_order(epoch)
        for pool in range(first_step // POOL_BATCHES, -(-self.steps_per_epoch // POOL_BATCHES)):
            numbers, tokens, offsets, members = self._pool(epoch, order, pool)
            first = pool * POOL_BATCHES
            wanted = min(POOL_BATCHES, self.steps_per_epoch - first)
            members += [np.empty(0, np.int64)] * (wanted - len(members))
            for places in members[max(first_step - first, 0) :]:
                yield self._batch(tokens, offsets, numbers, places)

    def sentences_before(self, epoch: int, step: int) -> np.ndarray:
        """The sentences (ascending) of an epoch's batches before ``step``."""
        order = self._block_order(epoch)
        pool, step_in_pool = divmod(step, POOL_BATCHES)
        found = [order[: pool * POOL_BATCHES * self.batch_size]]
        if step_in_pool:
            numbers, _, _, members = self._pool(epoch, order, pool)
            found += [numbers[places] for places in members[:step_in_pool]]
        return np.sort(np.concatenate(found))

    @property
    def sentences(self) -> np.ndarray:
        """The numbers of this worker's sentences, ascending."""
        return np.arange(self.part.first, self.part.end) if self._rest is None else self._rest

    @property
    def num_sentences(self) -> int:
        """How many sentences are this worker's."""
        return self.part.end - self.part.first if self._rest is None else self._rest.size

    def places(self, sentences: np.ndarray) -> np.ndarray:
        """The places of some of this worker's ``sentences`` among all of them."""
        return sentences - self.part.first if self._rest is None else np.searchsorted(self._rest, sentences)

    def _block_order(self, epoch: int) -> np.ndarray:
        """The part's sentence numbers, blocks shuffled."""
        sentences = self.sentences
        rng = stream(self.seed, "block order", epoch, self.worker)
        starts = rng.permutation(np.arange(0, sentences.size, BLOCK))
        blocks = [sentences[start : start + BLOCK] for start in starts]
        return np.concatenate(blocks) if blocks else np.empty(0, np.int64)

    def _pool(
        self, epoch: int, order: np.ndarray, pool: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:
        """A pool's sentence numbers (ascending), their tokens and offsets, and its batches as places in the pool."""
        size = self.batch_size * POOL_BATCHES
        numbers = np.sort(order[pool * size : (pool + 1) * size])
        tokens, offsets = self.shards.read(numbers)
        return numbers, tokens, offsets, self._pool_batches(epoch, pool, np.diff(offsets))

    def _pool_batches(self, epoch: int, pool: int, lengths: np.ndarray) -> list[np.ndarray]:
        """The pool's batches as arrays of places in the pool."""
        noise = stream(self.seed, "length noise", epoch, self.worker, pool).normal(0.0, LENGTH_NOISE, lengths.size)
        by_length = np.argsort(np.log(np.maximum(lengths, 1)) + noise)
        # The same on all workers: at a step all have sentences of like length, and none waits long for the others.
        rng = stream(self.seed, "batch order", epoch, pool)
        # The incomplete batch, if any, should not always hold the longest sentences: let it start anywhere.
        rotated = np.roll(by_length, -self.batch_size * int(rng.integers(max(lengths.size // self.batch_size, 1))))
        batches = [rotated[i : i + self.batch_size] for i in range(0, lengths.size, self.batch_size)]
        full = [b for b in batches if b.size == self.batch_size]
        rest = [b for b in batches if b.size < self.batch_size]
        return [full[i] for i in rng.permutation(len(full))] + rest

    def _batch(self, tokens: np.ndarray, offsets: np.ndarray, numbers: np.ndarray, members: np.ndarray) -> Batch:
        return make_batch(*select(tokens, offsets, members), numbers[members], self.max_length, self.boundaries)


def evaluation_batches(
    shards: ShardSet, worker: int, num_workers: int, batch_size: int, max_length: int, boundaries: bool
) -> Iterator[Batch]:
    """Every sentence of this worker's part once, in order."""
    part = WorkerPart.of(shards.num_sentences, worker, num_workers)
    for first in range(part.first, part.end, batch_size):
        numbers = np.arange(first, min(first + batch_size, part.end))
        yield make_batch(*shards.read(numbers), numbers, max_length, boundaries)


def read_ahead(source: Iterator[Batch], depth: int = 2) -> Generator[Batch, None, None]:
    """The batches of ``source``, of which a thread makes ``depth`` ahead while the caller computes."""
    done = object()
    with ThreadPoolExecutor(1, "batches") as reader:  # one thread: the order stays, and so do errors
        made = deque(reader.submit(next, source, done) for _ in range(depth))
        while (batch := made.popleft().result()) is not done:
            made.append(reader.submit(next, source, done))
            yield batch  # type: ignore[misc]


def select(tokens: np.ndarray, offsets: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and offsets of the sentences ``members``, in their order."""
    lengths = offsets[members + 1] - offsets[members]
    ends = np.cumsum(lengths)
    places = np.arange(int(lengths.sum())) + np.repeat(offsets[members] - (ends - lengths), lengths)
    return tokens[places], np.concatenate([[0], ends])
