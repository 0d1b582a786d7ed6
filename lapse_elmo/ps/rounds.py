"""Rounds keep replicas up to date: deltas go to the owners, and what has changed there comes back.

A round of a node sends each owner of its replicas the deltas of those that changed, then a `Sync`. The owner adds the
deltas and answers with the current values of the lent rows that have changed since it last sent them, and `SyncDone`.
When all owners have answered, the round ends, and only then does the next one begin.

Why replicas are exact: an owner reads the values of its answer after it has added all deltas that were sent before the
`Sync`, and a node sends no more deltas to it until the answer has come. So a replica is always the value that was last
received plus the deltas that have not been sent since, and nothing is counted twice. A replica is dropped at the end of
a round only if it has no deltas then, so an owner that is told so has all of them.
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

# Seconds between the starts of two rounds: at least; while no clock advances, at first and at most.
_SHORTEST_S, _LONG_S, _LONGEST_S = 0.002, 0.05, 1.6
# Where some but not all workers have advanced their clocks, the others are waited for: for this share of the time that
# a clock takes, within these bounds in seconds. So the workers of a node lead to one round per step, not one each.
_STRAGGLER_SHARE, _STRAGGLERS_S = 1 / 16, (0.01, 0.2)

SendToNode = Callable[[int, Message], None]


class Rounds:
    """The rounds of one node.

    :param send: sends a message to a node's manager.
    :param start: given a node and an iterator over its messages' sending, sends them as far as there is room.
    :param clocks: (workers,) int64 of the node.
    :param synced: (workers,) int64: the clocks at the start of the newest round that has ended, which the workers read.
    """

    def __init__(
        self, states: Sequence[SegmentState], node: int, transport: Transport, send: SendToNode,
        start: Callable[[int, Iterator[None]], None], clocks: np.ndarray, synced: np.ndarray,
    ) -> None:
        self._states, self._node, self._transport, self._send, self._start = states, node, transport, send, start
        self._clocks, self._synced = clocks, synced
        self._fence = fence()
        self._awaited: set[int] = set()
        self._running = False
        self._started_s = transport.now() - _LONGEST_S
        self._pause_s = _LONG_S
        self.clock_s = 0.0  # how long the last clock of the slowest worker took
        self._advanced_s = transport.now()
        self._snapshot = clocks.copy()
        self._ended: list[list[np.ndarray]] = [[] for _ in states]
        self._expiring: list[list[np.ndarray]] = [[] for _ in states]  # rows of which no values were asked for
        self._kept: list[np.ndarray] = [np.empty(0, np.int64) for _ in states]  # of these, what was not released
        self._drops: list[tuple[int, Drop]] = []
        self._next_actions: list[Callable[[], None]] = []
        self._actions: list[Callable[[], None]] = []

    def after_next_round(self, action: Callable[[], None]) -> None:
        """Call ``action`` when a whole round that has not begun yet has ended; it leaves replicas equal to the bit."""
        self._next_actions.append(action)

    def schedule_release(self, segment: int, rows: np.ndarray) -> None:
        """Replicas of ``rows`` are not needed any more, unless an intent comes before the next round has ended."""
        if rows.size:
            self._ended[segment].append(rows)

    def begin_if_due(self) -> bool:
        """Begin a round if it is time; return whether one was begun."""
        if self._running or not self._due():
            return False
        clocks = self._clocks.copy()
        self._fence()  # pushes of a clock that is seen here are seen below
        moved, now = bool((clocks != self._snapshot).any()), self._transport.now()
        if clocks.min() > self._snapshot.min():
            self.clock_s, self._advanced_s = now - self._advanced_s, now
        self._running, self._started_s, self._snapshot = True, now, clocks
        self._actions, self._next_actions = self._next_actions, []
        self.send_drops()
        replicas = self._replicas_by_owner()
        self._awaited = set(replicas)
        for owner, rows in replicas.items():
            self._start(owner, self._messages(owner, rows, exact=bool(self._actions)))
        self._pause_s = max(_LONG_S, 2 * self.clock_s) if moved else min(2 * self._pause_s, _LONGEST_S)
        if not replicas:
            self._finish()
        return True

    def _due(self) -> bool:
        since = self._transport.now() - self._started_s
        if since < _SHORTEST_S:
            return False
        if self._next_actions or since >= self._pause_s or self._clocks.min() > self._snapshot.min():
            return True
        shortest_s, longest_s = _STRAGGLERS_S
        wait_s = min(max(_STRAGGLER_SHARE * self.clock_s, shortest_s), longest_s)
        return since >= wait_s and bool((self._clocks != self._snapshot).any())

    def _replicas_by_owner(self) -> dict[int, list[tuple[SegmentState, np.ndarray]]]:
        result: dict[int, list[tuple[SegmentState, np.ndarray]]] = {}
        for state in self._states:
            for owner, chosen in group_by_node(state.replica_owner[state.replica_rows]):
                result.setdefault(owner, []).append((state, state.replica_rows[chosen]))
        return result

    def _messages(
        self, owner: int, replicas: list[tuple[SegmentState, np.ndarray]], exact: bool
    ) -> Iterator[None]:
        """Send ``owner`` the deltas of ``replicas`` rows, one message per step, and a `Sync`."""
        for state, rows in replicas:
            width = state.segment.row_width
            expiring = rows[:0]
            if not exact:
                expiring = np.setdiff1d(rows[state.intents[rows] == 0], self._kept[state.number], True)
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
        """Take an owner's values for replicas, none of which is dropped while a round is under way."""
        state = self._states[message.segment]
        assert (state.replica_owner[message.rows] == message.node).all(), "values came for rows that are not held"
        state.rows.refresh(message.rows, message.values)

    def on_sync_done(self, owner: int) -> None:
        """An owner has answered."""
        self._awaited.remove(owner)
        if not self._awaited:
            self._finish()

    def _finish(self) -> None:
        for state in self._states:
            self._release(state)
        if any(kept.size for kept in self._kept):
            self._next_actions.append(lambda: None)  # they have not been refreshed: the next round, due now, does it
        else:
            self._fence()
            self._synced[:] = self._snapshot
        self._running = False
        actions, self._actions = self._actions, []
        for action in actions:
            action()

    def _release(self, state: SegmentState) -> None:
        """Drop the replicas whose intents have ended; one with new deltas stays for another round."""
        ended = self._ended[state.number] + self._expiring[state.number]
        if not ended:
            self._kept[state.number] = self._kept[state.number][:0]
            return
        rows = np.unique(np.concatenate(ended))
        rows = rows[(state.intents[rows] == 0) & (state.replica_owner[rows] != NO_NODE)]
        gone, owners = state.release(rows)
        for owner, chosen in group_by_node(owners):
            drop = new(Drop, segment=state.number, node=self._node, rows=gone[chosen])
            self._drops.append((owner, drop))
        left = rows[state.replica_owner[rows] != NO_NODE]
        self._ended[state.number] = [left] if left.size else []
        expiring = [rows[state.replica_owner[rows] != NO_NODE] for rows in self._expiring[state.number]]
        self._kept[state.number] = np.concatenate([left[:0], *expiring])
        self._expiring[state.number].clear()

    def send_drops(self) -> None:
        """Tell owners which replicas are gone: before anything else about these rows is sent to them."""
        for owner, drop in self._drops:
            self._send(owner, drop)
        self._drops.clear()
