"""What must hold whenever no manager and no push is in the middle of a step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lapse_elmo.ps import wire
from lapse_elmo.ps.directory import node_of
from lapse_elmo.ps.embedded import EmbeddedServer
from lapse_elmo.ps.layout import Segment
from lapse_elmo.ps.manager import Manager
from lapse_elmo.ps.messages import Deltas, HolderPush, Message, Push, Relocate
from lapse_elmo.ps.node_state import SegmentState
from lapse_elmo.ps.rows import COPY, DIRTY, MAIN
from tests.simulator.network import Simulation
from tests.simulator.workload import Ledger

_EVERY = 12  # deliveries between two full checks


class Invariants:
    """Checks over all nodes at once."""

    def __init__(self, simulation: Simulation, ledger: Ledger) -> None:
        self._simulation, self._ledger = simulation, ledger
        self._servers: list[EmbeddedServer] = []
        self._managers: list[Manager] = []
        self._stamps: list[list[np.ndarray]] = []
        self.number = 0
        self._deliveries = 0

    def opened(self, server: EmbeddedServer) -> None:
        """Register a rank's server, which is now open."""
        self._servers.append(server)
        if server._manager is not None:
            self._managers.append(server._manager)
            self._managers.sort(key=lambda manager: manager.node)
            self._stamps = [[state.stamps.copy() for state in manager.states] for manager in self._managers]

    def check(self) -> None:
        """Run all checks, on every ``_EVERY``-th call."""
        self._deliveries += 1
        world_size = self._ledger.begun.shape[0]
        if self._deliveries % _EVERY or len(self._servers) < world_size or any(s.closed for s in self._servers):
            return
        self.number += 1
        flying = list(self._flying())
        for number, segment in enumerate(self._ledger.layout.segments):
            states = [manager.states[number] for manager in self._managers]
            here = [message for message in flying if getattr(message, "segment", -1) == number]
            moving = [message for message in here if isinstance(message, Relocate)]
            self._one_main_copy(segment, states, moving)
            self._owners_know_replicas(states, moving)
            if segment.name == "counts" and not self._ledger.pushing:
                self._nothing_is_lost(states, here)
        for manager, before in zip(self._managers, self._stamps, strict=True):
            for state, stamps in zip(manager.states, before, strict=True):
                assert (state.stamps >= stamps).all(), "an owner stamp has fallen"
                stamps[:] = state.stamps

    def _flying(self) -> Iterator[Message]:
        """Yield all unhandled messages: held back, in transit, arrived or queued."""
        simulation = self._simulation
        for (_, to), blocks in simulation.channels.items():
            if to.tag != 3:
                for block in blocks:
                    yield from wire.read(block)
        for blocks in simulation.inboxes.values():
            for block in blocks:
                yield from wire.read(block)
        for manager in self._managers:
            yield from manager.mailbox._inbox
            for kept in manager.mailbox._outbox.values():
                for block in kept:
                    yield from wire.read(block)
            yield from manager._router._queued

    @staticmethod
    def _one_main_copy(segment: Segment, states: list[SegmentState], flying: list[Relocate]) -> None:
        copies = np.sum([state.rows.owned() for state in states], 0)
        for message in flying:
            copies[message.rows] += 1
        frequent = np.arange(segment.num_rows) < segment.frequent
        assert (copies == np.where(frequent, len(states), 1)).all(), f"main copies of the rows: {copies.tolist()}"

    @staticmethod
    def _owners_know_replicas(states: list[SegmentState], flying: list[Relocate]) -> None:
        """Owners of replicated rows have the main copy and have noted each holder, except during a promotion."""
        for node, state in enumerate(states):
            held = state.replica_rows
            for owner in np.unique(state.replica_owner[held]).tolist():
                rows = held[state.replica_owner[held] == owner]
                at_owner = states[owner]
                known = at_owner.holders.is_held_by(rows, node) & at_owner.rows.owned(rows)
                for row in rows[~known].tolist():
                    coming = [message for message in flying if row in message.rows]
                    assert coming and node_of(coming[0].stamps[:1]) == node, (
                        f"node {owner} does not know that node {node} holds row {row}"
                    )

    def _nothing_is_lost(self, states: list[SegmentState], flying: list[Message]) -> None:
        """Main copies, deltas of replicas and messages in transit sum to all pushes."""
        total = np.zeros(self._ledger.begun.T.shape)
        for state in states:
            rows = state.rows
            owned = np.flatnonzero(rows.owned())
            total[owned] += rows.main[rows.slots[owned]]
            changed = np.flatnonzero(rows.flags & (COPY | DIRTY) == COPY | DIRTY)
            total[changed] += rows.replica[rows.slots[changed], 1]
        for message in flying:
            if isinstance(message, (Relocate, Deltas, Push, HolderPush)):
                np.add.at(total, message.rows, message.values)
        assert (total == self._ledger.begun.T).all(), (
            f"pushes {self._ledger.begun.T.tolist()}, found {total.tolist()}"
        )

    def check_copies(self) -> None:
        """After a quiesce every replica equals its main copy to the bit."""
        for number, segment in enumerate(self._ledger.layout.segments):
            states = [manager.states[number] for manager in self._managers]
            for row in range(segment.num_rows):
                bits = set()
                for rows in (state.rows for state in states):
                    kind = rows.flags[row] & COPY
                    if kind:
                        source = rows.main if kind == MAIN else rows.replica[:, 0]
                        bits.add(source[rows.slots[row]].tobytes())
                assert len(bits) <= 1, f"copies of row {row} of {segment.name} differ after a quiesce"
                if segment.rule is not None and bits:
                    state = np.frombuffer(bits.pop(), np.float32)[segment.width :]
                    assert (state == self._ledger.squares[row]).all(), f"row {row}: accumulators are not all squares"

    def check_end(self) -> None:
        """All calls have been answered, and no message is in transit."""
        assert not any(self._simulation.channels.values()), "messages were on their way when the job ended"
        left = [m for blocks in self._simulation.inboxes.values() for block in blocks for m in wire.read(block)]
        assert not left, f"messages were not received when the job ended: {left}"
        for manager in self._managers:
            mailbox = manager.mailbox
            assert not (manager.pending or manager._router._queued or mailbox._outbox or mailbox._inbox)
        assert all(server.closed and not server._calls for server in self._servers)
