"""The requests of workers for rows, as a manager serves them: pulls, pushes and sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lapse_elmo.ps.directory import NO_NODE
from lapse_elmo.ps.mailbox import Mailbox
from lapse_elmo.ps.messages import HolderPush, Pull, Push, Rows, Set, SetDone
from lapse_elmo.ps.node_state import SegmentState
from lapse_elmo.ps.rounds import Rounds, SendToNode
from lapse_elmo.ps.routing import Router, complement
from lapse_elmo.ps.transport import TO_WORKER, Address
from lapse_elmo.ps.wire import chunks, new


class Service:
    """Serves the requests of workers for the rows that a node owns.

    Args:
        states: The node's bookkeeping, by segment number.
        node: Number of this node.
        rank: Rank of its manager.
        mailbox: The manager's end of the network.
        send: Sends a message to the manager of a node.
        router: Forwards requests for rows that are not here.
        rounds: The node's rounds.
        done: Answers a worker's call, given its rank, the ticket and the number of rows.
    """

    def __init__(
        self, states: Sequence[SegmentState], node: int, rank: int, mailbox: Mailbox, send: SendToNode, router: Router,
        rounds: Rounds, done: Callable[[int, int, int], None],
    ) -> None:
        self._states, self._node, self._rank = states, node, rank
        self._mailbox, self._send, self._router = mailbox, send, router
        self._rounds, self._done = rounds, done

    def serve_pull(self, message: Pull) -> Iterator[None]:
        """Answer a `Pull` of a worker of any other node, chunk by chunk; forward or queue rows not owned here.

        Each chunk is looked up when its turn comes, since rows may move while the job waits for room. The worker
        matches values with `Rows` messages by order alone: this relies on FIFO order, and on one job per receiver.
        """
        state = self._states[message.segment]
        for chunk in chunks(message.rows.size, message.num_floats):
            some = self._router.select_owned(message, chunk)
            if not some.rows.size:
                continue
            stamps = state.stamps[some.rows] if message.forwarded else some.rows[:0]
            self._mailbox.send(Address(message.origin, TO_WORKER), new(
                Rows, segment=message.segment, sender=self._rank, ticket=message.ticket, rows=some.rows,
                stamps=stamps, indices=some.indices,
            ))
            block = self._mailbox.transport.allocate(4 * some.rows.size * message.num_floats)
            values = block.view(np.float32).reshape(some.rows.size, message.num_floats)
            state.rows.pull(some.rows, values)
            self._mailbox.send_values(message.origin, values)
            state.stats.served_rows += some.rows.size
            state.stats.sent_bytes += values.nbytes + 24 * some.rows.size
            yield

    def on_push(self, message: Push) -> None:
        """Apply a `Push` of another node's worker to the rows owned here; forward or queue the rest.

        Guarantees that a row is changed before the `Done` that counts it is sent. Rows that the worker's node holds
        replicas of are returned to that node as `HolderPush`, which is sent after the `Replicate` of these rows and,
        by FIFO order, arrives after it.
        """
        state = self._states[message.segment]
        message = self._router.select_owned(message)
        if not message.rows.size:
            return
        # The worker's next pull may read the replica, which must show this push: apply it there instead of here.
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

    def on_holder_push(self, message: HolderPush) -> None:
        """Apply a push of this node's worker that its owner returned because the rows are replicated here.

        Relies on the `Replicate` of the rows having arrived before. A replica that has been dropped in the meantime is
        missing: its push is sent to the owner again, after the `Drop`.
        """
        state = self._states[message.segment]
        missing = state.rows.push(message.rows, message.values, message.rate)
        self._done(message.origin, message.ticket, message.rows.size - missing.size)
        if missing.size:
            self._rounds.send_drops()  # else the owner, for whom this node holds them, would return the push again
            rows = message.rows[missing]
            self._router.route(new(
                Push, segment=message.segment, node=message.node, origin=message.origin, ticket=message.ticket,
                rate=message.rate, rows=rows, stamps=state.stamps[rows], values=message.values[missing],
            ))

    def on_set(self, message: Set) -> None:
        """Overwrite the main copies here; forward the rest to its owners.

        A worker sends a `Set` to its own manager first, which overwrites the node's replica and forwards it. So the
        `Set` reaches the owner after the `Deltas` that the node has sent to it before, which would otherwise be added
        to the new value. Guarantees a `SetDone` to the worker's manager after the main copy is overwritten.
        """
        state = self._states[message.segment]
        missing = state.set_rows(message.rows, message.values)
        held = missing[state.replica_owner[message.rows[missing]] != NO_NODE]
        if held.size and message.node == self._node:
            state.rows.overwrite(message.rows[held], message.values[held])
        here = complement(missing, message.rows.size)
        if here.size:
            done = new(
                SetDone, segment=message.segment, origin=message.origin, ticket=message.ticket, rows=message.rows[here]
            )
            if message.node == self._node:
                self.on_set_done(done)
            else:
                self._send(message.node, done)
        self._router.route(message, missing)

    def on_set_done(self, message: SetDone) -> None:
        """Complete a worker's ``set`` once the owners have overwritten the rows.

        Called on the worker's node. If a row is replicated here, the answer waits for a whole round: a `Refresh` in
        transit, read before the row was overwritten, may put the old value back into the replica. Relies on `SetDone`
        arriving after a `Replicate` that the same owner sent before it.
        """
        state, number = self._states[message.segment], message.rows.size
        if (state.replica_owner[message.rows] != NO_NODE).any():
            self._rounds.after_next_round(lambda: self._done(message.origin, message.ticket, number))
        else:
            self._done(message.origin, message.ticket, number)
