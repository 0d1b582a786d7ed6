"""The manager of a node: it moves rows, synchronises replicas, and serves the workers of other nodes.

Only the manager changes which rows are on its node. Workers access the rows of their node in place. For all other rows
they send requests to the node that the owner stamps name (:mod:`lapse_elmo.ps.directory`). A manager serves requests
for rows that it owns, forwards the rest using its own, newer stamps, and queues requests for rows that are in transit
to it. Requests that arrive while a row moves are thus served by the new owner, and none is lost.

The manager never blocks: :meth:`Manager.step` handles the messages that have arrived. The answer to one message may be
many megabytes. It is sent by a *job*, a generator that is advanced while its receiver has room; jobs for one receiver
run in the order in which they were started. docs/protocol.md lists the messages and the order that each relies on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lapse_elmo.ps.directory import update_stamps
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
from lapse_elmo.ps.routing import Router
from lapse_elmo.ps.service import Service
from lapse_elmo.ps.transport import TO_MANAGER, TO_WORKER, Address, Backoff
from lapse_elmo.ps.wire import chunks, new

TECHNIQUES = ("adaptive", "relocation", "replication", "static")
REPLICATING = ("adaptive", "replication")  # the techniques with replicas
# Wants and small messages to other managers are delayed by this share of a step, at most by this many seconds, and then
# sent together: fewer transmissions for a delay that a step does not notice.
_DELAY_SHARE, _MAX_DELAY_S = 1 / 128, 0.02
_MESSAGES_PER_STEP = 64  # at most, so that a stream of messages cannot keep rounds and jobs from making progress
_MAX_OUTGOING_BYTES, _MAX_TOTAL_OUTGOING_BYTES = 1 << 22, 1 << 28  # not sent yet: per receiver, in total


class Manager:
    """The message loop of one node and the handler of each message kind.

    Args:
        mailbox: The manager's end of the network, including the rings of the node's workers.
        backoff: How to wait when there is nothing to do.
        states: The node's bookkeeping, by segment number.
        technique: One of ``TECHNIQUES``.
        node: Number of this node.
        leaders: Rank of each node's manager, by node.
        clocks: (workers,) int64, the clocks of the node's workers in shared memory; only read here.
        synced: (workers,) int64 in shared memory, written here; see :class:`~lapse_elmo.ps.rounds.Rounds`.
    """

    def __init__(
        self, mailbox: Mailbox, backoff: Backoff, states: Sequence[SegmentState], technique: str, node: int,
        leaders: Sequence[int], clocks: np.ndarray, synced: np.ndarray,
    ) -> None:
        self.mailbox, self.states, self.node = mailbox, states, node
        self._handled = 0  # messages
        self._steps = 0  # number of times that a step has begun or ended: odd during a step
        self.stopping = self._halted = self._frozen = False
        self._flushed_s = mailbox.transport.now()  # when wants and small messages were last sent
        self._backoff = backoff
        self._leaders = list(leaders)
        self._jobs: dict[Address, deque[Iterator[None]]] = {}
        self._intents = Intents(states, clocks)
        transport, lenders = mailbox.transport, range(len(leaders) if technique in REPLICATING else 0)
        self._rounds = Rounds(states, node, transport, self._send, self._start, clocks, synced, lenders)
        self._router = Router(states, node, self._send)
        self._moves = Moves(
            states, node, len(leaders), technique, transport, self._send, self._start, self._router, self._rounds,
            self._intents, clocks, self._done,
        )
        service = Service(states, node, leaders[node], mailbox, self._send, self._router, self._rounds, self._done)
        self._handlers: dict[type[Message], Callable[[Any], None]] = {
            Intent: self._on_intent, Localize: self._moves.on_localize, Set: service.on_set, Flush: self._on_flush,
            Freeze: self._on_freeze, Stop: self._on_stop,
            Pull: lambda m: self._job(Address(m.origin, TO_WORKER), service.serve_pull(m)),
            Push: service.on_push, HolderPush: service.on_holder_push, SetDone: service.on_set_done,
            Want: self._moves.on_want,
            Relocate: self._moves.on_relocate, Replicate: self._moves.on_replicate, Moved: self._on_moved,
            Drop: self._on_drop, Deltas: self._on_deltas, Expiring: self._on_expiring, Refresh: self._rounds.on_refresh,
            Sync: lambda m: self._job(self._manager_of(m.node), self._serve_sync(m)),
            SyncDone: lambda m: self._rounds.on_sync_done(m.node),
        }

    def serve(self) -> None:
        """Call :meth:`step` until stopped; while idle, first reserve memory for rows that may come, then sleep."""
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
        """Make :meth:`serve` return without sending what is left: after an error the receivers may be gone."""
        self._halted = self.stopping = True

    def step(self) -> bool:
        """Handle messages, start what is due and advance jobs, without blocking; return whether anything was done."""
        self._steps += 1
        busy = False
        for _ in range(_MESSAGES_PER_STEP):
            message = None if self.stopping else self.mailbox.receive()
            if message is None:
                break
            self._handle(message)
            self._handled += 1
            busy = True
        for message in self._router.take_queued():
            self._handle(message)
        now = self.mailbox.transport.now()
        flush_due = self._flush_due(now)
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
        self._steps += 1
        return busy

    def _flush_due(self, now: float) -> bool:
        """Return whether to send what waits: not at every step, since messages that wait a little are merged."""
        return now - self._flushed_s >= min(self._rounds.clock_s * _DELAY_SHARE, _MAX_DELAY_S)

    @property
    def pending(self) -> int:
        """Number of answers still owed for handled messages."""
        return sum(map(len, self._jobs.values())) + self._moves.num_pending_wants + self._moves.num_unreported

    def counts(self) -> tuple[int, int, int] | None:
        """Return the numbers of messages sent, of messages handled and of answers pending, for another thread.

        None during a step, or if one began while they were read: numbers of different moments could miss a message that
        was pending when the first was read and sent when the last was.
        """
        before = self._steps
        counts = self.mailbox.sent, self._handled, self.pending
        return counts if before % 2 == 0 and self._steps == before else None

    def _handle(self, message: Message) -> None:
        self._handlers[type(message)](message)

    def _job(self, to: Address, job: Iterator[None]) -> None:
        """Start a job that sends messages to ``to`` as far as it has room, after earlier jobs for ``to``."""
        self._jobs.setdefault(to, deque()).append(job)

    def _start(self, node: int, job: Iterator[None]) -> None:
        """Start a job that sends messages to the manager of ``node``."""
        self._job(self._manager_of(node), job)

    def _run_jobs(self) -> bool:
        """Advance the jobs whose receivers have room; return whether any was advanced."""
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
        """Return whether ``to`` keeps up with what it is sent."""
        # Workers may compute for seconds before they receive: without a limit in total, many could fill the memory.
        transport = self.mailbox.transport
        if to.tag == TO_WORKER and transport.outgoing_bytes() >= _MAX_TOTAL_OUTGOING_BYTES:
            return False
        return transport.outgoing_bytes(to) < _MAX_OUTGOING_BYTES

    # Requests of this node's workers

    def _on_intent(self, message: Intent) -> None:
        """Register an intent and request the rows it needs soon; under ``relocation`` it is an async localize."""
        rows = message.rows
        if self._moves.technique != "relocation":
            rows = self._intents.add(message.segment, rows, message.worker, message.start, message.end)
        self._moves.want(self.states[message.segment], rows)

    def _process_clocks(self) -> None:
        """Expire intents whose clocks have passed, and request rows whose intents start soon."""
        ended, due = self._intents.advance()
        for segment, rows in ended:
            self._rounds.schedule_release(segment, rows)
        for segment, rows in due:
            self._moves.want(self.states[segment], rows)

    def _on_flush(self, message: Flush) -> None:
        """Answer a worker's `Flush` at the end of the next round to start, which is exact."""
        self._rounds.after_next_round(lambda: self._done(message.origin, message.ticket, 1))

    def _on_freeze(self, message: Freeze) -> None:
        """Stop, or with ``frozen`` 0 resume, starting rounds and requesting rows.

        Requests are still served. Once all managers are frozen and all messages are drained, no row moves.
        """
        self._frozen = bool(message.frozen)
        self._done(message.origin, message.ticket, 1)

    def _on_stop(self, _: Stop) -> None:
        """End :meth:`serve`. The sender has drained all messages before, so this is the last one."""
        self.stopping = True

    # Messages of other managers

    def _on_moved(self, message: Moved) -> None:
        """Record at the rows' home who owns them now; the newest stamp wins, so no order is needed."""
        update_stamps(self.states[message.segment].stamps, message.rows, message.stamps)

    def _on_drop(self, message: Drop) -> None:
        """Remove a holder of replicas: after its last `Deltas`, and before its next `Want`, of the same rows."""
        self.states[message.segment].holders.remove(message.rows, message.node)

    def _on_deltas(self, message: Deltas) -> None:
        """Add a holder's deltas to the main copies; before the `Sync` of the round, whose answer includes them.

        The rows are here: a row with holders is never relocated, and a holder sends no deltas after its `Drop`.
        """
        state = self.states[message.segment]
        missing = state.rows.add(message.rows, message.values, mark=False)
        assert not missing.size, "deltas came for rows that are not here"
        state.holders.mark_changed_by(message.rows, message.node)

    def _on_expiring(self, message: Expiring) -> None:
        """Exclude replicas that a holder will drop from the `Refresh` of its round; arrives before the `Sync`."""
        self.states[message.segment].holders.mark_expiring(message.rows, message.node)

    def _serve_sync(self, message: Sync) -> Iterator[None]:
        """Answer a holder's `Sync`: promote and refresh its replicas, then send `SyncDone`.

        All `Deltas` that the holder sent before the `Sync` have been added, and it sends no more until `SyncDone`. So a
        value read here includes everything that the holder has sent, and the holder can add its new deltas on top.
        Guarantees `Relocate` and `Refresh` before `SyncDone`, all in one job.
        """
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
                missing = state.rows.pull(rows, refresh.values)
                assert not missing.size, "a replica is to be refreshed of a row that is not here"
                self._send(message.node, refresh)
                state.stats.synchronised_rows += rows.size
                yield
        self._send(message.node, new(SyncDone, node=self.node))

    # Sending

    def _manager_of(self, node: int) -> Address:
        return Address(self._leaders[node], TO_MANAGER)

    def _send(self, node: int, message: Message) -> None:
        """Send ``message`` to the manager of ``node`` and count its bytes for its segment (0 if it has none)."""
        segment = getattr(message, "segment", 0)
        self.states[segment].stats.sent_bytes += message.block.size
        self.mailbox.send(self._manager_of(node), message)

    def _done(self, origin: int, ticket: int, count: int) -> None:
        """Answer the worker of rank ``origin``: ``count`` rows of its call ``ticket`` are complete."""
        if count:
            self.mailbox.send(Address(origin, TO_WORKER), new(Done, ticket=ticket, count=count))
