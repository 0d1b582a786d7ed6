"""Contract checks for rows that move between nodes or are replicated while all ranks use them."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from lapse_elmo.mpi.world import World
from lapse_elmo.ps.api import ParameterServer
from tests.ps.layout import LAYOUT, NUM_SAMPLED, every_key, ones, pulled

STALENESS = 8  # in clocks; the engines' default
ARRIVAL_S = 10.0  # what a server does on its own must have happened by then, on a busy machine too


class Moves:
    """Each check gets a new server whose rows are all 0."""

    world: World

    def adds_during_forced_moves(self, server: ParameterServer) -> None:
        """No push is lost while all ranks keep localizing the same rows and pushing to them."""
        long, wide = every_key("long")[:300], every_key("wide")[:4]
        self.world.barrier()
        for round_ in range(25):
            tickets = [server.localize_async(long[round_ % 3 :: 3].copy()), server.localize_async(wide)]
            server.push(wide, ones(wide))
            server.push(long, ones(long))
            server.wait(tickets[round_ % 2])
            server.push(long[::-1].copy(), ones(long, 2))
            server.wait(tickets[1 - round_ % 2])
        server.quiesce()
        assert (pulled(server, long) == 25 * 3 * self.world.size).all()
        assert (pulled(server, wide) == 25 * self.world.size).all()

    def thousands_of_localizes(self, server: ParameterServer) -> None:
        """Localizes of the same keys by all nodes at once all complete, and the rows keep their values."""
        keys = every_key("long")[40:56]
        values = np.arange(48, dtype=np.float32).reshape(16, 3)
        if self.world.rank == 0:
            server.set(keys, values)
        server.quiesce()
        rng = self._rng()
        for _ in range(2):
            tickets = [server.localize_async(rng.permutation(keys)[: rng.integers(1, 17)]) for _ in range(400)]
            np.testing.assert_array_equal(pulled(server, keys), values)
            for ticket in rng.permutation(np.array(tickets)).tolist():
                server.wait(ticket)
        server.quiesce()
        np.testing.assert_array_equal(pulled(server, keys), values)

    def whole_segments_move(self, server: ParameterServer) -> None:
        """A whole segment moves to each rank in turn, in one call or in chunks."""
        keys = every_key("long")
        values = np.arange(15000, dtype=np.float32).reshape(5000, 3)
        if self.world.rank == 0:
            server.set(keys, values)
        server.quiesce()
        for turn in range(2 * self.world.size):
            if turn % self.world.size == self.world.rank:
                for chunk in np.array_split(keys, 1 + turn % 3):
                    server.localize(chunk)
                server.push(keys, ones(keys))
                np.testing.assert_array_equal(pulled(server, keys), values + turn + 1)
            server.quiesce()
        np.testing.assert_array_equal(pulled(server, keys), values + 2 * self.world.size)

    def localized_rows_are_local(self, server: ParameterServer) -> None:
        """Localized rows are local if no other node wants them."""
        mine = np.arange(self.world.rank, 5000, self.world.size)
        server.localize(LAYOUT["long"].keys(mine))
        assert _are_local(server, "long", mine)
        self.world.barrier()
        assert _are_local(server, "long", mine)
        before = server.stats.segments["long"].remote_pulled_rows
        pulled(server, LAYOUT["long"].keys(mine))
        assert server.stats.segments["long"].remote_pulled_rows == before

    def intended_rows_become_local(self, server: ParameterServer) -> None:
        """Announced rows are local in time for their clocks; with replicas, also rows that all ranks announce."""
        mine = np.arange(self.world.rank, 1000, self.world.size)
        shared = np.arange(4000, 4100) if self._replicates else mine
        server.intent(LAYOUT["long"].keys(mine), 3, 6)
        server.intent(LAYOUT["long"].keys(shared), 4, 6)
        for _ in range(3):
            server.advance_clock()
        _eventually(lambda: _are_local(server, "long", mine), "announced rows are not local")
        server.advance_clock()
        _eventually(lambda: _are_local(server, "long", shared), "rows that all announced are not local")

    def own_pushes_are_seen_wherever_rows_are(self, server: ParameterServer) -> None:
        """A worker sees its own pushes at once, wherever the rows are, while they move and intents begin and end."""
        segment, rng = LAYOUT["long"], self._rng()
        everybody = segment.keys(np.arange(64))
        own = everybody[self.world.rank :: self.world.size].copy()
        hot = segment.keys(np.arange(900, 916))
        out = np.empty((hot.size, 3), np.float32)
        for count in range(1, 61):
            if count % 5 == 0:  # the other workers want this worker's rows too
                server.intent(everybody, count, count + int(rng.integers(1, 4)))
                server.intent(hot, count + 1, count + 3)
            if count % 7 == self.world.rank:
                server.localize(everybody[:20])
            server.push(own, ones(own))
            np.testing.assert_array_equal(pulled(server, own), ones(own, count))
            server.wait(server.push_async(hot, ones(hot)))
            server.wait(server.pull_async(hot, out))
            assert out.min() >= count and out.max() <= 60 * self.world.size
            server.advance_clock()
        server.quiesce()
        np.testing.assert_array_equal(pulled(server, everybody), ones(everybody, 60))
        np.testing.assert_array_equal(pulled(server, hot), ones(hot, 60 * self.world.size))

    def sets_are_seen_wherever_rows_are(self, server: ParameterServer) -> None:
        """A worker's next pull sees its own set, and after a quiesce everybody does."""
        keys = every_key("long")[200:328]
        rng = np.random.default_rng(5)  # the same on all ranks
        for round_ in range(8):
            if round_ % 2:
                server.intent(keys, server.clock, server.clock + 2)
            if round_ % 4 == 2:
                server.localize(keys[self.world.rank :: self.world.size].copy())
            values = rng.integers(0, 1000, (keys.size, 3)).astype(np.float32)
            shares = rng.integers(0, self.world.size, keys.size)
            mine = shares == self.world.rank
            server.set(keys[mine], values[mine])
            if mine.any():
                np.testing.assert_array_equal(pulled(server, keys[mine]), values[mine])
            server.quiesce()
            np.testing.assert_array_equal(pulled(server, keys), values)
            self.world.barrier()  # all ranks have looked before the next round changes the rows
            server.push(keys, ones(keys))
            server.advance_clock()
            server.quiesce()
            np.testing.assert_array_equal(pulled(server, keys), values + self.world.size)
            self.world.barrier()

    def intents_of_all_for_the_same_rows(self, server: ParameterServer) -> None:
        """Intents of all workers for overlapping rows and clocks all count, with pushes in between."""
        rng, keys, expected = self._rng(), every_key("long")[:600], np.zeros(600)
        self.world.barrier()
        for clock in range(25):
            some = rng.choice(600, 150)
            start = clock + int(rng.integers(0, 4))
            server.intent(keys[some], start, start + int(rng.integers(1, 5)))
            server.push(keys[some], ones(keys[some]))
            np.add.at(expected, some, 1)
            out = pulled(server, keys[some])
            assert (out == out[:, :1]).all(), "half a push was seen"
            server.advance_clock()
        total = np.sum(self.world.allgather(expected), 0)
        server.quiesce()
        np.testing.assert_array_equal(pulled(server, keys), np.repeat(total[:, None], 3, 1))

    def intents_for_any_clocks(self, server: ParameterServer) -> None:
        """Intents may be for past, present and very distant clocks, or for very long intervals."""
        keys = every_key("long")[: 10 * self.world.size]
        for _ in range(4):
            server.advance_clock()
        for start, end in ((0, 1), (0, 4), (2, 5), (4, 5), (1000, 1001), (0, 10**9), (10**12, 10**15), (2**40, 2**62)):
            server.intent(keys, start, end)
            server.push(keys, ones(keys))
            server.advance_clock()
        server.quiesce()
        assert (pulled(server, keys) == 8 * self.world.size).all()

    def pushes_are_seen_after_a_number_of_clocks(self, server: ParameterServer) -> None:
        """Everybody sees a push once all workers have advanced their clocks by ``STALENESS``, without a quiesce."""
        keys = every_key("long")[:200]
        server.intent(keys, 0, 10_000)
        if self._replicates:
            _eventually(lambda: _are_local(server, "long", np.arange(200)), "the rows are not replicated")
        total = 0
        for round_ in range(1, 6):
            server.push(keys, ones(keys, round_))
            total += round_ * self.world.size
            self.world.barrier()
            for _ in range(STALENESS):
                server.advance_clock()
                self.world.barrier()
            assert (pulled(server, keys) == total).all(), "a replica is staler than it may be"
            self.world.barrier()

    def pushes_are_seen_after_a_barrier(self, server: ParameterServer) -> None:
        """Where rows have one copy, everybody sees a push after a barrier, without a quiesce."""
        keys = every_key("long")[:30]
        for round_ in range(30):
            if round_ % 3 == 1:
                server.localize(keys[self.world.rank :: 2].copy())
            server.push(keys, ones(keys))
            server.barrier()
            assert (pulled(server, keys) == self.world.size * (round_ + 1)).all()
            server.barrier()

    def reads_never_go_back(self, server: ParameterServer) -> None:
        """A row that one rank counts up never seems to count down, however it moves."""
        keys, last = every_key("wide")[:1], 0.0
        self.world.barrier()
        for count in range(1, 81):
            if count % 4 == self.world.rank % 4:
                server.localize(keys)
            if self.world.rank == self.world.size - 1:
                server.push(keys, ones(keys))
            row = pulled(server, keys)
            assert (row == row[0, 0]).all(), "half a push was seen"
            assert row[0, 0] >= last, f"{row[0, 0]} after {last}"
            last = row[0, 0]
        server.quiesce()
        assert (pulled(server, keys) == 80).all()

    def owned_rows_are_a_partition(self, server: ParameterServer) -> None:
        """The owned rows of all ranks partition each segment, wherever the rows have moved."""
        rng = self._rng()
        for round_ in range(3):
            server.localize(rng.choice(every_key("long"), 500))
            server.localize(every_key("single"))
            server.intent(rng.choice(every_key("sampled"), 200), round_, round_ + 2)
            server.advance_clock()
            server.quiesce()
            for segment in LAYOUT.segments:
                mine = server.owned_rows(segment.name)
                assert mine.dtype == np.int64 and (np.diff(mine) > 0).all()
                everyone = np.concatenate(self.world.allgather(mine))
                np.testing.assert_array_equal(np.sort(everyone), np.arange(segment.num_rows))

    def samples_while_rows_move(self, server: ParameterServer) -> None:
        """Sampled rows have the right values and accept pushes while rows move."""
        keys, rows = np.empty(64, np.int64), np.empty((64, 4), np.float32)
        handles = [server.prepare_sample(64, clock, clock + 1) for clock in range(3)]
        pushed = np.zeros(NUM_SAMPLED)
        for clock in range(20):
            handles.append(server.prepare_sample(64, clock + 3, clock + 4))
            server.pull_sample(handles.pop(0), keys, rows)
            assert np.unique(keys).size == 64
            assert (rows == rows[:, :1]).all()
            server.push(keys, np.ones((64, 4), np.float32))
            pushed[keys - LAYOUT["sampled"].first_key] += 1
            server.advance_clock()
        server.quiesce()
        total = np.sum(self.world.allgather(pushed), 0)
        np.testing.assert_array_equal(pulled(server, every_key("sampled")), np.repeat(total[:, None], 4, 1))

    def _rng(self) -> np.random.Generator:
        return np.random.default_rng(self.world.rank)

    @property
    def _replicates(self) -> bool:
        raise NotImplementedError


def _are_local(server: ParameterServer, name: str, rows: np.ndarray) -> bool:
    here = server.is_local(name)
    return here is None or bool(here[rows].all())


def _eventually(condition: Callable[[], bool], problem: str) -> None:
    """Wait until ``condition`` holds; fail with ``problem`` after ``ARRIVAL_S``."""
    deadline = time.monotonic() + ARRIVAL_S
    while not condition():
        assert time.monotonic() < deadline, problem
        time.sleep(0.002)
