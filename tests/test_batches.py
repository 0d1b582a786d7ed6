"""Batches: what each direction predicts, and that an epoch is every sentence once, in any world."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lapse_elmo.ahead import read_ahead
from lapse_elmo.batches import BLOCK, POOL_BATCHES, Batch, BatchStream, make_batch
from lapse_elmo.batches import evaluation_batches as evaluation
from lapse_elmo.corpus.shard_file import select
from lapse_elmo.corpus.shards import Header, ShardSet, ShardWriter, WorkerPart, shard_name
from lapse_elmo.corpus.vocabulary import Vocabulary
from lapse_elmo.growth import BatchGrowth

BEGIN, END = 1, 2
WORDS = [f"w{i}" for i in range(40)]
SENTENCES = st.lists(st.lists(st.integers(3, 30), min_size=1, max_size=12), min_size=0, max_size=8)


class FakeShards:
    """Sentences in memory."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.num_sentences = lengths.size
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        # A sentence's tokens encode its number, so that mixed-up sentences are noticed.
        self.tokens = np.repeat(3 + np.arange(lengths.size), lengths).astype(np.int32)

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert (np.diff(numbers) > 0).all()
        return select(self.tokens, self.offsets, numbers)


def stream_of(
    lengths: np.ndarray, worker: int = 0, num_workers: int = 1, batch_size: int = 4, seed: int = 1,
    growth: BatchGrowth | None = None,
) -> BatchStream:
    shards: ShardSet = FakeShards(lengths)  # type: ignore[assignment]
    growth = growth or BatchGrowth(batch_size, num_workers)
    return BatchStream(shards, worker, num_workers, growth, seed, 400, boundaries=True)


def of_sentences(sentences: list[list[int]], max_length: int, boundaries: bool) -> Batch:
    tokens = np.array([t for sentence in sentences for t in sentence], np.int32)
    offsets = np.cumsum([0] + [len(sentence) for sentence in sentences])
    return make_batch(tokens, offsets, np.arange(len(sentences)) + 100, max_length, boundaries)


