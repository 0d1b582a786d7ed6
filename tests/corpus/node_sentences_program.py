"""The ranks of tests/corpus/test_node_sentences.py: ``NODES FOLDER``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from lapse_elmo.corpus import node_sentences, shard_file
from lapse_elmo.corpus.shards import ShardSet
from lapse_elmo.errors import CorpusError
from lapse_elmo.mpi.launch import launch
from lapse_elmo.mpi.world import World
from tests import collective
from tests.corpus.test_shards import write_set

SENTENCES = [[3 + n % 5] * (1 + n % 6) for n in range(60)]
SHARDS = {"train": 7, "heldout": 2}


class Checks:
    """On every rank; the parts of the ranks meet one to three of the shards."""

    def __init__(self, world: World) -> None:
        self.world = world

    def sets(self, name: str) -> list[ShardSet]:
        """Write both sets, and return them."""
        folder = Path(sys.argv[2]) / name
        for split, number in SHARDS.items():
            sentences = SENTENCES if split == "train" else SENTENCES[:4]
            self.world.agree(lambda sentences=sentences, n=number, s=split: bool(write_set(folder, sentences, n, s)))  # type: ignore[misc]
        sets = [ShardSet.open(folder, split) for split in SHARDS]
        self.world.barrier()  # before one of them is damaged
        return sets

    def every_shard_is_opened_once_per_node(self) -> None:
        sets = self.sets("once")
        opened: list[str] = []
        open_file = h5py.File

        def counted(path: str, *arguments: Any, **options: Any) -> h5py.File:
            opened.append(path)
            return open_file(path, *arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shard_file.h5py, "File", counted)
            node_sentences.keep_sentences(sets, self.world)
            by_node: dict[int, list[str]] = {}
            for node, paths in self.world.allgather((self.world.node, opened)):
                by_node.setdefault(node, []).extend(paths)
            assert all(len(paths) == len(set(paths)) for paths in by_node.values())
            assert len(set().union(*by_node.values())) == sum(SHARDS.values())
            assert len(opened) <= -(-sum(SHARDS.values()) // self.world.local_size)
            for shards, split in zip(sets, SHARDS, strict=True):
                fresh = ShardSet.open(Path(sys.argv[2]) / "once", split)
                first, end = (len(shards) * rank // self.world.size for rank in (self.world.rank, self.world.rank + 1))
                wanted = np.arange(first, end)
                num_opened = len(opened)
                shards.read(wanted)
                assert len(opened) == num_opened, "a sentence in memory was read from a file"
                wanted = wanted[::2]
                for got, expected in zip(shards.read(wanted), fresh.read(wanted), strict=True):
                    np.testing.assert_array_equal(got, expected)
                    assert got.dtype == expected.dtype

    def damage_is_reported_on_every_rank(self) -> None:
        sets = self.sets("damaged")
        path = Path(sets[0].paths[3])

        def damage() -> None:
            with h5py.File(path, "r+") as file:
                del file["tokens"]

        self.world.agree(damage)
        with pytest.raises(CorpusError, match=path.name):
            node_sentences.keep_sentences(sets, self.world)

    def a_set_that_is_too_large_is_left_out(self) -> None:
        sets = self.sets("large")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lapse_elmo.corpus.shards._MOST_KEPT_BYTES", 100)
            node_sentences.keep_sentences(sets, self.world)
        train, heldout = sets
        assert train.kept is None and heldout.kept is not None


NAMES = [name for name in vars(Checks) if not name.startswith("_") and name != "sets"]


def main(argv: list[str], enter: Callable[[], World]) -> None:
    collective.run_on_nodes(argv, enter, Checks, NAMES)


if __name__ == "__main__":
    launch(main, sys.argv[1:], "node_sentences_program")
