"""The contract that every engine of the parameter server must keep, checked on all ranks of one job.

Run as ``contract_program.py ENGINE NODES [valid] FOLDER``; the ranks of each machine are split into that many nodes.
With ``valid``, calls that must be refused are left out: refusing needs neither other ranks nor a transport. Rows are
integers, so sums are exact. An engine is a function from (world, layout, sampled, first_sample) to a server.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from lapse_elmo.errors import ServerError
from lapse_elmo.mpi.launch import launch
from lapse_elmo.mpi.world import World
from lapse_elmo.ps.api import ParameterServer
from lapse_elmo.ps.embedded import EmbeddedServer
from lapse_elmo.ps.manager import TECHNIQUES
from lapse_elmo.ps.sampling import Distribution, Sampler
from tests import collective
from tests.ps.checks_of_moves import Moves
from tests.ps.checks_of_rules import Rules
from tests.ps.checks_of_tickets import Tickets
from tests.ps.checks_of_traces import Traces
from tests.ps.layout import HOT, LAYOUT, NUM_SAMPLED, WIDTH, every_key, pulled
from tests.ps.native_engines import EXCEPTIONS, OnOneNode
from tests.ps.refusals import REFUSALS, check_refusal, check_rows

Engine = Callable[..., ParameterServer]
ENGINES: dict[str, Engine] = {technique: partial(EmbeddedServer, technique=technique) for technique in TECHNIQUES}
NATIVE: dict[str, Engine] = {"lapse": OnOneNode("lapse"), "adapm": OnOneNode("adapm")}
ONE_COPY = {"relocation", "static", "lapse"}  # engines that never replicate
STATIC = {"static"}  # engines whose rows never move
ONLY = {  # checks of what only some engines promise, with those engines
    "pushes_are_seen_after_a_barrier": ONE_COPY,
    "reads_never_go_back": ONE_COPY,
    "localized_rows_are_local": {*ENGINES, *NATIVE} - STATIC,
    "a_push_carries_gradients_alone": {*ENGINES},
    "intended_rows_become_local": {*ENGINES, *NATIVE} - STATIC,
    "a_trace_has_calls_and_moves": {*ENGINES},
}
ROWS_AFTER_REFUSALS = "refused calls change no row"
VALID = "valid"


class Contract(Moves, Tickets, Rules, Traces):
    """Each check gets a new server whose rows are all 0."""

    def __init__(self, world: World, engine: str, refusals: bool) -> None:
        self.world = world
        self.name = engine
        self._names = names(engine, refusals)
        self.engine = {**ENGINES, **NATIVE}[engine]
        self._refusing: ParameterServer | None = None

    def checks(self) -> dict[str, Callable[[], None]]:
        return {name: partial(self._with_server, name) for name in self._names}

    def close(self) -> None:
        if self._refusing is not None:
            self._refusing.close()

    def _open(self, first_sample: int = 0, scheme: str = "preloc") -> ParameterServer:
        sampler = Sampler(Distribution("log-uniform", NUM_SAMPLED), scheme, False, seed=3, worker=self.world.rank)
        server = self.engine(self.world, LAYOUT, ("sampled", sampler), first_sample)
        if self.world.rank == 0:
            for segment in LAYOUT.segments:
                server.set(every_key(segment.name), np.zeros((segment.num_rows, segment.row_width), np.float32))
        server.quiesce()
        return server

    def _with_server(self, name: str) -> None:
        if name.startswith("refuses "):
            if self._refusing is None:
                self._refusing = self._open()  # one server for all refusals, since a refused call changes nothing
            check_refusal(self._refusing, REFUSALS[name.removeprefix("refuses ")])
            return
        if name == ROWS_AFTER_REFUSALS:
            assert self._refusing is not None
            self._refusing.quiesce()
            check_rows(self._refusing)
            return
        server = self._open()
        getattr(self, name)(server)
        server.close()

    def rows_are_as_set(self, server: ParameterServer) -> None:
        """Each rank sets its share in any order; everybody then sees all of it."""
        for segment in LAYOUT.segments[:4]:
            values = np.arange(segment.num_rows * segment.width, dtype=np.float32).reshape(-1, segment.width)
            mine = self._rng().permutation(np.arange(self.world.rank, segment.num_rows, self.world.size))
            server.set(segment.keys(mine), values[mine])
            server.quiesce()
            np.testing.assert_array_equal(pulled(server, every_key(segment.name)), values)

    def hot_rows_add_up(self, server: ParameterServer) -> None:
        """No push is lost when all ranks push to the same few rows at once."""
        keys = every_key("wide")[:HOT]
        deltas = np.ones((HOT, WIDTH), np.float32) * np.arange(1, HOT + 1, dtype=np.float32)[:, None]
        self.world.barrier()
        for _ in range(100):
            server.push(keys, deltas * (self.world.rank + 1))
        server.quiesce()
        factor = 100 * sum(range(1, self.world.size + 1))
        np.testing.assert_array_equal(pulled(server, keys), deltas * factor)

    def random_keys_add_up(self, server: ParameterServer) -> None:
        """Pushes of unsorted, repeated keys add up, in calls of many sizes from all ranks at once."""
        expected = np.zeros((5000, 3))
        for rank in range(self.world.size):
            for keys, deltas in _random_pushes(rank):
                np.add.at(expected, keys - LAYOUT["long"].first_key, deltas)
        self.world.barrier()
        for keys, deltas in _random_pushes(self.world.rank):
            server.push(keys, deltas)
        server.quiesce()
        np.testing.assert_array_equal(pulled(server, every_key("long")), expected)

    def pull_sees_own_pushes(self, server: ParameterServer) -> None:
        """A pull sees the worker's own pushes at once; other workers' pushes can only add to them."""
        own, hot = every_key("wide")[[10 + self.world.rank]], every_key("wide")[:1]
        last = 0.0
        for count in range(1, 41):
            server.push(np.concatenate([own, hot]), np.ones((2, WIDTH), np.float32))
            np.testing.assert_array_equal(pulled(server, own), np.full((1, WIDTH), count))
            seen = pulled(server, hot)[0, 0]
            assert max(last, count) <= seen <= 40 * self.world.size
            last = seen

    def no_torn_rows(self, server: ParameterServer) -> None:
        """A row whose entries always get equal deltas is never seen with unequal entries."""
        rng, keys = self._rng(), every_key("wide")[:HOT]
        self.world.barrier()
        for _ in range(50):
            some = rng.choice(keys, 4)
            server.push(some, np.repeat(rng.integers(-3, 4, (4, 1)).astype(np.float32), WIDTH, 1))
            rows = pulled(server, rng.permutation(keys))
            assert (rows == rows[:, :1]).all()

    def no_torn_sets(self, server: ParameterServer) -> None:
        rng, keys = self._rng(), every_key("wide")[:HOT]
        self.world.barrier()
        for _ in range(50):
            server.set(rng.permutation(keys)[:3], np.repeat(rng.integers(1, 99, (3, 1)).astype(np.float32), WIDTH, 1))
            rows = pulled(server, keys)
            assert (rows == rows[:, :1]).all()

    def keys_in_any_order(self, server: ParameterServer) -> None:
        """Sorted, descending, shuffled or repeated: rows come back in the order of the keys."""
        segment = LAYOUT["long"]
        if self.world.rank == 0:
            server.set(every_key("long"), np.arange(15000, dtype=np.float32).reshape(5000, 3))
        server.quiesce()
        rng = self._rng()
        for rows in (
            np.arange(2500), np.arange(4999, -1, -1), rng.permutation(5000), rng.integers(0, 5000, 7000),
            np.full(3000, 17), np.array([4999, 0]), np.repeat([5, 5, 3], 700),
        ):
            expected = rows[:, None] * 3 + np.arange(3)
            np.testing.assert_array_equal(pulled(server, segment.keys(rows)), expected)

    def repeated_keys_are_all_added(self, server: ParameterServer) -> None:
        key = every_key("long")[self.world.rank]
        server.push(np.full(3000, key), np.ones((3000, 3), np.float32))
        np.testing.assert_array_equal(pulled(server, np.array([key])), [[3000] * 3])

    def segments_are_apart(self, server: ParameterServer) -> None:
        """A push to the first or last row of a segment does not change the neighbouring segments."""
        if self.world.rank == self.world.size - 1:
            server.push(every_key("long")[[0, -1]], np.full((2, 3), 7, np.float32))
        server.quiesce()
        for name in ("single", "wide", "sampled"):
            assert not pulled(server, every_key(name)).any()
        assert pulled(server, every_key("long")).sum() == 42

    def numpy_and_torch_buffers(self, server: ParameterServer) -> None:
        keys = every_key("long")[[self.world.rank * 2 + 1, self.world.rank * 2]]
        values = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
        server.set(torch.from_numpy(keys), torch.from_numpy(values))
        server.push(keys, torch.from_numpy(values))
        server.push(torch.from_numpy(keys), values)
        out = torch.full((2, 3), -1.0)
        server.pull(torch.from_numpy(keys), out)
        np.testing.assert_array_equal(out, 3 * values)
        server.pull(keys, part := torch.zeros(4, 3)[1:3])
        np.testing.assert_array_equal(part, 3 * values)

    def buffers_belong_to_the_caller(self, server: ParameterServer) -> None:
        """The caller may overwrite buffers as soon as a call returns, and inputs may be read-only."""
        keys, deltas = every_key("wide")[[self.world.rank]].copy(), np.ones((1, WIDTH), np.float32)
        server.push(keys, deltas)
        deltas[:] = 99
        keys[:] = every_key("wide")[-1]
        frozen_keys, frozen = every_key("wide")[[self.world.rank]], np.ones((1, WIDTH), np.float32)
        frozen_keys.flags.writeable = frozen.flags.writeable = False
        server.push(frozen_keys, frozen)
        server.quiesce()
        np.testing.assert_array_equal(pulled(server, every_key("wide")[: self.world.size]), 2)
        assert not pulled(server, every_key("wide")[-1:]).any()

    def empty_calls_do_nothing(self, server: ParameterServer) -> None:
        none = np.empty(0, np.int64)
        server.pull(none, np.empty((0, 3), np.float32))
        server.push(none, np.empty((0, 3), np.float32))
        server.set(none, np.empty((0, 3), np.float32))
        server.localize(none)
        server.intent(none, 0, 1)
        assert not any(pulled(server, every_key(segment.name)).any() for segment in LAYOUT.segments)

    def relocation_does_not_change_rows(self, server: ParameterServer) -> None:
        """All ranks localize and announce rows while all push to them: no push is lost."""
        rng, keys = self._rng(), every_key("long")
        self.world.barrier()
        for clock in range(40):
            some = rng.choice(keys, 200)
            server.intent(some, clock, clock + 2)
            server.localize(some[:50])
            server.push(some, np.ones((200, 3), np.float32))
            assert server.advance_clock() == clock + 1
        server.quiesce()
        assert pulled(server, keys).sum() == 40 * 200 * 3 * self.world.size

    def statistics(self, server: ParameterServer) -> None:
        before = server.stats.segments["long"].pushed_rows
        server.push(every_key("long")[:7], np.ones((7, 3), np.float32))
        pulled(server, every_key("long")[:5])
        server.intent(every_key("long")[:9], 0, 1)
        server.localize(every_key("long")[:4])
        keys = np.empty(11, np.int64)
        server.pull_sample(server.prepare_sample(11, 0, 1), keys, None)
        stats, long = server.stats, server.stats.segments["long"]
        assert before == 0
        assert (long.pushed_rows, long.pushed_bytes) == (7, 7 * 12)
        assert (long.pulled_rows, long.pulled_bytes) == (5, 5 * 12)
        assert (stats.localized_rows, stats.sampled_rows) == (4, 11)
        assert stats.intended_rows == 9 + 11  # a sample that is drawn early announces itself
        assert long.pull_s > 0
        assert long.push_s > 0
        assert stats.segments["wide"].pulled_rows == 0

    def samples(self, server: ParameterServer) -> None:
        """Handles serve in any order, once each, and give keys of the segment with the right rows."""
        if self.world.rank == 0:
            server.set(every_key("sampled"), np.repeat(np.arange(NUM_SAMPLED, dtype=np.float32)[:, None], 4, 1))
        server.quiesce()
        handles = [server.prepare_sample(count, 0, 1) for count in (50, 1, NUM_SAMPLED)]
        for handle, count in reversed(list(zip(handles, (50, 1, NUM_SAMPLED), strict=True))):
            keys, rows = np.full(count, -1), np.empty((count, 4), np.float32)
            server.pull_sample(handle, keys, rows)
            places = keys - LAYOUT["sampled"].first_key
            assert np.unique(places).size == count
            assert places.min() >= 0
            assert places.max() < NUM_SAMPLED
            np.testing.assert_array_equal(rows, np.repeat(places[:, None], 4, 1))

    def samples_follow_their_numbers(self, server: ParameterServer) -> None:
        """A run resumed at sample k draws the samples that follow; every worker has its own."""
        first = _samples(server, 6)
        resumed = self._open(first_sample=2)
        assert first[2:] == _samples(resumed, 4)
        resumed.close()
        assert len(set(self.world.allgather(first[0]))) == self.world.size
        for scheme in ("naive", "pool", "local"):
            other = self._open(scheme=scheme)
            assert len(set(_samples(other, 6))) == 6
            other.close()

    def use_after_close(self, server: ParameterServer) -> None:
        server.close()
        server.close()
        keys, rows = every_key("long")[:1], np.ones((1, 3), np.float32)
        calls: list[Callable[[], object]] = [
            lambda: server.pull(keys, rows), lambda: server.push(keys, rows), lambda: server.set(keys, rows),
            lambda: server.localize(keys), lambda: server.intent(keys, 0, 1), server.advance_clock, server.quiesce,
            server.barrier, lambda: server.prepare_sample(1, 0, 1), lambda: server.pull_sample(0, keys, None),
        ]
        for call in calls:
            with pytest.raises(ServerError, match="the parameter server is closed"):
                call()

    @property
    def _replicates(self) -> bool:
        return self.name not in ONE_COPY

    @property
    def _steps_are_in_turn(self) -> bool:
        return self.name in ENGINES and (self.name in ONE_COPY or self.world.num_nodes == 1)


def names(engine: str, refusals: bool = True) -> list[str]:
    parts = (Contract, Moves, Tickets, Rules, Traces)
    own = [name for part in parts for name in vars(part) if not name.startswith("_")]
    own = [name for name in own if name not in ("checks", "close") and engine in ONLY.get(name, {engine})]
    own = [name for name in own if (engine, name) not in EXCEPTIONS]
    return [*own, *(f"refuses {name}" for name in REFUSALS), ROWS_AFTER_REFUSALS] if refusals else own


def _is_local(name: str) -> bool:
    return name.startswith("refuses ")


def _random_pushes(rank: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(100 + rank)
    sizes = (1, 2, 1023, 1024, 1025, 3000, 6000, 10)
    return [
        (rng.choice(every_key("long"), size), rng.integers(-5, 6, (size, 3)).astype(np.float32)) for size in sizes
    ]


def _samples(server: ParameterServer, number: int) -> list[bytes]:
    drawn = []
    for _ in range(number):
        keys = np.empty(20, np.int64)
        server.pull_sample(server.prepare_sample(20, 0, 1), keys, None)
        drawn.append(keys.tobytes())
    return drawn


def main(argv: list[str], join: Callable[[], World]) -> None:
    engine, nodes, *valid, folder = argv
    world = join()
    if int(nodes) > 1:
        world.split(int(nodes))
    contract = Contract(world, engine, refusals=valid != [VALID])
    collective.run(contract.checks(), world, Path(folder), _is_local)
    contract.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    launch(main, sys.argv[1:], prog="contract_program.py")
