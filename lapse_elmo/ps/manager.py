"""The manager of a node: a thread of its first rank that moves rows, keeps replicas and serves other nodes.

It alone changes which rows are on the node. Workers read and change rows that are here by themselves; what is not here
they ask for at the manager of the node where their node's stamps say it is (:mod:`lapse_elmo.ps.whereabouts`). A
manager serves what it has, forwards the rest by its own, newer stamp, and parks what it is about to get. Requests that
arrive while a row moves are thus served by the new owner, in their order, and none is lost.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lapse_elmo.ps.intents import Intents
from lapse_elmo.ps.messages import (
    FORWARDED,
    TO_MANAGER,
    TO_WORKER,
    Kind,
    Mailbox,
    Message,
    Patience,
    growing_pieces,
    pieces,
)
from lapse_elmo.ps.node_state import SegmentState
from lapse_elmo.ps.replication import Replication
from lapse_elmo.ps.rules import rate_of
from lapse_elmo.ps.whereabouts import epoch_of, groups, home_of, learn, node_of

TECHNIQUES = ("adaptive", "relocation", "replication", "static")
_PR_SET_TIMERSLACK = 29


@dataclass
class _Localize:
    """A localize under way: the rows that are still to come."""

    request: Message
    number: int
    rows: np.ndarray


class Manager(threading.Thread):
    """Serves until it is told to stop.

    :param leaders: rank of each node's manager.
    :param clocks: (workers,) of the node. ``synced``: see :class:`Replication`.
    """

    def __init__(
        self, mailbox: Mailbox, patience: Patience, states: Sequence[SegmentState], technique: str, node: int,
        leaders: Sequence[int], clocks: np.ndarray, synced: np.ndarray,
    ) -> None:
        super().__init__(name=f"manager of node {node}", daemon=True)
        self.mailbox = mailbox
        self.states = states
        self.handled = 0
        self._patience = patience
        self._technique = technique
        self._node, self._leaders = node, list(leaders)
        self._node_of_leader = {rank: number for number, rank in enumerate(leaders)}
        self._rank = self._leaders[node]
        self._clocks = clocks
        self._intents = Intents(states, clocks)
        self._replication = Replication(states, node, self._rank, self._send, clocks, synced, self._reply_done)
        self._parked: list[Message] = []
        self._localizing: list[_Localize] = []
        self._frozen: list[Message] | None = None
        self._stopping = False
        self._handlers: dict[Kind, Callable[[Message], None]] = {
            Kind.PULL: self._on_pull, Kind.PUSH: self._on_push, Kind.SET: self._on_set, Kind.RELAY: self._reply,
            Kind.LOCALIZE: self._on_localize, Kind.INTENT: self._on_intent, Kind.FLUSH: self._replication.flush,
            Kind.FREEZE: self._on_freeze, Kind.STOP: self._on_stop, Kind.WANT: self._on_want, Kind.OWN: self._on_own,
            Kind.REPLICA: self._on_replica, Kind.OWNER: self._on_owner, Kind.DROP: self._on_drop,
            Kind.DELTAS: lambda m: self._replication.on_deltas(m, self._sender(m)),
            Kind.APPLIED: lambda m: self._replication.on_applied(m, self._sender(m)),
            Kind.REFRESH: lambda m: self._replication.on_refresh(m, self._sender(m)),
            Kind.REFRESHED: lambda _: self._replication.on_refreshed(),
        }

    def run(self) -> None:
        """Serve. An exception here is the rank's: ``threading.excepthook`` ends the job."""
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0)  # short sleeps last as long as they should
        prepared = False
        while not self._stopping:
            busy = False
            while not self._stopping and (message := self.mailbox.receive()) is not None:
                self._handlers[message.kind](message)
                self.handled += 1
                busy = True
            if self._frozen is None:  # else nothing new begins
                if self._intents.moved():
                    self._look_at_clocks()
                busy |= self._replication.tick()
            if busy:
                self._patience.reset()
                prepared = False
            elif not prepared:
                prepared = not any(state.prepare() for state in self.states)
            else:
                self._patience.wait()
        self.mailbox.finish()

    # What workers ask for

    def _on_pull(self, message: Message) -> None:
        state = self.states[message.segment]
        message = self._what_is_owned(message)
        rows = message.rows
        if not rows.size:
            return
        reply = Message.of(
            Kind.ROWS, message.segment, self._rank, message.ticket, rows, positions=message.positions,
            stamps=state.where[rows] if message.extra == FORWARDED else None,
        )
        self.mailbox.send(message.origin, TO_WORKER, reply)
        width = message.start  # of the rows as the worker wants them, weights alone or whole
        for piece in pieces(rows.size, width):
            values = self.mailbox.blocks.rows(piece.stop - piece.start, width)
            state.rows.pull(rows[piece], values)
            self.mailbox.send_values(message.origin, values)
        state.stats.served_rows += rows.size
        state.stats.sent_bytes += reply.block.size + 4 * rows.size * width

    def _on_push(self, message: Message) -> None:
        state = self.states[message.segment]
        message = self._what_is_owned(message)
        if not message.rows.size:
            return
        assert message.values is not None
        state.rows.push(message.rows, message.values, rate_of(message.start))
        state.stats.served_rows += message.rows.size
        # A node that is about to get replicas, or has them by now, must not show its worker values without this push.
        held = message.rows[state.holders[message.worker, message.rows]]
        if held.size:
            self._replication.refresh_now(state, held)
            self._done_by_way_of(message, message.rows.size)
        else:
            self._done(message, message.rows.size)

    def _what_is_owned(self, message: Message) -> Message:
        """The part of a worker's call whose main copies are here; the rest goes on.

        Another node's worker is not served by a replica: its push would not be where its next pull looks for it.
        """
        rows = self.states[message.segment].rows
        if rows.all_owned(message.rows):
            return message
        owned = rows.owned(message.rows)
        self._route(message, np.flatnonzero(~owned))
        return message.part(np.flatnonzero(owned))

    def _on_set(self, message: Message) -> None:
        """The worker's manager gets it first, so that it comes after the deltas that are on their way to the owner."""
        assert message.values is not None
        state = self.states[message.segment]
        missing = state.rows.set(message.rows, message.values)
        held = missing[state.lender[message.rows[missing]] >= 0]
        if held.size:
            state.rows.overwrite(message.rows[held], message.values[held])
        here = others(missing, message.rows.size)
        if here.size:
            self._replication.refresh_now(state, message.rows[here])
            self._done_by_way_of(message, here.size)
        self._route(message, missing)

    def _on_localize(self, message: Message) -> None:
        state = self.states[message.segment]
        rows = message.rows[~state.rows.present(message.rows)]
        self._localizing.append(_Localize(message, message.rows.size, rows))
        self._want(state, rows)
        self._arrived(state)

    def _on_intent(self, message: Message) -> None:
        if self._technique == "relocation":
            rows = message.rows
        else:
            rows = self._intents.add(message.segment, message.rows, message.worker, message.start, message.end)
        self._act(message.segment, rows)

    def _look_at_clocks(self) -> None:
        ended, due = self._intents.advance()
        for segment, rows in ended:
            self._replication.intents_ended(segment, rows)
        for segment, rows in due:
            self._act(segment, rows)

    def _act(self, segment: int, rows: np.ndarray) -> None:
        state = self.states[segment]
        self._want(state, rows[~state.rows.present(rows)])

    def _on_freeze(self, message: Message) -> None:
        """With ``extra`` 1 no row leaves this node until it is called with 0."""
        if message.extra:
            self._frozen = []
        else:
            waiting, self._frozen = self._frozen or [], None
            for request in waiting:
                self._on_want(request)
        self._reply_done(message)

    def _on_stop(self, _: Message) -> None:
        self._stopping = True

    # How rows move

    def _want(self, state: SegmentState, rows: np.ndarray) -> None:
        """Ask for rows that are not here, unless they were asked for already."""
        rows = rows[~state.wanted[rows]]
        for piece in growing_pieces(rows.size, state.segment.row_width):
            some = rows[piece]
            state.wanted[some] = True
            stamps = state.where[some]
            for node, chosen in groups(node_of(stamps)):
                message = Message.of(Kind.WANT, state.number, self._rank, rows=some[chosen], stamps=stamps[chosen])
                self._send(node, message)

    def _on_want(self, message: Message) -> None:
        """Relocate rows to the node that wants them, or let it have replicas."""
        if self._frozen is not None:
            self._frozen.append(message)
            return
        state, receiver = self.states[message.segment], self._sender(message)
        owned = state.rows.owned(message.rows)
        rows = message.rows[owned]
        if self._technique == "adaptive":
            leave = (state.num_holders[rows] == 0) & (state.intents[rows] == 0)
        else:
            leave = np.full(rows.size, self._technique == "relocation")
        self._relocate(state, rows[leave], receiver)
        self._replicate(state, rows[~leave], receiver)
        self._route(message, np.flatnonzero(~owned))

    def _relocate(self, state: SegmentState, rows: np.ndarray, receiver: int) -> None:
        """Give main copies to ``receiver``, and tell their homes."""
        if not rows.size:
            return
        for piece in pieces(rows.size, state.segment.row_width):
            some = rows[piece]
            message = Message.of(
                Kind.OWN, state.number, self._rank, rows=some, stamps=state.where[some],
                width=state.segment.row_width, blocks=self.mailbox.blocks,
            )
            assert message.values is not None and message.stamps is not None
            message.stamps[:] = state.give_main(some, receiver, message.values)
            self._send(receiver, message)
        for home, chosen in groups(home_of(rows, len(self._leaders))):
            if home not in (self._node, receiver):
                self._send(home, Message.of(
                    Kind.OWNER, state.number, self._rank, rows=rows[chosen], stamps=state.where[rows[chosen]]
                ))
        state.stats.relocated_out_rows += rows.size

    def _replicate(self, state: SegmentState, rows: np.ndarray, receiver: int) -> None:
        """Let ``receiver`` have replicas."""
        if rows.size:
            state.lend(rows, receiver)
        for piece in pieces(rows.size, state.segment.row_width):
            some = rows[piece]
            message = Message.of(
                Kind.REPLICA, state.number, self._rank, rows=some, stamps=state.where[some],
                width=state.segment.row_width, blocks=self.mailbox.blocks,
            )
            assert message.values is not None
            state.rows.pull(some, message.values)
            self._send(receiver, message)

    def _on_own(self, message: Message) -> None:
        assert message.stamps is not None and message.values is not None
        state = self.states[message.segment]
        state.add_main(message.rows, message.stamps, message.values)
        state.stats.relocated_in_rows += message.rows.size
        self._arrived(state)
        parked, self._parked = self._parked, []
        for waiting in parked:
            self._handlers[waiting.kind](waiting)

    def _on_replica(self, message: Message) -> None:
        assert message.stamps is not None and message.values is not None
        state = self.states[message.segment]
        state.add_replicas(message.rows, message.stamps, message.values, self._sender(message))
        state.stats.replicated_rows += message.rows.size
        for waiting in self._localizing:  # what a worker localized it has for its present clock, as by an intent
            if waiting.request.segment == state.number:
                rows = waiting.rows[~state.wanted[waiting.rows]]
                clock = int(self._clocks[waiting.request.worker])
                self._intents.add(state.number, rows, waiting.request.worker, clock, clock + 1)
        self._arrived(state)
        self._replication.intents_ended(state.number, message.rows[state.intents[message.rows] == 0])

    def _arrived(self, state: SegmentState) -> None:
        """Answer the localizes that have all their rows."""
        unfinished = []
        for waiting in self._localizing:
            if waiting.request.segment == state.number:
                waiting.rows = waiting.rows[state.wanted[waiting.rows]]
            if waiting.rows.size:
                unfinished.append(waiting)
            else:
                self._done(waiting.request, waiting.number)
        self._localizing = unfinished

    def _on_owner(self, message: Message) -> None:
        assert message.stamps is not None
        learn(self.states[message.segment].where, message.rows, message.stamps)

    def _on_drop(self, message: Message) -> None:
        self.states[message.segment].unlend(message.rows, self._sender(message))

    # Messages

    def _route(self, message: Message, positions: np.ndarray) -> None:
        """Forward what is asked for but not here to where it is, or park it where it is about to arrive here."""
        if not positions.size:
            return
        assert message.stamps is not None
        state = self.states[message.segment]
        stamps = state.where[message.rows[positions]]
        coming = epoch_of(message.stamps[positions]) > epoch_of(stamps)
        if coming.any():
            self._parked.append(message.part(positions[coming]))
            state.stats.parked_rows += int(coming.sum())
            positions, stamps = positions[~coming], stamps[~coming]
        for node, chosen in groups(node_of(stamps)):
            self._send(node, message.part(positions[chosen], stamps[chosen]))
        state.stats.forwarded_rows += positions.size

    def _sender(self, message: Message) -> int:
        """The node whose manager ``message`` comes from."""
        return self._node_of_leader[message.origin]

    def _send(self, node: int, message: Message) -> None:
        stats = self.states[message.segment].stats
        if message.kind in (Kind.DELTAS, Kind.REFRESH):
            stats.synchronised_rows += message.rows.size
        stats.sent_bytes += message.block.size
        self.mailbox.send(self._leaders[node], TO_MANAGER, message)

    def _reply(self, message: Message) -> None:
        self._done(message, message.extra)

    def _reply_done(self, message: Message) -> None:
        self._done(message, 1)

    def _done_by_way_of(self, message: Message, number: int) -> None:
        """Answer by way of the worker's manager, which takes the new values for its replicas first."""
        done = Message.of(Kind.RELAY, origin=message.origin, ticket=message.ticket, extra=number)
        self._send(message.worker, done)

    def _done(self, message: Message, number: int) -> None:
        if number:
            done = Message.of(Kind.DONE, ticket=message.ticket, extra=number)
            self.mailbox.send(message.origin, TO_WORKER, done)


def others(positions: np.ndarray, number: int) -> np.ndarray:
    """0 .. ``number`` - 1 without ``positions``."""
    kept = np.ones(number, bool)
    kept[positions] = False
    return np.flatnonzero(kept)
