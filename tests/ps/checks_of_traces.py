"""Contract checks of the trace of some rows (lapse_elmo/ps/trace.py)."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np

from lapse_elmo.mpi.world import World
from lapse_elmo.ps.api import ParameterServer
from lapse_elmo.ps.trace import Event, TracedServer, read_trace
from tests.ps.layout import LAYOUT, every_key, ones, pulled

ROWS = [3, 4]  # those of "long" that are traced, with homes on two nodes
STEPS = 10


class Traces:
    world: World
    name: str

    def a_trace_has_calls_and_moves(self, _: ParameterServer) -> None:
        """The traced rows' calls are written, no others, and main copies and replicas come and go in turn."""
        folder = Path(self.world.bcast(tempfile.mkdtemp(prefix="trace-")))
        traced = LAYOUT["long"].keys(np.array(ROWS))
        server = TracedServer(self.world, LAYOUT, technique=self.name, traced=traced)
        server.push(traced, ones(traced))  # before the trace begins
        server.barrier()
        server.start_trace(folder)
        server.barrier()
        keys = every_key("long")[:8]
        for clock in range(STEPS):
            server.intent(keys, clock, clock + 1)
            pulled(server, keys)
            server.push(np.repeat(keys, 2), ones(np.repeat(keys, 2)))
            server.advance_clock()
        server.localize(traced[:1])
        server.quiesce()
        server.close()
        self.world.barrier()
        events = read_trace(folder)
        self._expect_calls([event for event in events if event.rank == self.world.rank])
        self._expect_moves([event for event in events if event.rank is None])
        assert {(event.segment, event.row) for event in events} == {("long", row) for row in ROWS}

    def _expect_calls(self, calls: list[Event]) -> None:
        for row in ROWS:
            mine = [event for event in calls if event.row == row]
            assert {event.node for event in mine} == {self.world.node}
            intents = [(event.start, event.end) for event in mine if event.event == "intent"]
            assert intents == [(clock, clock + 1) for clock in range(STEPS)]
            assert [event.clock for event in mine if event.event == "pull"] == list(range(STEPS))
            assert [event.event for event in mine].count("push") == 2 * STEPS
            assert [event.event for event in mine].count("localize") == (row == ROWS[0])
            local = {event.local for event in mine}
            assert local <= {True, False} and (self.world.num_nodes > 1 or local == {True})

    def _expect_moves(self, moves: list[Event]) -> None:
        nodes, names = self.world.num_nodes, {event.event for event in moves}
        for row in ROWS:
            first, *later = [event for event in moves if event.row == row and event.event in ("alloc", "dealloc")]
            assert (first.event, first.node) == ("alloc", row % nodes)
            assert len(later) % 2 == 0 and (nodes > 1 or not later)
            for node in range(nodes):
                here = [event.event for event in moves if event.row == row and event.node == node]
                mains = [name for name in here if name in ("alloc", "dealloc")]
                copies = [name for name in here if name.startswith("replica")]
                assert all(one != other for one, other in pairwise(mains)) and mains[:1] != ["dealloc"]
                assert all(one != other for one, other in pairwise(copies)) and copies[:1] != ["replica_drop"]
        moved = {"dealloc"} if nodes > 1 and self.name in ("adaptive", "relocation") else set()
        copied = {"replica_setup", "replica_drop"} if nodes > 1 and self.name in ("adaptive", "replication") else set()
        assert names <= {"alloc"} | moved | copied
        assert names & (moved | copied) or not moved | copied  # by localize, if not by the intents