def lengths_of(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return sentence lengths like those of news text: mean 26 words, standard deviation 14, and a long tail."""
    return np.clip(rng.lognormal(3.15, 0.5, count), 1, 400).astype(np.int64)


@given(SENTENCES, st.integers(1, 14), st.booleans())
def test_batch_is_what_a_loop_gives(sentences: list[list[int]], max_length: int, boundaries: bool) -> None:
    batch = of_sentences(sentences, max_length, boundaries)
    rows = [s[:max_length] for s in sentences]
    if boundaries:
        rows = [[BEGIN, *row, END] for row in rows]
    width = max(map(len, rows), default=0)
    padded = [row + [0] * (width - len(row)) for row in rows]
    np.testing.assert_array_equal(ids_of(batch), np.array(padded).reshape(len(rows), width))
    np.testing.assert_array_equal(batch.packing.mask().numpy(), ids_of(batch) != 0)
    forward, backward = [], []
    for number, row in enumerate(rows):
        for place in range(len(row) - 1):
            forward.append((number, place, row[place + 1]))
            backward.append((number, place + 1, row[place]))
    half, places = batch.num_targets // 2, batch.packing.tokens.numpy()
    left, right = places[batch.packing.previous.numpy()], places[batch.packing.second_step :]
    assert decoded(batch, left, batch.target_rows[:half]) == forward
    assert decoded(batch, right, batch.target_rows[half:]) == backward
    np.testing.assert_array_equal(batch.distinct_targets, np.unique(batch.target_rows))
    assert batch.num_tokens == sum(min(len(s), max_length) for s in sentences)
    assert batch.num_cut == sum(len(s) > max_length for s in sentences)
    assert batch.num_positions == sum(map(len, rows))
    np.testing.assert_array_equal(batch.sentences, np.arange(len(sentences)) + 100)


def decoded(batch: Batch, places: np.ndarray, rows: np.ndarray) -> list[tuple[int, int, int]]:
    """Return (sentence, position, predicted id) for each target of a direction, sorted."""
    width = batch.packing.num_positions
    pairs = zip(places.tolist(), rows.tolist(), strict=True)
    return sorted((place // width, place % width, row + 1) for place, row in pairs)


def ids_of(batch: Batch) -> np.ndarray:
    """Return the ids (B, T), 0 at padding."""
    return batch.packing.unpack(torch.from_numpy(batch.ids)).numpy()


@given(SENTENCES, st.booleans())
def test_input_index_leads_back_to_the_ids(sentences: list[list[int]], boundaries: bool) -> None:
    batch = of_sentences(sentences, 10, boundaries)
    np.testing.assert_array_equal(batch.input_rows, np.unique(batch.ids) - 1)
    assert batch.input_index.shape == batch.ids.shape
    np.testing.assert_array_equal(batch.input_rows[batch.input_index] + 1, batch.ids)
    assert batch.input_rows.dtype == batch.target_rows.dtype == np.int64


def test_batch_without_sentences() -> None:
    """An empty batch, for a worker that has no sentences left, has no targets and no positions."""
    batch = of_sentences([], 10, True)
    assert (batch.num_targets, batch.num_tokens, batch.num_positions) == (0, 0, 0)
    assert batch.ids.shape == (0,) and batch.packing.sizes == []


@given(st.integers(0, 10**9), st.integers(1, 64))
def test_parts_cover_all_sentences_once(num_sentences: int, num_workers: int) -> None:
    parts = [WorkerPart.of(num_sentences, worker, num_workers) for worker in range(num_workers)]
    assert parts[0].first == 0
    assert parts[-1].end == num_sentences
    assert all(a.end == b.first for a, b in pairwise(parts))
    sizes = [part.end - part.first for part in parts]
    assert max(sizes) - min(sizes) <= 1


@st.composite
def growths(draw: st.DrawFn, num_workers: int) -> BatchGrowth:
    """Draw a batch growth: a fixed size, or growth from one or many sentences, slow or sudden."""
    first, per_tokens = draw(st.sampled_from([(0, 0.0), (1, 10.0), (5, 60.0), (40, 1.0), (3, 0.0), (9, 1000.0)]))
    return BatchGrowth(draw(st.integers(1, 9)), num_workers, first, per_tokens, 6.0)


def global_batch(growth: BatchGrowth, trained: int) -> float:
    grown = trained * 6.0 / growth.per_tokens if growth.per_tokens else 0.0
    return growth.first * (1 + grown) if growth.first else growth.limit * growth.num_workers


@given(st.integers(1, 700), st.integers(1, 7), st.integers(0, 3), st.data())
def test_epoch_holds_every_sentence_once(
    num_sentences: int, num_workers: int, epoch: int, data: st.DataObject
) -> None:
    """For any growth of the batches, all workers take the same number of steps and use each sentence once."""
    assume(num_workers <= num_sentences)
    growth = data.draw(growths(num_workers))
    lengths = np.random.default_rng(num_sentences).integers(1, 12, num_sentences)
    streams = [stream_of(lengths, worker, num_workers, growth=growth) for worker in range(num_workers)]
    seen = []
    for stream in streams:
        batches = list(stream.epoch(epoch))
        assert len(batches) == stream.steps_of(epoch) == streams[0].steps_of(epoch)
        for batch in batches:
            assert batch.sentences.size <= batch.size <= growth.limit
            np.testing.assert_array_equal(ids_of(batch)[:, 1] if batch.ids.size else [], batch.sentences + 3)
            np.testing.assert_array_equal(batch.packing.mask().sum(1), lengths[batch.sentences] + 2)
        seen += [batch.sentences for batch in batches]
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(num_sentences))


@given(st.integers(1, 1500), st.integers(1, 9), st.integers(0, 2), st.data())
def test_sizes_are_what_a_loop_gives(num_sentences: int, num_workers: int, epoch: int, data: st.DataObject) -> None:
    """Sizes and turns follow from the sentences that were trained before the pool, on every worker alike."""
    assume(num_workers <= num_sentences)
    growth = data.draw(growths(num_workers))
    stream = stream_of(np.full(num_sentences, 5), num_workers - 1, num_workers, growth=growth)
    longest = -(-num_sentences // num_workers)
    expected: list[tuple[int, int]] = []
    taken = 0
    while taken < longest:
        whole = global_batch(growth, epoch * num_sentences + taken * num_workers)
        size = min(max(round(whole / num_workers), 1), growth.limit, longest)
        turns = max(round(num_workers / whole), 1)
        for _ in range(max(POOL_BATCHES // turns, 1)):
            if taken < longest:
                before = epoch * num_sentences + min(taken * num_workers, num_sentences)
                assert stream.trained_before(epoch, len(expected)) == before
                expected += [(size, turns)] * turns
                taken += size
    assert [(batch.size, batch.turns) for batch in stream.epoch(epoch)] == expected
    assert stream.trained_before(epoch, len(expected)) == (epoch + 1) * num_sentences


@pytest.mark.parametrize(("num_workers", "turns"), [(4, 1), (7, 2), (12, 3), (64, 16), (280, 70)])
def test_workers_take_turns(num_workers: int, turns: int) -> None:
    """If there are more workers than sentences in a step, as many workers as sentences have one each."""
    growth = BatchGrowth(32, num_workers, 4)
    streams = [stream_of(np.full(3000, 5), worker, num_workers, growth=growth) for worker in range(num_workers)]
    steps = list(zip(*(islice(stream.epoch(0), 2 * turns) for stream in streams), strict=True))
    taken = 0
    for number, step in enumerate(steps):
        sizes = [batch.sentences.size for batch in step]
        assert [n for n, size in enumerate(sizes) if size] == list(range(number % turns, num_workers, turns))
        assert max(sizes) == 1 and num_workers // turns <= sum(sizes) <= -(-num_workers // turns)
        assert {stream.trained_before(0, number) for stream in streams} == {taken}
        assert {(batch.size, batch.turns) for batch in step} == {(1, turns)}
        taken += sum(sizes)


def test_the_global_batch_does_not_depend_on_the_number_of_workers() -> None:
    for num_workers in (1, 4, 16):
        growth = BatchGrowth(1000, num_workers, 32, 300_000.0, 25.0)
        sizes = [growth.sentences(trained) * num_workers for trained in (0, 12_000, 36_000)]
        assert sizes == [32, 64, 128]
    assert BatchGrowth(32, 64, 32, 3e5, 25.0).sentences(0) == 1, "not below a sentence per worker that takes part"
    assert [BatchGrowth(32, 64, 8, 75_000.0, 25.0).turns(trained) for trained in (0, 3000, 9000, 10**6)] == [8, 4, 2, 1]
    assert BatchGrowth(32, 2, 32, 3e5, 25.0).sentences(10**9) == 32, "not above the limit"


def test_the_fraction_of_the_batch_that_the_workers_can_train() -> None:
    growth = BatchGrowth(32, 2, 8, 75_000.0, 25.0)  # 64 sentences at most, which the law reaches after 21,000
    assert [growth.fulfilled(trained) for trained in (0, 20_000, 21_000, 45_000)] == [1, 1, 1, 0.5]
    assert BatchGrowth(32, 2).fulfilled(10**9) == BatchGrowth(32, 2, 8).fulfilled(10**9) == 1, "the batch does not grow"


@given(st.integers(1, 900), st.integers(1, 9), st.data())
def test_starting_later_skips(num_sentences: int, num_workers: int, data: st.DataObject) -> None:
    """A resumed run starts like this, also across pools; the sentences before it are those of the skipped batches."""
    assume(num_workers <= num_sentences)
    lengths = np.random.default_rng(7).integers(1, 12, num_sentences)
    stream = stream_of(lengths, num_workers - 1, num_workers, growth=data.draw(growths(num_workers)))
    first = data.draw(st.integers(0, stream.steps_of(2)))
    assert orders(stream, 2, first) == orders(stream, 2)[first:]
    before = sorted(number for batch in orders(stream, 2)[:first] for number in batch)
    assert stream.sentences_before(2, first).tolist() == before


def orders(stream: BatchStream, epoch: int, first_step: int = 0) -> list[list[int]]:
    return [batch.sentences.tolist() for batch in stream.epoch(epoch, first_step)]


def test_a_pool_boundary_is_no_seam() -> None:
    stream = stream_of(np.ones(2 * POOL_BATCHES * 4 + 3, np.int64), batch_size=4)
    whole = orders(stream, 0)
    for first in (POOL_BATCHES - 1, POOL_BATCHES, POOL_BATCHES + 1, 2 * POOL_BATCHES):
        assert orders(stream, 0, first) == whole[first:]


def test_order_is_a_function_of_seed_epoch_and_worker() -> None:
    lengths = lengths_of(np.random.default_rng(0), 1000)
    assert orders(stream_of(lengths), 0) == orders(stream_of(lengths), 0)
    assert orders(stream_of(lengths), 0) != orders(stream_of(lengths), 1)
    assert orders(stream_of(lengths, seed=1), 0) != orders(stream_of(lengths, seed=2), 0)
    equal = np.full(1000, 5)
    first = [[i % 500 for i in batch] for batch in orders(stream_of(equal, 0, 2), 0)]
    second = [[i % 500 for i in batch] for batch in orders(stream_of(equal, 1, 2), 0)]
    assert first != second, "two workers shuffle alike"


def test_order_is_random() -> None:
    """Blocks and batches move: a sentence's place in one epoch says nothing about its place in the next."""
    lengths = lengths_of(np.random.default_rng(0), 40 * BLOCK)
    places = []
    for epoch in range(2):
        order = np.concatenate(orders(stream_of(lengths, batch_size=8), epoch))
        places.append(np.argsort(order))
    numbers = np.arange(lengths.size)
    assert abs(np.corrcoef(places[0], places[1])[0, 1]) < 0.4
    assert abs(np.corrcoef(places[0], numbers)[0, 1]) < 0.5
    mates = [len({number // BLOCK for number in batch}) for batch in orders(stream_of(lengths, batch_size=8), 0)]
    assert np.mean(mates) > 1.5, "batches hold neighbours of the corpus only"


def test_lengths_do_not_follow_the_step() -> None:
    """Batches are of similar length, but long and short ones alternate at random."""
    lengths = lengths_of(np.random.default_rng(1), 4 * POOL_BATCHES * 32)
    means = [batch.num_tokens / 32 for batch in stream_of(lengths, batch_size=32).epoch(0)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.25


@pytest.mark.parametrize(("size", "most"), [(4, 0.16), (8, 0.12), (32, 0.08)])
def test_workers_have_like_work_at_a_step(size: int, most: float) -> None:
    """The longest batch of a step, for which all workers wait, is not much longer than the mean of all workers."""
    lengths = lengths_of(np.random.default_rng(2), 16 * 2 * POOL_BATCHES * size)
    work = [[b.num_tokens for b in stream_of(lengths, w, 16, batch_size=size).epoch(0)] for w in range(16)]
    assert np.max(work, axis=0).sum() / np.mean(work, axis=0).sum() - 1 < most


@pytest.mark.parametrize("size", [1, 3, 4, 32])
def test_a_step_mixes_lengths(size: int) -> None:
    """The sentences of a step are of several lengths, however few each worker has."""
    lengths = lengths_of(np.random.default_rng(2), 16 * 2 * POOL_BATCHES * size)
    workers = [
        [np.log(lengths[b.sentences]) for b in stream_of(lengths, w, 16, batch_size=size).epoch(0)] for w in range(16)
    ]
    assert np.mean([np.concatenate(batches).std() for batches in zip(*workers, strict=True)]) > 0.2


def test_batches_are_of_like_length() -> None:
    """Fewer sequential positions than batches of random sentences, but no batch of one length only."""
    lengths = lengths_of(np.random.default_rng(2), 5 * POOL_BATCHES * 32)
    batches = list(stream_of(lengths, batch_size=32).epoch(0))
    assert sum(len(b.packing.sizes) for b in batches) < 0.75 * (lengths.reshape(-1, 32) + 2).max(1).sum()
    sizes = [lengths[b.sentences] + 2 for b in batches]
    assert np.mean([of_batch.std() / of_batch.mean() for of_batch in sizes]) > 0.15


def test_evaluation_goes_through_every_sentence_in_order() -> None:
    shards: ShardSet = FakeShards(np.full(23, 4))  # type: ignore[assignment]
    for num_workers in (1, 2, 5):
        seen = [
            batch.sentences for worker in range(num_workers)
            for batch in evaluation(shards, worker, num_workers, 4, 100, True)
        ]
        np.testing.assert_array_equal(np.concatenate(seen), np.arange(23))


@pytest.mark.parametrize("num_shards", [1, 3, 8])
@pytest.mark.parametrize("num_workers", [1, 2, 7])
def test_batches_of_real_shards(tmp_path: Path, num_shards: int, num_workers: int) -> None:
    """The texts of all workers' batches are the texts in the files."""
    rng = np.random.default_rng(num_shards)
    texts = [tuple(rng.integers(3, 40, rng.integers(1, 9)).tolist()) for _ in range(57)]
    write_shards(tmp_path, texts, num_shards)
    with ShardSet.open(tmp_path) as shards:
        seen = []
        for worker in range(num_workers):
            growth = BatchGrowth(4, num_workers)
            for batch in BatchStream(shards, worker, num_workers, growth, 1, 100, boundaries=False).epoch(0):
                seen += [tuple(row[row > 0].tolist()) for row in ids_of(batch)]
    assert sorted(seen) == sorted(texts)


def write_shards(folder: Path, texts: list[tuple[int, ...]], num_shards: int) -> None:
    vocabulary = Vocabulary.from_words(WORDS)
    for index in range(num_shards):
        mine = texts[index::num_shards]
        tokens = np.array([t for text in mine for t in text], np.int32)
        header = Header(
            "train", index, num_shards, len(mine), tokens.size, int((tokens == 3).sum()), vocabulary.sha256,
            vocabulary.size, "0" * 64, "{}",
        )
        writer = ShardWriter(folder / shard_name("train", index, num_shards), header, ["text"])
        writer.append(tokens, np.array([len(text) for text in mine]))
        writer.close()


def test_read_ahead_gives_the_same_batches_and_errors() -> None:
    """Items come in order, at most ``depth`` are read ahead, errors arrive in place, and closing ends the thread."""
    made: list[int] = []

    def source() -> Iterator[Batch]:
        for batch in stream_of(np.full(40, 5), batch_size=8).epoch(0):
            made.append(batch.num_tokens)
            yield batch
        raise OSError("no more")

    plain = list(stream_of(np.full(40, 5), batch_size=8).epoch(0))
    ahead = read_ahead(source(), depth=2)
    for number, batch in enumerate(plain):
        np.testing.assert_array_equal(next(ahead).ids, batch.ids)
        assert len(made) <= number + 3
    with pytest.raises(OSError, match="no more"):
        next(ahead)
    assert list(read_ahead(iter(()))) == []
    before = threading.active_count()
    closed = read_ahead(iter(plain), depth=3)
    next(closed)
    closed.close()
    assert threading.active_count() == before
