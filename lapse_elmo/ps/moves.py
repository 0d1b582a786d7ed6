"""How rows get from node to node: requests, relocations, replicas, and the promotion of replicas to main copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lapse_elmo.ps.directory import group_by_node, home_of, node_of
from lapse_elmo.ps.intents import Intents
from lapse_elmo.ps.messages import Localize, Moved, Relocate, Replicate, Want
from lapse_elmo.ps.node_state import SegmentState
from lapse_elmo.ps.rounds import Rounds, SendToNode
from lapse_elmo.ps.routing import Router
from lapse_elmo.ps.transport import Transport
from lapse_elmo.ps.wire import chunks, new


@dataclass
class _PendingLocalize:
    """A localize request that is not answered yet, and its rows that have not arrived."""

    request: Localize
    rows: np.ndarray


class Moves:
    """Requests rows for one node and gives its rows to the nodes that request them.

    Args:
        states: The node's bookkeeping, by segment number.
        node: Number of this node.
        num_nodes: Number of nodes of the job.
        technique: One of ``TECHNIQUES``; decides between relocation and replication.
        transport: Allocates messages.
        send: Sends a message to the manager of a node.
        start: Starts a job, see :class:`~lapse_elmo.ps.rounds.Rounds`.
        router: Forwards requests for rows that are not here.
        rounds: The node's rounds, which drop replicas.
        intents: The intents of the node's workers.
        clocks: (workers,) int64, the clocks of the node's workers in shared memory; only read here.
        done: Answers a worker's call, given its rank, the ticket and the number of rows.
    """

    def __init__(
        self, states: Sequence[SegmentState], node: int, num_nodes: int, technique: str, transport: Transport,
        send: SendToNode, start: Callable[[int, Iterator[None]], None], router: Router, rounds: Rounds,
        intents: Intents, clocks: np.ndarray, done: Callable[[int, int, int], None],
    ) -> None:
        self.technique = technique
        self._states, self._node, self._num_nodes = states, node, num_nodes
        self._transport, self._send, self._start = transport, send, start
        self._router, self._rounds = router, rounds
        self._intents, self._clocks, self._done = intents, clocks, done
        self._wants: list[list[np.ndarray]] = [[] for _ in states]
        self._pending_wants: list[list[Want]] = [[] for _ in states]
        self._moved: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in states]
        self._localizing: list[_PendingLocalize] = []

    # Requesting rows

    def want(self, state: SegmentState, rows: np.ndarray) -> None:
        """Request the distinct ``rows`` that are neither here nor requested already, with the next `Want`."""
        rows = rows[~(state.rows.present(rows) | state.wanted[rows])]
        if rows.size:
            state.wanted[rows] = True
            self._wants[state.number].append(rows)

    def send_wants(self) -> bool:
        """Send the owners a `Want` for the rows requested since the last call; return whether there were any."""
        if not any(self._wants):
            return False
        self._rounds.send_drops()  # an owner refuses a second replica of a row that this node still holds
        for state, waiting in zip(self._states, self._wants, strict=True):
            if waiting:
                rows = np.concatenate(waiting)
                waiting.clear()
                stamps = state.stamps[rows]
                for node, chosen in group_by_node(node_of(stamps)):
                    some = rows[chosen]
                    nodes = np.full(some.size, self._node)
                    self._send(node, new(
                        Want, segment=state.number, rows=some, stamps=stamps[chosen], nodes=nodes
                    ))
        return True

    def on_localize(self, message: Localize) -> None:
        """Request the rows of a worker's `Localize` that are not here; answer when all have arrived.

        A row counts as arrived as soon as it comes, as main copy or replica, even if it has been relocated again since.
        """
        state = self._states[message.segment]
        rows = message.rows[~state.rows.present(message.rows)]
        self._localizing.append(_PendingLocalize(message, rows))
        self.want(state, rows)
        self._answer_localizes(state)

    def _answer_localizes(self, state: SegmentState) -> None:
        """Answer the localizes of the segment whose rows have all arrived."""
        unfinished = []
        for waiting in self._localizing:
            if waiting.request.segment == state.number:
                waiting.rows = waiting.rows[state.wanted[waiting.rows]]
            if waiting.rows.size:
                unfinished.append(waiting)
            else:
                self._done(waiting.request.origin, waiting.request.ticket, waiting.request.rows.size)
        self._localizing = unfinished

    # Serving requests for rows

    def on_want(self, message: Want) -> None:
        """Queue a `Want` for :meth:`serve_wants`: requests of several nodes that coincide are decided together.

        Relies on the `Drop` of the same rows by the same node having arrived before.
        """
        self._pending_wants[message.segment].append(message)

    @property
    def num_pending_wants(self) -> int:
        """Number of `Want` messages that have arrived and are not being served yet."""
        return sum(map(len, self._pending_wants))

    @property
    def num_unreported(self) -> int:
        """Number of `Relocate` messages whose rows' homes have not been informed yet."""
        return sum(map(len, self._moved))

    def serve_wants(self) -> bool:
        """Start a job per requesting node for all queued `Want` messages; return whether there were any.

        Rows that are not owned here are forwarded, or queued if they are in transit to this node.
        """
        if not self.num_pending_wants:
            return False
        for state, waiting in zip(self._states, self._pending_wants, strict=True):
            if not waiting:
                continue
            rows = np.concatenate([message.rows for message in waiting])
            stamps = np.concatenate([message.stamps for message in waiting])
            nodes = np.concatenate([message.nodes for message in waiting])
            waiting.clear()
            owned = state.rows.owned(rows)
            if not owned.all():
                self._router.route(
                    new(Want, segment=state.number, rows=rows[~owned], stamps=stamps[~owned], nodes=nodes[~owned])
                )
                rows, stamps, nodes = rows[owned], stamps[owned], nodes[owned]
            may_move = self._may_relocate(state, rows)
            if self.technique == "adaptive" and rows.size:  # several nodes want it: replicate it
                _, inverse, counts = np.unique(rows, return_inverse=True, return_counts=True)
                may_move &= counts[inverse] == 1
            for node, chosen in group_by_node(nodes):
                request = new(
                    Want, segment=state.number, rows=rows[chosen], stamps=stamps[chosen], nodes=nodes[chosen]
                )
                self._start(node, self._serve(state, request, node, may_move[chosen]))
        return True

    def _may_relocate(self, state: SegmentState, rows: np.ndarray) -> np.ndarray:
        """Return which of ``rows`` may be relocated, (n,) bool: under ``adaptive`` those that nobody else uses."""
        if self.technique == "adaptive":
            return (state.holders.num_holders[rows] == 0) & (state.intents[rows] == 0)
        return np.full(rows.size, self.technique == "relocation")

    def _serve(self, state: SegmentState, request: Want, node: int, may_move: np.ndarray) -> Iterator[None]:
        """Relocate the requested rows to ``node`` or send it replicas; a job of one or two messages per step.

        ``may_move`` (n,) is decided when the request arrives, but checked again for each chunk: other jobs or intents
        may have been started meanwhile.
        """
        for chunk in chunks(request.rows.size, state.segment.row_width):
            here = state.rows.owned(request.rows[chunk])
            if not here.all():  # relocated since the job was started
                self._router.route(request, np.flatnonzero(~here) + chunk.start)
            rows = request.rows[chunk][here]
            moving = may_move[chunk][here] & self._may_relocate(state, rows)
            if moving.any():
                self._relocate(state, rows[moving], node)
            if not moving.all():
                self._replicate(state, rows[~moving], node)
            yield

    def promote(self, holder: int) -> Iterator[None]:
        """Relocate to ``holder`` the rows that it alone holds and that no worker here uses; one message per step.

        Only called while answering the holder's `Sync`: all its deltas are here, and the replica becomes the main copy
        when the `Relocate` arrives, in place of a `Refresh`.
        """
        if self.technique != "adaptive":
            return
        for state in self._states:
            rows = state.holders.sole_rows_of(holder)
            rows = rows[state.intents[rows] == 0]
            for chunk in chunks(rows.size, state.segment.row_width):
                some = rows[chunk]
                # Again for each chunk: another node may have got replicas while this job waited for room.
                unused = some[(state.intents[some] == 0) & (state.holders.num_holders[some] == 1)]
                if unused.size:
                    state.holders.remove(unused, holder)
                    self._relocate(state, unused, holder)
                    yield

    def _relocate(self, state: SegmentState, rows: np.ndarray, receiver: int) -> None:
        """Send main copies to ``receiver`` and note the relocation for their homes."""
        width = state.segment.row_width
        message = new(Relocate, self._transport, segment=state.number, rows=rows, stamps=rows.size, width=width)
        message.stamps[:] = state.give_main(rows, receiver, message.values)
        self._send(receiver, message)
        self._moved[state.number].append((rows, message.stamps.copy()))
        state.stats.relocated_out_rows += rows.size

    def send_moved(self) -> None:
        """Report relocated rows to their homes, unless the home is the old or the new owner and knows."""
        for state, moved in zip(self._states, self._moved, strict=True):
            if not moved:
                continue
            rows, stamps = (np.concatenate(arrays) for arrays in zip(*moved, strict=True))
            moved.clear()
            homes = home_of(rows, self._num_nodes)
            reported = (homes != self._node) & (homes != node_of(stamps))
            for home, chosen in group_by_node(homes[reported]):
                self._send(home, new(
                    Moved, segment=state.number, rows=rows[reported][chosen], stamps=stamps[reported][chosen]
                ))

    def _replicate(self, state: SegmentState, rows: np.ndarray, receiver: int) -> None:
        """Send ``receiver`` replicas; registered as a holder first, it gets all later changes by its rounds."""
        # Count the changes made so far as a new version for all other holders, before this one gets the current value.
        state.holders.mark_changed(rows[state.rows.clear_dirty(rows)])
        state.holders.add(rows, receiver)
        message = new(
            Replicate, self._transport, segment=state.number, node=self._node, rows=rows, stamps=state.stamps[rows],
            width=state.segment.row_width,
        )
        missing = state.rows.pull(rows, message.values)
        assert not missing.size, "a row that is not here is to be replicated"
        self._send(receiver, message)

    # Receiving rows

    def on_relocate(self, message: Relocate) -> None:
        """Take over main copies from their former owner, in place of replicas where there are any.

        For a replica this arrives before the `SyncDone` of its round. Requests queued for these rows, which overtook
        the `Relocate`, are handled in the next step.
        """
        state = self._states[message.segment]
        state.add_main(message.rows, message.stamps, message.values)
        state.stats.relocated_in_rows += message.rows.size
        self._answer_localizes(state)
        self._router.rows_arrived()

    def on_replicate(self, message: Replicate) -> None:
        """Add replicas that this node requested; arrives before anything else about these rows from their owner.

        They are dropped after the next round unless a worker has an intent for them.
        """
        state = self._states[message.segment]
        state.add_replicas(message.rows, message.stamps, message.values, message.node)
        state.stats.replicated_rows += message.rows.size
        for waiting in self._localizing:  # keep a localized replica for the worker's current clock, as by an intent
            if waiting.request.segment == state.number:
                rows = waiting.rows[~state.wanted[waiting.rows]]
                clock = int(self._clocks[waiting.request.worker])
                self._intents.add(state.number, rows, waiting.request.worker, clock, clock + 1)
        self._answer_localizes(state)
        self._rounds.schedule_release(state.number, message.rows[state.intents[message.rows] == 0])
