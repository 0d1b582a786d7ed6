"""Replicas are kept in rounds: deltas go to the owners, new values to the holders, many rows a message.

A round of a node takes the deltas of its replicas and sends each owner its share, and sends the holders of its main
copies the values that have changed. It ends when all of them have answered, and only then does the next begin. Only
rows that changed travel.

What makes replicas exact: messages between two managers keep their order, so a value that reaches a holder before the
answer to its deltas does not include them yet, and the holder adds them (they are kept in ``_in_flight`` until then).
A row that has replicas is not relocated, so an owner stays the owner while deltas are on their way to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from lapse_elmo.ps.messages import Kind, Message
from lapse_elmo.ps.node_state import SegmentState
from lapse_elmo.ps.whereabouts import groups

# Seconds between the starts of two rounds: with clocks that advance; without; and where rounds find nothing to do.
_SHORTEST_S, _LONG_S, _LONGEST_S = 0.002, 0.05, 0.4

Send = Callable[[int, Message], None]  # to a node's manager


class Replication:
    """The rounds of one node.

    :param send: sends a message to a node's manager.
    :param clocks: (workers,) of the node; ``synced`` (workers,): the clocks at the start of the newest round that has
        ended, which the workers read.
    :param on_flushed: called with the requests that waited for a whole round, see :meth:`flush`.
    """

    def __init__(
        self, states: Sequence[SegmentState], node: int, rank: int, send: Send, clocks: np.ndarray, synced: np.ndarray,
        on_flushed: Callable[[Message], None],
    ) -> None:
        self._states, self._node, self._rank, self._send = states, node, rank, send
        self._clocks, self._synced, self._on_flushed = clocks, synced, on_flushed
        self._in_flight: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self._awaited = 0
        self._running = False
        self._started_s = 0.0
        self._pause_s = _LONG_S
        self._snapshot = clocks.copy()
        self._seen = clocks.tobytes()
        self._ended: list[list[np.ndarray]] = [[] for _ in states]
        self._waiting: list[Message] = []
        self._flushing: list[Message] = []
        self.num_rounds = 0

    def flush(self, request: Message) -> None:
        """Answer ``request`` when a whole round that has not begun yet has ended."""
        self._waiting.append(request)

    def intents_ended(self, segment: int, rows: np.ndarray) -> None:
        """Replicas of ``rows`` are not needed any more, unless an intent comes."""
        if rows.size:
            self._ended[segment].append(rows)

    def tick(self) -> bool:
        """Begin a round if it is time; whether one was begun."""
        if self._running:
            return False
        since = time.perf_counter() - self._started_s
        moved = self._clocks.tobytes() != self._seen
        if not (self._waiting or since >= self._pause_s or (moved and since >= _SHORTEST_S)):
            return False
        self._running, self._started_s = True, time.perf_counter()
        self._snapshot = self._clocks.copy()
        self._seen = self._snapshot.tobytes()
        self._flushing, self._waiting = self._waiting, []
        for state in self._states:
            self._send_deltas(state)
            self._send_values(state)
        self._pause_s = _LONG_S if moved or self._awaited else min(2 * self._pause_s, _LONGEST_S)
        self._finish_if_answered()
        return True

    def on_deltas(self, message: Message, holder: int) -> None:
        """A holder's deltas."""
        state = self._states[message.segment]
        assert message.values is not None
        missing = state.rows.add(message.rows, message.values, mark=False)
        assert not missing.size, "deltas came for rows that are not here"
        state.mark_stale(message.rows, but=holder)
        self._send(holder, Message.of(Kind.APPLIED, message.segment, self._rank))

    def on_applied(self, message: Message, owner: int) -> None:
        """An owner has added this node's deltas."""
        del self._in_flight[message.segment, owner]
        self._answered()

    def on_refresh(self, message: Message, owner: int) -> None:
        """An owner's new values."""
        state = self._states[message.segment]
        assert message.values is not None
        rows, values, held = message.rows, message.values, state.lender[message.rows] == owner
        if not held.all():
            rows, values = rows[held], values[held]
        flying = self._in_flight.get((message.segment, owner))
        if flying is not None and rows.size:
            places = np.minimum(np.searchsorted(flying[0], rows), flying[0].size - 1)
            same = flying[0][places] == rows
            values[same] += flying[1][places[same]]
        state.rows.refresh(rows, values)
        if message.extra:
            self._send(owner, Message.of(Kind.REFRESHED, message.segment, self._rank))

    def on_refreshed(self) -> None:
        """A holder has taken this node's values."""
        self._answered()

    def refresh_now(self, state: SegmentState, rows: np.ndarray) -> None:
        """Send the values of ``rows`` to their holders outside of a round, before anything else goes to them."""
        state.mark_stale(rows)
        self._send_stale(state, rows, answer=False)

    def _send_deltas(self, state: SegmentState) -> None:
        if not state.borrowed.size:
            return
        which, deltas = state.rows.collect(state.borrowed)
        rows = state.borrowed[which]
        for owner, chosen in groups(state.lender[rows]):
            some = self._in_flight[state.number, owner] = rows[chosen], deltas[chosen]
            self._send(owner, Message.of(Kind.DELTAS, state.number, self._rank, rows=some[0], values=some[1]))
            self._awaited += 1

    def _send_values(self, state: SegmentState) -> None:
        if state.lent.size:
            state.mark_stale(state.lent[state.rows.clean(state.lent)])
            self._awaited += self._send_stale(state, state.lent, answer=True)

    def _send_stale(self, state: SegmentState, rows: np.ndarray, answer: bool) -> int:
        """Send what is stale of ``rows``; the number of messages."""
        number = 0
        for holder in range(len(state.holders)):
            needed = state.take_stale(holder, rows)
            if needed.size:
                message = Message.of(
                    Kind.REFRESH, state.number, self._rank, rows=needed, width=state.segment.row_width,
                    extra=int(answer),
                )
                assert message.values is not None
                state.rows.pull(needed, message.values)
                self._send(holder, message)
                number += 1
        return number

    def _answered(self) -> None:
        self._awaited -= 1
        assert self._awaited >= 0, "an answer that nobody waits for"
        self._finish_if_answered()

    def _finish_if_answered(self) -> None:
        if self._awaited:
            return
        for state in self._states:
            self._release(state)
        self._synced[:] = self._snapshot
        for request in self._flushing:
            self._on_flushed(request)
        self._flushing = []
        self._running = False
        self.num_rounds += 1

    def _release(self, state: SegmentState) -> None:
        """Drop the replicas whose intents have ended; one with new deltas stays for another round."""
        if not self._ended[state.number]:
            return
        rows = np.unique(np.concatenate(self._ended[state.number]))
        rows = rows[(state.intents[rows] == 0) & (state.lender[rows] >= 0)]
        gone, lenders = state.release(rows)
        for owner, chosen in groups(lenders):
            self._send(owner, Message.of(Kind.DROP, state.number, self._rank, rows=gone[chosen]))
        left = rows[state.lender[rows] >= 0]
        self._ended[state.number] = [left] if left.size else []
