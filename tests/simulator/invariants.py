"""What must hold whenever no manager and no push is in the middle of a step."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from lapse_elmo.mpi.world import World
from lapse_elmo.ps import embedded, wire
from lapse_elmo.ps.directory import node_of
from lapse_elmo.ps.embedded import EmbeddedServer
from lapse_elmo.ps.layout import Segment
from lapse_elmo.ps.manager import Manager
from lapse_elmo.ps.messages import Deltas, HolderPush, Message, Push, Relocate
from lapse_elmo.ps.node_state import SegmentState
from lapse_elmo.ps.requests import Requests
from lapse_elmo.ps.rows import COPY, DIRTY, MAIN, MAIN_ROWS, REPLICA, REPLICA_ROWS
from lapse_elmo.ps.transport import VALUES
from tests.simulator.memory import JobMemory
from tests.simulator.platform import Job
from tests.simulator.workload import Ledger

_EVERY = 12  # deliveries between two full checks
_CARRIERS = (Relocate, Deltas, Push, HolderPush)  # messages with main copies or pushes
_CARRIER_NUMBERS = frozenset(kind.KIND for kind in _CARRIERS)
_HEADER = struct.Struct("=qq")  # each message begins with its kind and its size


class Invariants:
    """Checks over all nodes at once."""

    def __init__(self, job: Job, ledger: Ledger) -> None:
        self._job, self._simulation, self._ledger = job, job.simulation, ledger
        self._expected = np.ones(ledger.layout.num_keys, np.int64)  # main copies of each row
        for segment in ledger.layout.segments:
            self._expected[segment.first_key : segment.first_key + segment.frequent] = job.num_nodes
        self._servers: list[EmbeddedServer] = []
        self._managers: list[Manager] = []
        self._stamps = np.empty(0, np.int64)
        self.number = 0
        self._deliveries = 0

    @property
    def _memory(self) -> JobMemory:
        assert self._job.memory is not None
        return self._job.memory

    def opened(self, server: EmbeddedServer) -> None:
        """Register a rank's server, which is now open."""
        self._servers.append(server)
        if server._manager is not None:
            self._managers.append(server._manager)
            self._managers.sort(key=lambda manager: manager.node)
            self._stamps = self._memory.stamps.copy()

    def check(self) -> None:
        """Run all checks, on every ``_EVERY``-th call."""
        self._deliveries += 1
        if self._deliveries % _EVERY or len(self._servers) < self._job.size or any(s.closed for s in self._servers):
            return
        self.number += 1
        flying = list(self._flying())
        flags = self._memory.entries[:, :, 0]
        moving = [message for message in flying if isinstance(message, Relocate)]
        self._one_main_copy(flags, moving)
        self._owners_know_replicas(moving)
        if not self._ledger.pushing:
            self._nothing_is_lost(flags, flying)
        stamps = self._memory.stamps
        assert not np.count_nonzero(stamps < self._stamps), "an owner stamp has fallen"
        self._stamps[:] = stamps

    def _flying(self) -> Iterator[Message]:
        """Yield the unhandled messages with main copies or pushes: held back, in transit, arrived or queued."""
        simulation = self._simulation
        for (_, to), channel in simulation.channels.items():
            if channel.blocks and to.tag != VALUES:
                for block in channel.blocks:
                    yield from _carriers(block)
        for blocks in simulation.inboxes.values():
            for block in blocks:
                yield from _carriers(block)
        for manager in self._managers:
            for kept in manager.mailbox._outbox.values():
                for block in kept:
                    yield from _carriers(block)
            for message in (*manager.mailbox._inbox, *manager._router._queued):
                if isinstance(message, _CARRIERS):
                    yield message

    def _one_main_copy(self, flags: np.ndarray, moving: list[Relocate]) -> None:
        copies = np.add.reduce(flags & COPY == MAIN, 0, np.int64)
        for message in moving:
            copies[message.rows + self._segment(message).first_key] += 1
        if copies.tobytes() != self._expected.tobytes():
            wrong = np.flatnonzero(copies != self._expected)
            raise AssertionError(f"main copies of the keys {wrong.tolist()}: {copies[wrong].tolist()}")

    def _owners_know_replicas(self, moving: list[Relocate]) -> None:
        """Owners of replicated rows have the main copy and have noted each holder, except during a promotion."""
        for manager in self._managers:
            for state in manager.states:
                if state.replica_rows.size:
                    self._owners_know(state, manager.node, moving)

    def _owners_know(self, state: SegmentState, node: int, moving: list[Relocate]) -> None:
        held = state.replica_rows
        owners = state.replica_owner[held]
        for owner in set(owners.tolist()):
            rows = held[owners == owner]
            at_owner = self._managers[owner].states[state.number]
            known = at_owner.holders.is_held_by(rows, node) & at_owner.rows.owned(rows)
            if np.count_nonzero(known) == rows.size:
                continue
            for row in rows[~known].tolist():
                coming = [message for message in moving if message.segment == state.number and row in message.rows]
                assert coming and node_of(coming[0].stamps[:1]) == node, (
                    f"node {owner} does not know that node {node} holds row {row}"
                )

    def _nothing_is_lost(self, flags: np.ndarray, flying: list[Message]) -> None:
        """Main copies, deltas of replicas and messages in transit sum to all pushes."""
        segment = self._ledger.layout["counts"]
        number, end = self._ledger.layout.segments.index(segment), segment.first_key + segment.num_rows
        flags, slots = flags[:, segment.first_key : end], self._memory.entries[:, segment.first_key : end, 1]
        total = np.zeros(self._ledger.begun.T.shape)
        nodes, rows = (flags & COPY == MAIN).nonzero()  # one node per row
        total[rows] = self._memory.of_all(segment.name + MAIN_ROWS)[nodes, slots[nodes, rows]]
        nodes, rows = (flags & (COPY | DIRTY) == COPY | DIRTY).nonzero()
        if rows.size:
            np.add.at(total, rows, self._memory.of_all(segment.name + REPLICA_ROWS)[nodes, slots[nodes, rows], 1])
        for message in flying:
            if message.segment == number:  # type: ignore[attr-defined]
                np.add.at(total, message.rows, message.values)  # type: ignore[attr-defined]
        if np.count_nonzero(total != self._ledger.begun.T):
            raise AssertionError(f"pushes {self._ledger.begun.T.tolist()}, found {total.tolist()}")

    def _segment(self, message: Relocate) -> Segment:
        return self._ledger.layout.segments[message.segment]

    def check_copies(self) -> None:
        """After a quiesce every replica equals its main copy to the bit."""
        for segment in self._ledger.layout.segments:
            entries = self._memory.entries[:, segment.first_key : segment.first_key + segment.num_rows]
            main, replica = (self._memory.of_all(segment.name + kind) for kind in (MAIN_ROWS, REPLICA_ROWS))
            kinds, slots = entries[:, :, 0] & COPY, entries[:, :, 1]
            nodes, rows = (kinds == MAIN).nonzero()
            values = main[nodes, slots[nodes, rows]]
            nodes, replicated = (kinds & REPLICA).nonzero()
            if replicated.size:
                rows = np.concatenate([rows, replicated])
                values = np.concatenate([values, replica[nodes, slots[nodes, replicated], 0]])
            first = np.empty((segment.num_rows, segment.row_width), np.float32)  # one copy of each row
            first[rows] = values
            differ = rows[(first[rows].view(np.int32) != values.view(np.int32)).nonzero()[0]]
            assert not differ.size, f"copies of row {differ[0]} of {segment.name} differ after a quiesce"
            if segment.rule is not None:
                wrong = rows[(values[:, segment.width :] != self._ledger.squares[rows]).nonzero()[0]]
                assert not wrong.size, f"row {wrong[0]}: accumulators are not all squares"

    @contextmanager
    def of_drains(self) -> Iterator[None]:
        """Check what a drain promises whenever one has ended on a rank."""
        before = embedded.drain

        def drain(world: World, requests: Requests, manager: Manager | None) -> None:
            before(world, requests, manager)
            self._nothing_in_transit("after a drain")

        embedded.drain = drain
        try:
            yield
        finally:
            embedded.drain = before

    def _nothing_in_transit(self, when: str) -> None:
        """No message is on its way, waits to be sent or handled, or is owed."""
        for (_, to), channel in self._simulation.channels.items():
            assert to.tag == VALUES or not channel.blocks, f"messages were on their way to {to} {when}"
        left = [m for blocks in self._simulation.inboxes.values() for block in blocks for m in wire.read(block)]
        assert not left, f"messages were not received {when}: {left}"
        for manager in self._managers:
            mailbox = manager.mailbox
            assert not (mailbox._outbox or mailbox._inbox), f"the mailbox of node {manager.node} was not empty {when}"
            assert not manager._router._queued, f"node {manager.node} had requests queued {when}"
            assert not (manager._jobs or manager.pending), f"node {manager.node} owed answers {when}"

    def check_end(self) -> None:
        """All calls have been answered, and no message is in transit."""
        assert not any(channel.blocks for channel in self._simulation.channels.values()), "values were on their way"
        assert not any(self._simulation.values.values()), "values were not received when the job ended"
        self._nothing_in_transit("when the job ended")
        assert all(server.closed and not server._calls for server in self._servers)


def _carriers(block: np.ndarray) -> Iterator[Message]:
    """Yield the messages in ``block`` that carry main copies or pushes; only these are decoded."""
    start = 0
    while start < block.size:
        kind, size = _HEADER.unpack_from(block.data, start)
        if kind in _CARRIER_NUMBERS:
            yield from wire.read(block[start : start + size])
        start += size
