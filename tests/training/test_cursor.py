"""Which sentences each rank trains at each step, in worlds that change within an epoch; ranks are played in turn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from lapse_elmo.batches import Batch
from lapse_elmo.checkpoint.sentences import BitSet, deal_out, pack, unite
from lapse_elmo.config.training import parse_train
from lapse_elmo.corpus.shards import ShardSet
from lapse_elmo.cursor import Cursor, Position, SavedCursor
from lapse_elmo.mpi.world import World, solo
from tests.training.corpora import TINY, Prepared, prepare, random_sentences


def sentences_of(batches: Sequence[Batch]) -> list[int]:
    return [number for batch in batches for number in batch.sentences.tolist()]


class Ranks(World):
    """One of several ranks that are played one after another, all of whom would say the same."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size

    def allgather(self, obj: object) -> list:
        return [obj] * self.size


def play(config_options: Sequence[str], sizes: Sequence[tuple[int, int]], shards: ShardSet) -> list[list[int]]:
    """Return the sentences trained by worlds, given as (size, steps), that resume from each other in an epoch."""
    config = parse_train(config_options)
    saved: tuple[Position, int, list[BitSet]] | None = None
    trained: list[list[int]] = []
    for size, steps in sizes:
        cursors = [Cursor(config, Ranks(rank, size), shards, at) for rank, at in enumerate(dealt(saved, size))]
        trained.append([])
        for cursor in cursors:
            for batches, _ in zip(cursor.batches(), range(steps), strict=False):
                cursor.trained(batches)
                trained[-1] += sentences_of(batches)
        both = [pair for cursor in cursors if (pair := cursor.sentences()) is not None]
        sets = [BitSet(unite([pack(pair[i]) for pair in both])) for i in (0, 1)]
        saved = cursors[0].position, size, sets
    return trained


def dealt(saved: tuple[Position, int, list[BitSet]] | None, size: int) -> list[SavedCursor | None]:
    """Return what each rank reads of a checkpoint."""
    if saved is None:
        return [None] * size
    position, saved_size, (epoch, left) = saved
    return [share.cursor(rank, size) for rank, share in enumerate(deal_out(position, epoch, left, saved_size, size))]


TO_THE_END = 10**6
GROWING = ("--batch-size", "9", "--first-batch", "6", "--growth-tokens", "1500")


@pytest.mark.parametrize("options", [("--batch-size", "4"), GROWING, (*GROWING, "--accumulate", "3")])
@pytest.mark.parametrize(
    "sizes",
    [
        [(2, 70), (2, 3), (3, 20), (3, 0), (1, 5), (5, TO_THE_END)], [(1, 3), (4, 1), (4, 66), (2, TO_THE_END)],
        [(3, 125), (16, TO_THE_END)],
    ],
)
def test_each_sentence_once_through_many_changes(
    tmp_path: Path, sizes: list[tuple[int, int]], options: tuple[str, ...]
) -> None:
    corpus = prepare(tmp_path, random_sentences(4, 1501, 20, (1, 9)), ["w00 w01"])
    with ShardSet.open(corpus.shards) as shards:
        trained = play([*corpus.options, *TINY, *options, "--epochs", "1"], sizes, shards)
    assert sorted(number for world in trained for number in world) == list(range(1501))


def test_an_epoch_of_which_nothing_is_left_ends(tmp_path: Path) -> None:
    """Of 16 ranks one has a third sentence, for the eleventh of 15 steps; the run stops after the twelfth."""
    corpus = prepare(tmp_path, random_sentences(4, 33, 20, (1, 9)), ["w00 w01"])
    options = [*corpus.options, *TINY, "--first-batch", "3", "--growth-tokens", "0", "--epochs", "2"]
    with ShardSet.open(corpus.shards) as shards:
        trained = play(options, [(16, 12), (3, TO_THE_END)], shards)
    assert sorted(trained[0]) == [*range(33)] and sorted(trained[1]) == [*range(33)]


def test_the_same_ranks_take_the_same_batches(tmp_path: Path) -> None:
    corpus = prepare(tmp_path, random_sentences(4, 1501, 20, (1, 9)), ["w00 w01"])
    options = [*corpus.options, *TINY, "--batch-size", "4", "--epochs", "1"]
    with ShardSet.open(corpus.shards) as shards:
        (whole,) = play(options, [(2, 100)], shards)
        first, second, third = play(options, [(2, 64), (2, 1), (2, 35)], shards)
    halves = [first[:256] + second[:4] + third[:140], first[256:] + second[4:] + third[140:]]
    assert whole == halves[0] + halves[1]


@pytest.mark.parametrize("options", [GROWING, (*GROWING, "--accumulate", "2")])
def test_the_same_ranks_take_the_same_growing_batches(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Resuming on as many ranks gives the same batches, within a pool, between pools and in the second epoch."""
    corpus = prepare(tmp_path, random_sentences(4, 1501, 20, (1, 9)), ["w00 w01"])
    config = [*corpus.options, *TINY, *options, "--epochs", "2"]
    with ShardSet.open(corpus.shards) as shards:
        (whole,) = play(config, [(1, TO_THE_END)], shards)
        assert sorted(whole) == sorted([*range(1501)] * 2)
        parts = play(config, [(1, 64), (1, 1), (1, 35), (1, 90), (1, TO_THE_END)], shards)
    assert whole == [number for part in parts for number in part]


def test_few_ranks_take_the_batches_of_many(tmp_path: Path) -> None:
    corpus = prepare(tmp_path, random_sentences(4, 701, 20, (1, 9)), ["w00 w01"])
    options = [*corpus.options, *TINY, *GROWING, "--epochs", "1"]
    with ShardSet.open(corpus.shards) as shards:
        many = [list(Cursor(parse_train(options), Ranks(rank, 4), shards).batches()) for rank in range(4)]
        few = [
            list(Cursor(parse_train([*options, "--accumulate", "2"]), Ranks(rank, 2), shards).batches())
            for rank in range(2)
        ]
    for theirs, ours in zip(zip(*many, strict=True), zip(*few, strict=True), strict=True):
        assert [sentences_of(batches) for batches in theirs] == [[*b.sentences] for batches in ours for b in batches]


def test_solo_world_needs_no_saved_cursor(small: Prepared) -> None:
    with ShardSet.open(small.shards) as shards:
        cursor = Cursor(parse_train([*small.options, *TINY]), solo(), shards)
    assert cursor.sentences() is None and cursor.exact and not cursor.finished
