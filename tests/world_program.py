"""The ranks of tests/test_world.py: ``checks FOLDER``, or one way to fail on one rank while the others wait."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lapse_elmo.errors import ConfigError, CorpusError, UserError
from lapse_elmo.mpi.launch import launch
from lapse_elmo.mpi.world import World
from tests import collective


class Checks:
    """Checks of the collective calls, on every rank."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rank, self.size = world.rank, world.size

    def all(self) -> dict[str, Callable[[], None]]:
        return {name: getattr(self, name) for name in names()}

    def places(self) -> None:
        """Ranks of one machine are one node."""
        world = self.world
        assert (world.node, world.num_nodes) == (0, 1)
        assert (world.local_rank, world.local_size) == (self.rank, self.size)
        assert str(world).startswith(f"rank {self.rank}/{self.size} ")

    def no_names_in_shared_memory(self) -> None:
        """Mapped files have no name in /dev/shm, so that a killed job leaves none behind."""
        maps = Path("/proc/self/maps").read_text().splitlines()
        assert not [line for line in maps if "/dev/shm/" in line and not line.endswith("(deleted)")]

    def bcast(self) -> None:
        for root in range(self.size):
            mine = {"root": root, "data": list(range(1000 * root))} if self.rank == root else None
            assert self.world.bcast(mine, root) == {"root": root, "data": list(range(1000 * root))}

    def bcast_none(self) -> None:
        assert self.world.bcast(None) is None

    def bcast_array(self) -> None:
        array = np.arange(6.0).reshape(2, 3) + 10 * self.rank
        self.world.bcast_array(array)
        np.testing.assert_array_equal(array, np.arange(6.0).reshape(2, 3))
        scalar = np.array(1.5 + self.rank)
        self.world.bcast_array(scalar)
        assert scalar == 1.5

    def deal(self) -> None:
        called = []
        got = self.world.deal(lambda: called.append(0) or ["x" * 5000 * r for r in range(self.size)])  # type: ignore[func-returns-value]
        assert got == "x" * 5000 * self.rank
        assert called == [0] * (self.rank == 0)

    def merge(self) -> None:
        """Every rank's part arrives once, and a rank receives at most log2(size) times."""
        mine, added, parts = {self.rank}, [], []
        self.world.merge(lambda: parts.append(len(mine)) or (mine, "x" * 5000), lambda part: added.append(part))  # type: ignore[func-returns-value]
        assert len(parts) == (self.rank > 0)
        for number, (theirs, text) in enumerate(added):
            assert theirs == {self.rank + 2**number} and len(text) == 5000
        assert 2 ** len(added) < 2 * self.size

    def merge_adds_up(self) -> None:
        mine = [self.rank]
        self.world.merge(lambda: mine, mine.extend)
        assert self.rank or sorted(mine) == list(range(self.size))

    def deal_an_error(self) -> None:
        def refuse() -> list[int]:
            raise CorpusError("the file is gone")

        error = _caught(lambda: self.world.deal(refuse))
        assert type(error) is CorpusError and str(error) == "the file is gone" and error.everywhere

    def node_gather_numbers(self) -> None:
        got = self.world.node_gather_numbers(np.array([self.rank, 7]))
        np.testing.assert_array_equal(got, [[r, 7] for r in range(self.size)])  # all ranks are one node

    def allgather(self) -> None:
        got = self.world.allgather((self.rank, "x" * 5000 * self.rank))
        assert got == [(r, "x" * 5000 * r) for r in range(self.size)]

    def gather_numbers(self) -> None:
        got = self.world.gather_numbers(np.array([self.rank, 0.5], np.float64))
        np.testing.assert_array_equal(got, [[r, 0.5] for r in range(self.size)])
        strided = np.arange(8, dtype=np.int64)[::2] + self.rank
        np.testing.assert_array_equal(self.world.gather_numbers(strided)[-1], np.arange(4) * 2 + self.size - 1)

    def sum_of_integers(self) -> None:
        array = np.arange(1000, dtype=np.float32) * (self.rank + 1)
        total = self.world.sum_(array)
        assert total is array
        np.testing.assert_array_equal(total, np.arange(1000) * (self.size * (self.size + 1) // 2))

    def sum_has_equal_bits(self) -> None:
        array = np.random.default_rng(self.rank).normal(size=10_001).astype(np.float32)
        parts = self.world.allgather(array.copy())
        total = self.world.sum_(array)
        np.testing.assert_allclose(total, np.sum(parts, 0, dtype=np.float64), atol=1e-5)
        assert len(set(self.world.allgather(total.tobytes()))) == 1

    def agree(self) -> None:
        called = []
        result = self.world.agree(lambda: called.append(self.rank) or "rank 0 says")  # type: ignore[func-returns-value]
        assert result == "rank 0 says"
        assert called == ([0] if self.rank == 0 else [])

    def agree_on_an_error(self) -> None:
        def refuse() -> None:
            raise CorpusError("the file is gone")

        error = _caught(lambda: self.world.agree(refuse))
        assert type(error) is CorpusError
        assert str(error) == "the file is gone"
        assert error.everywhere

    def together(self) -> None:
        assert self.world.together(lambda: self.rank * 10) == self.rank * 10

    def together_with_one_error(self) -> None:
        last = self.size - 1

        def refuse_on_last() -> None:
            if self.rank == last:
                raise ConfigError("no")

        error = _caught(lambda: self.world.together(refuse_on_last))
        assert type(error) is ConfigError
        assert str(error) == ("no" if self.size == 1 else f"[rank {last}/{self.size} {self.world.host}] no")
        assert error.everywhere

    def together_with_errors_alike(self) -> None:
        def refuse() -> None:
            raise ConfigError("all alike")

        error = _caught(lambda: self.world.together(refuse))
        assert str(error) == "all alike"
        assert error.everywhere

    def barrier(self) -> None:
        for late in range(self.size):
            before = time.monotonic()
            if self.rank == late:
                time.sleep(0.05)
            arrived = self.world.allgather(time.monotonic())
            self.world.barrier()
            assert time.monotonic() >= max(arrived)  # CLOCK_MONOTONIC is one clock for a machine
            self.world.node_barrier()
            assert time.monotonic() - before >= 0.04 or self.rank != late


def names() -> list[str]:
    return [name for name in vars(Checks) if not name.startswith("_") and name != "all"]


def _caught(function: Callable[[], object]) -> UserError:
    try:
        function()
    except UserError as error:
        return error
    raise AssertionError("nothing was raised")


def _raise(error: BaseException) -> None:
    raise error


def _in_thread(error: Exception) -> None:
    threading.Thread(target=lambda: _raise(error)).start()
    time.sleep(60)


FAILURES: dict[str, Callable[[], object]] = {
    "exception": lambda: _raise(RuntimeError("this breaks")),
    "user-error": lambda: _raise(CorpusError("this file is bad")),
    "exit-0": lambda: sys.exit(0),
    "exit-text": lambda: sys.exit("parting words"),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "thread": lambda: _in_thread(RuntimeError("thread breaks")),
    "full-disk": lambda: _in_thread(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),  # as TensorBoard's thread does
    "interrupt": lambda: _raise(KeyboardInterrupt()),
}


def main(argv: list[str], join: Callable[[], World]) -> int | None:
    command, *rest = argv
    if command == "before":  # a mistake that every rank sees before it joins, such as a wrong option
        raise ConfigError("unknown option '--what'")
    world = join()
    if command == "checks":
        collective.run(Checks(world).all(), world, Path(rest[0]))
    elif command == "agreed":
        world.agree(lambda: _raise(CorpusError("the shards are gone")))
    elif command == "fail":
        kind, rank = rest
        if world.rank == int(rank):
            FAILURES[kind]()
        world.barrier()
        time.sleep(60)
    elif command == "leave":
        return int(rest[0])
    else:
        print(f"{world} says", flush=True)
    return None


if __name__ == "__main__":
    launch(main, sys.argv[1:], prog="bin/test")


