"""The manager of a node moves rows, synchronises replicas and serves other nodes.

It alone changes which rows are on the node. Workers read and change rows that are here by themselves; what is not here
they ask for at the manager of the node that the owner stamps name (:mod:`lapse_elmo.ps.directory`). A manager serves
what it owns, forwards the rest by its own, newer stamps, and queues what it is about to own. So requests that arrive
while a row moves are served by the new owner, and none is lost.

The manager never waits: :meth:`Manager.step` handles what has arrived. What it sends in answer to one message, which
may be many megabytes, is a *job* that continues as far as the receiver keeps up; jobs for one receiver run in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lapse_elmo.ps.directory import NO_NODE, update_stamps
from lapse_elmo.ps.intents import Intents
from lapse_elmo.ps.mailbox import Mailbox
from lapse_elmo.ps.messages import (
    Deltas,
    Done,
    Drop,
    Expiring,
    Flush,
    Freeze,
    HolderPush,
    Intent,
    Localize,
    Message,
    Moved,
    Pull,
    Push,
    Refresh,
    Relocate,
    Replicate,
    Rows,
    Set,
    SetDone,
    Stop,
    Sync,
    SyncDone,
    Want,
)
from lapse_elmo.ps.moves import Moves
from lapse_elmo.ps.node_state import SegmentState
from lapse_elmo.ps.rounds import Rounds
from lapse_elmo.ps.routing import Router, complement
from lapse_elmo.ps.transport import TO_MANAGER, TO_WORKER, Address, Backoff
from lapse_elmo.ps.wire import chunks, new

TECHNIQUES = ("adaptive", "relocation", "replication", "static")
# How long wants, and messages to other managers, wait for more, so that few are sent: a small share of a step.
_DELAY_SHARE, _MAX_DELAY_S = 1 / 128, 0.02
_MESSAGES_PER_STEP = 64  # messages handled before rounds and jobs have their turn
_MAX_OUTGOING_BYTES, _MAX_TOTAL_OUTGOING_BYTES = 1 << 22, 1 << 28  # of what has not left: to one receiver, in all


class Manager:
    """Serves until it is told to stop.

    :param leaders: rank of each node's manager.
    :param clocks: (workers,) int64 of the node.
    :param synced: (workers,) int64; see :class:`~lapse_elmo.ps.rounds.Rounds`.
    """

    def __init__(
        self, mailbox: Mailbox, backoff: Backoff, states: Sequence[SegmentState], technique: str, node: int,
        leaders: Sequence[int], clocks: np.ndarray, synced: np.ndarray,
    ) -> None:
        self.mailbox, self.states, self.node = mailbox, states, node
        self.handled = 0  # messages
        self.stopping = self._halted = False
        self._frozen = False
        self._flushed_s = mailbox.transport.now()  # when small messages and wants were last sent
        self._backoff = backoff
        self._leaders = list(leaders)
        self._jobs: dict[Address, deque[Iterator[None]]] = {}
        self._intents = Intents(states, clocks)
        transport = mailbox.transport
        self._rounds = Rounds(states, node, transport, self._send, self._start, clocks, synced)
        self._router = Router(states, node, self._send)
        self._moves = Moves(
            states, node, len(leaders), technique, transport, self._send, self._start, self._router, self._rounds,
            self._intents, clocks, self._done,
        )
        self._handlers: dict[type[Message], Callable[[Any], None]] = {
            Intent: self._on_intent, Localize: self._moves.on_localize, Set: self._on_set, Flush: self._on_flush,
            Freeze: self._on_freeze, Stop: self._on_stop,
            Pull: lambda m: self._job(Address(m.origin, TO_WORKER), self._serve_pull(m)),
            Push: self._on_push, HolderPush: self._on_holder_push, SetDone: self._on_set_done,
            Want: self._moves.on_want,
            Relocate: self._moves.on_relocate, Replicate: self._moves.on_replicate, Moved: self._on_moved,
            Drop: self._on_drop, Deltas: self._on_deltas, Expiring: self._on_expiring, Refresh: self._rounds.on_refresh,
            Sync: lambda m: self._job(self._manager_of(m.node), self._serve_sync(m)),
            SyncDone: lambda m: self._rounds.on_sync_done(m.node),
        }

    def serve(self) -> None:
        """Run until stopped, with sleeps where there is nothing to do; return when everything has left."""
        prepared = False
        while not self.stopping:
            if self.step():
                self._backoff.reset()
                prepared = False
            elif not prepared:
                prepared = not any(state.prepare() for state in self.states)
            else:
                self._backoff.wait()
        if not self._halted:
            self.mailbox.flush()
            self.mailbox.transport.finish()

    def halt(self) -> None:
        """Have :meth:`serve` return soon, whatever is on its way: nobody may receive any more."""
        self._halted = self.stopping = True

    def step(self) -> bool:
        """Handle what has arrived and is due; return whether there was anything."""
        busy = False
        for _ in range(_MESSAGES_PER_STEP):
            message = None if self.stopping else self.mailbox.receive()
            if message is None:
                break
            self._handle(message)
            self.handled += 1
            busy = True
        for message in self._router.take_queued():
            self._handle(message)
        now = self.mailbox.transport.now()
        flush_due = now - self._flushed_s >= min(self._rounds.clock_s * _DELAY_SHARE, _MAX_DELAY_S)
        if not self._frozen:
            if self._intents.clocks_advanced():
                self._process_clocks()
            busy |= self._rounds.begin_if_due()
            busy |= flush_due and self._moves.send_wants()
        if flush_due:
            self._flushed_s = now
            busy |= self._moves.serve_wants()
        busy |= self._run_jobs()
        if flush_due:
            self._moves.send_moved()
        self.mailbox.flush(urgent_only=not flush_due)
        return busy

    @property
    def pending(self) -> int:
        """Answers that are not complete, of messages that have been handled."""
        return sum(map(len, self._jobs.values())) + self._moves.num_pending_wants + self._moves.num_unreported

    def _handle(self, message: Message) -> None:
        self._handlers[type(message)](message)

    # Jobs

    def _job(self, to: Address, job: Iterator[None]) -> None:
        """Run what answers a message as far as there is room."""
        self._jobs.setdefault(to, deque()).append(job)

    def _start(self, node: int, job: Iterator[None]) -> None:
        self._job(self._manager_of(node), job)

    def _run_jobs(self) -> bool:
        """Continue all jobs whose receivers have room; return whether anything was done."""
        busy = False
        for to in list(self._jobs):
            waiting = self._jobs[to]
            while waiting and self._has_room(to):
                busy = True
                try:
                    next(waiting[0])
                except StopIteration:
                    waiting.popleft()
            if not waiting:
                del self._jobs[to]
        return busy

    def _has_room(self, to: Address) -> bool:
        """Whether ``to`` keeps up. A worker may compute for long before it receives what it asked for."""
        transport = self.mailbox.transport
        if to.tag == TO_WORKER and transport.outgoing_bytes() >= _MAX_TOTAL_OUTGOING_BYTES:
            return False
        return transport.outgoing_bytes(to) < _MAX_OUTGOING_BYTES

    # What workers ask for

    def _serve_pull(self, message: Pull) -> Iterator[None]:
        state = self.states[message.segment]
        for chunk in chunks(message.rows.size, message.num_floats):
            some = self._router.select_owned(message, chunk)
            if not some.rows.size:
                continue
            stamps = state.stamps[some.rows] if message.forwarded else some.rows[:0]
            self.mailbox.send(Address(message.origin, TO_WORKER), new(
                Rows, segment=message.segment, sender=self._leaders[self.node], ticket=message.ticket, rows=some.rows,
                stamps=stamps, indices=some.indices,
            ))
            block = self.mailbox.transport.allocate(4 * some.rows.size * message.num_floats)
            values = block.view(np.float32).reshape(some.rows.size, message.num_floats)
            state.rows.pull(some.rows, values)
            self.mailbox.send_values(message.origin, values)
            state.stats.served_rows += some.rows.size
            state.stats.sent_bytes += values.nbytes + 24 * some.rows.size
            yield

    def _on_push(self, message: Push) -> None:
        state = self.states[message.segment]
        message = self._router.select_owned(message)
        if not message.rows.size:
            return
        # A node that is about to get replicas, or has them by now, must not show its worker values without this push.
        held = state.holders.is_held_by(message.rows, message.node)
        if held.any():
            back = np.flatnonzero(held)
            self._send(message.node, new(
                HolderPush, segment=message.segment, node=message.node, origin=message.origin, ticket=message.ticket,
                rate=message.rate, rows=message.rows[back], values=message.values[back],
            ))
            rest = np.flatnonzero(~held)
            if not rest.size:
                return
            rows, values = message.rows[rest], message.values[rest]
        else:
            rows, values = message.rows, message.values
        state.rows.push(rows, values, message.rate)
        state.stats.served_rows += rows.size
        self._done(message.origin, message.ticket, rows.size)

    def _on_holder_push(self, message: HolderPush) -> None:
        """Push to replicas here, or to main copies; what is not here any more goes to its owner after all."""
        state = self.states[message.segment]
        missing = state.rows.push(message.rows, message.values, message.rate)
        self._done(message.origin, message.ticket, message.rows.size - missing.size)
        if missing.size:
            self._rounds.send_drops()  # else the owner would send it back here
            rows = message.rows[missing]
            self._router.route(new(
                Push, segment=message.segment, node=message.node, origin=message.origin, ticket=message.ticket,
                rate=message.rate, rows=rows, stamps=state.stamps[rows], values=message.values[missing],
            ))

    def _on_set(self, message: Set) -> None:
        """The worker's manager gets it first, so that it comes after the deltas that are on their way to the owner."""
        state = self.states[message.segment]
        missing = state.rows.set(message.rows, message.values)
        held = missing[state.replica_owner[message.rows[missing]] != NO_NODE]
        if held.size and message.node == self.node:
            state.rows.overwrite(message.rows[held], message.values[held])
        here = complement(missing, message.rows.size)
        if here.size:
            done = new(
                SetDone, segment=message.segment, origin=message.origin, ticket=message.ticket, rows=message.rows[here]
            )
            if message.node == self.node:
                self._on_set_done(done)
            else:
                self._send(message.node, done)
        self._router.route(message, missing)

    def _on_set_done(self, message: SetDone) -> None:
        """Rows are overwritten at their owners; a replica here may show the old value until a round has ended."""
        state, number = self.states[message.segment], message.rows.size
        if (state.replica_owner[message.rows] != NO_NODE).any():
            self._rounds.after_next_round(lambda: self._done(message.origin, message.ticket, number))
        else:
            self._done(message.origin, message.ticket, number)

    def _on_intent(self, message: Intent) -> None:
        rows = message.rows
        if self._moves.technique != "relocation":
            rows = self._intents.add(message.segment, rows, message.worker, message.start, message.end)
        self._moves.want(self.states[message.segment], rows)

    def _process_clocks(self) -> None:
        ended, due = self._intents.advance()
        for segment, rows in ended:
            self._rounds.schedule_release(segment, rows)
        for segment, rows in due:
            self._moves.want(self.states[segment], rows)

    def _on_flush(self, message: Flush) -> None:
        self._rounds.after_next_round(lambda: self._done(message.origin, message.ticket, 1))

    def _on_freeze(self, message: Freeze) -> None:
        """With ``frozen`` begin nothing: when all managers have done so and nothing is pending, no row moves."""
        self._frozen = bool(message.frozen)
        self._done(message.origin, message.ticket, 1)

    def _on_stop(self, _: Stop) -> None:
        self.stopping = True

    # What other managers say

    def _on_moved(self, message: Moved) -> None:
        update_stamps(self.states[message.segment].stamps, message.rows, message.stamps)

    def _on_drop(self, message: Drop) -> None:
        self.states[message.segment].holders.remove(message.rows, message.node)

    def _on_deltas(self, message: Deltas) -> None:
        state = self.states[message.segment]
        missing = state.rows.add(message.rows, message.values, mark=False)
        assert not missing.size, "deltas came for rows that are not here"
        state.holders.mark_changed_by(message.rows, message.node)

    def _on_expiring(self, message: Expiring) -> None:
        self.states[message.segment].holders.mark_expiring(message.rows, message.node)

    def _serve_sync(self, message: Sync) -> Iterator[None]:
        yield from self._moves.promote(message.node)
        for state in self.states:
            held = state.holders.rows_of(message.node)
            state.holders.mark_changed(held[state.rows.clear_dirty(held)])
            outdated = state.holders.outdated(message.node, bool(message.exact))
            width = state.segment.row_width
            for chunk in chunks(outdated.size, width):
                rows = outdated[chunk]
                state.holders.mark_sent(rows, message.node)
                refresh = new(
                    Refresh, self.mailbox.transport, segment=state.number, node=self.node, rows=rows, width=width
                )
                state.rows.pull(rows, refresh.values)
                self._send(message.node, refresh)
                state.stats.synchronised_rows += rows.size
                yield
        self._send(message.node, new(SyncDone, node=self.node))

    # Sending

    def _manager_of(self, node: int) -> Address:
        return Address(self._leaders[node], TO_MANAGER)

    def _send(self, node: int, message: Message) -> None:
        segment = getattr(message, "segment", 0)
        self.states[segment].stats.sent_bytes += message.block.size
        self.mailbox.send(self._manager_of(node), message)

    def _done(self, origin: int, ticket: int, count: int) -> None:
        if count:
            self.mailbox.send(Address(origin, TO_WORKER), new(Done, ticket=ticket, count=count))
