"""Synchronisation of replicas in rounds: deltas go to the owners, changed values come back.

In a round, a node sends each owner of its replicas the deltas of the replicas that changed, then a `Sync`. The owner
adds the deltas and answers with the current values of the replicated rows that have changed since it last sent them,
then `SyncDone`. When all owners have answered, the round ends; only then does the next one start.

Why replicas are exact: the owner reads the values for its answer after it has added all deltas sent before the `Sync`,
and the holder sends it no more deltas until the answer has arrived. So a replica is always the value last received plus
the deltas not sent since, and nothing is counted twice. At the end of a round a replica is dropped only if it has no
deltas, so an owner that receives a `Drop` has all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lapse_elmo.ps.directory import NO_NODE, group_by_node
from lapse_elmo.ps.messages import Deltas, Drop, Expiring, Message, Refresh, Sync
from lapse_elmo.ps.node_state import SegmentState
from lapse_elmo.ps.ordering import fence
from lapse_elmo.ps.transport import Transport
from lapse_elmo.ps.wire import chunks, new

# Seconds between the starts of two rounds: the minimum; while no clock advances, the first and the longest interval.
# The interval doubles from one to the other, so that an idle job sends almost nothing.
_SHORTEST_S, _LONG_S, _LONGEST_S = 0.002, 0.05, 1.6
# When some but not all workers of the node have advanced their clocks, a round waits for the others: for this share of
# the time per clock, within these bounds in seconds. So there is one round per step, not one per worker and step.
_STRAGGLER_SHARE, _STRAGGLERS_S = 1 / 16, (0.01, 0.2)

SendToNode = Callable[[int, Message], None]


class Rounds:
    """The rounds of one node, of which at most one is running.

    Args:
        states: The node's bookkeeping, by segment number.
        node: Number of this node.
        transport: Allocates messages and provides the clock.
        send: Sends a message to the manager of a node.
        start: Starts a job: advances the generator, which sends messages to the node, as far as the node has room.
        clocks: (workers,) int64, the clocks of the node's workers in shared memory; only read here.
        synced: (workers,) int64 in shared memory: the clocks at the start of the newest round that has ended. Workers
            read it to bound the staleness of replicas.
        lenders: The nodes that may send replicas; none for techniques without them.
    """

    def __init__(
        self, states: Sequence[SegmentState], node: int, transport: Transport, send: SendToNode,
        start: Callable[[int, Iterator[None]], None], clocks: np.ndarray, synced: np.ndarray, lenders: Sequence[int],
    ) -> None:
        self._states, self._node, self._transport, self._send, self._start = states, node, transport, send, start
        self._clocks, self._synced = clocks, synced
        self._lenders = [other for other in lenders if other != node]
        self._fence = fence()
        self._awaited: set[int] = set()
        self._running = False
        self._started_s = transport.now() - _LONGEST_S
        self._pause_s = _LONG_S
        self.clock_s = 0.0  # seconds that the slowest worker's last clock took
        self._advanced_s = transport.now()
        self._snapshot = clocks.copy()
        self._ended: list[list[np.ndarray]] = [[] for _ in states]
        self._expiring: list[list[np.ndarray]] = [[] for _ in states]  # rows sent as `Expiring` in this round
        self._drops: list[tuple[int, Drop]] = []
        self._next_actions: list[Callable[[], None]] = []
        self._actions: list[Callable[[], None]] = []

    def after_next_round(self, action: Callable[[], None]) -> None:
        """Call ``action`` at the end of the next round to start, which will be exact.

        The running round does not count: its deltas may have been collected before the caller's push.
        """
        self._next_actions.append(action)

    def schedule_release(self, segment: int, rows: np.ndarray) -> None:
        """Drop the replicas of ``rows`` at the end of a round, unless they have a new intent or deltas by then."""
        if rows.size:
            self._ended[segment].append(rows)

    def begin_if_due(self) -> bool:
        """Start a round if none is running and one is due; return whether one was started."""
        if self._running or not self._due():
            return False
        clocks = self._clocks.copy()
        self._fence()  # pushes of a clock that was read above are visible to the collection of deltas below
        moved, now = bool((clocks != self._snapshot).any()), self._transport.now()
        if clocks.min() > self._snapshot.min():
            self.clock_s, self._advanced_s = now - self._advanced_s, now
        self._running, self._started_s, self._snapshot = True, now, clocks
        self._actions, self._next_actions = self._next_actions, []
        self.send_drops()
        replicas = self._replicas_by_owner()
        if any(state.wanted.any() for state in self._states):
            # A `Replicate` may be on its way from any node, with values from before this round. Its sender's `SyncDone`
            # comes after it, and after a `Refresh` of these rows; without them the round could not count.
            replicas = {node: [] for node in self._lenders} | replicas
        self._awaited = set(replicas)
        for owner, rows in replicas.items():
            self._start(owner, self._messages(owner, rows, exact=bool(self._actions)))
        self._pause_s = max(_LONG_S, 2 * self.clock_s) if moved else min(2 * self._pause_s, _LONGEST_S)
        if not replicas:
            self._finish()
        return True

    def _due(self) -> bool:
        """Return whether a round is waited for, all clocks have advanced, or the interval has passed."""
        since = self._transport.now() - self._started_s
        if since < _SHORTEST_S:
            return False
        if self._next_actions or since >= self._pause_s:
            return True
        if self._clocks.tobytes() == self._snapshot.tobytes():  # at every poll: cheaper than what follows
            return False
        if self._clocks.min() > self._snapshot.min():
            return True
        shortest_s, longest_s = _STRAGGLERS_S
        return since >= min(max(_STRAGGLER_SHARE * self.clock_s, shortest_s), longest_s)

    def _replicas_by_owner(self) -> dict[int, list[tuple[SegmentState, np.ndarray]]]:
        """Return the replicas on this node: by owner, the segments and their rows."""
        result: dict[int, list[tuple[SegmentState, np.ndarray]]] = {}
        for state in self._states:
            for owner, chosen in group_by_node(state.replica_owner[state.replica_rows]):
                result.setdefault(owner, []).append((state, state.replica_rows[chosen]))
        return result

    def _messages(
        self, owner: int, replicas: list[tuple[SegmentState, np.ndarray]], exact: bool
    ) -> Iterator[None]:
        """Send ``owner`` the deltas of its ``replicas``, `Expiring` for those without intents, then `Sync`.

        A job, which yields after each large message. An exact round announces no `Expiring` rows: it must refresh all.
        """
        for state, rows in replicas:
            width = state.segment.row_width
            # The round after one that has kept `Expiring` rows is exact, and refreshes them.
            expiring = rows[:0] if exact else rows[state.intents[rows] == 0]
            for chunk in chunks(rows.size, width):
                which, deltas = state.rows.collect(rows[chunk])
                if which.size:
                    changed = rows[chunk][which]
                    self._send(owner, new(
                        Deltas, self._transport, segment=state.number, node=self._node, rows=changed, values=deltas
                    ))
                    state.stats.synchronised_rows += changed.size
                    yield
            if expiring.size:
                self._expiring[state.number].append(expiring)
                self._send(owner, new(Expiring, segment=state.number, node=self._node, rows=expiring))
        self._send(owner, new(Sync, node=self._node, exact=int(exact)))

    def on_refresh(self, message: Refresh) -> None:
        """Replace replicas by the owner's values plus the deltas not sent yet.

        Arrives between a `Sync` and its `SyncDone`. The replicas are here, since none is dropped during a round.
        """
        state = self._states[message.segment]
        assert (state.replica_owner[message.rows] == message.node).all(), "values came for rows that are not held"
        state.rows.refresh(message.rows, message.values)

    def on_sync_done(self, owner: int) -> None:
        """Finish the round if ``owner`` was the last to answer. All its `Refresh` messages have been handled before."""
        self._awaited.remove(owner)
        if not self._awaited:
            self._finish()

    def _finish(self) -> None:
        """End the round: drop replicas, publish its clocks to the workers, run the actions that waited for it."""
        kept = [self._release(state) for state in self._states]
        if any(kept):
            self._next_actions.append(lambda: None)  # not refreshed, so another round is due at once
        else:
            self._fence()  # a worker that reads the clocks reads the refreshed replicas, too
            self._synced[:] = self._snapshot
        self._running = False
        actions, self._actions = self._actions, []
        for action in actions:
            action()

    def _release(self, state: SegmentState) -> bool:
        """Drop the replicas without intents; those with new deltas stay for another round, which sends them.

        Returns:
            Whether rows stay that were `Expiring` in this round, and so were not refreshed.
        """
        ended = self._ended[state.number] + self._expiring[state.number]
        if not ended:
            return False
        rows = np.unique(np.concatenate(ended))
        rows = rows[(state.intents[rows] == 0) & (state.replica_owner[rows] != NO_NODE)]
        gone, owners = state.release(rows)
        for owner, chosen in group_by_node(owners):
            drop = new(Drop, segment=state.number, node=self._node, rows=gone[chosen])
            self._drops.append((owner, drop))
        left = rows[state.replica_owner[rows] != NO_NODE]
        self._ended[state.number] = [left] if left.size else []
        kept = any((state.replica_owner[rows] != NO_NODE).any() for rows in self._expiring[state.number])
        self._expiring[state.number].clear()
        return kept

    def send_drops(self) -> None:
        """Send the `Drop` messages of replicas dropped so far.

        Must be called before anything else about these rows is sent to their owners: a `Want` would be refused by an
        owner that still lists this node as a holder, a `Push` would be returned.
        """
        for owner, drop in self._drops:
            self._send(owner, drop)
        self._drops.clear()
