"""Requests of one worker to its own manager (in shared memory) and to others (over the network), and their answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from lapse_elmo.mpi.world import World
from lapse_elmo.ps.api import Call
from lapse_elmo.ps.directory import group_by_node, node_of, update_stamps
from lapse_elmo.ps.layout import Segment
from lapse_elmo.ps.mailbox import Mailbox
from lapse_elmo.ps.messages import Done, Message, Pull, Push, Rows, Set
from lapse_elmo.ps.ring import Ring
from lapse_elmo.ps.transport import TO_MANAGER, Address, Backoff
from lapse_elmo.ps.wire import new

_MAX_REQUESTED_BYTES = 1 << 26  # of values requested or being sent by a worker, which waits for answers beyond it
_RECORD_HEADER_BYTES = 256  # more than any message's header takes


@dataclass
class RowsCall(Call):
    """A call in progress, complete once ``remaining`` rows or answers have arrived.

    ``values`` (n, width) is the caller's output buffer of a pull, or its input of a push at the learning rate ``rate``.
    """

    remaining: int
    segment: Segment | None = None
    rows: np.ndarray | None = None
    values: np.ndarray | None = None
    rate: float = 0.0


class Requests:
    """Sends a worker's requests and receives their answers. Every wait receives messages, which prevents deadlocks.

    Args:
        world: The worker's rank and the managers' ranks.
        mailbox: The worker's end of the network.
        backoff: How to wait when no message has arrived.
        ring: The worker's queue to its node's manager.
        calls: The worker's calls in progress, by ticket; not changed here.
        stamps: Owner stamps (num_rows,) int64 by segment number, written by the node's manager.
        cached: The same as learned by the node's workers from answers to forwarded requests, written here.
    """

    def __init__(
        self, world: World, mailbox: Mailbox, backoff: Backoff, ring: Ring, calls: Mapping[int, Call],
        stamps: list[np.ndarray], cached: list[np.ndarray],
    ) -> None:
        self.world, self.mailbox, self.backoff = world, mailbox, backoff
        self._ring, self._calls = ring, calls
        self._stamps, self._cached = stamps, cached
        self._sent_local = self._requested_bytes = 0
        self.handled = 0

    @property
    def sent(self) -> int:
        """Messages sent so far."""
        return self.mailbox.sent + self._sent_local

    def ask(self, kind: type[Pull] | type[Push], number: int, ticket: int, call: RowsCall, missing: np.ndarray) -> int:
        """Send the owners of the rows at the indices ``missing`` a `Pull` or `Push` for ``call``.

        Args:
            kind: The message to send.
            number: The segment's number.
            ticket: The call's ticket.
            call: The call; its rows and values are read.
            missing: (n,) indices of rows that are not on this node.

        Returns:
            The number of bytes sent.
        """
        assert call.rows is not None and call.values is not None
        asked = call.rows[missing]
        # The newer of both. Workers update theirs without a lock: an update that is lost costs one more hop.
        stamps = np.maximum(self._stamps[number][asked], self._cached[number][asked])
        rank, width, sent_bytes = self.world.rank, call.values.shape[1], 0
        for node, chosen in group_by_node(node_of(stamps)):
            rows, indices = asked[chosen], missing[chosen]
            self._wait_for_room()
            message: Message
            if kind is Pull:
                message = new(
                    Pull, segment=number, origin=rank, ticket=ticket, num_floats=width, forwarded=0, rows=rows,
                    stamps=stamps[chosen], indices=indices,
                )
                self._requested_bytes += 4 * rows.size * width
            else:
                message = push = new(
                    Push, self.mailbox.transport, segment=number, node=self.world.node, origin=rank, ticket=ticket,
                    rate=call.rate, rows=rows, stamps=stamps[chosen], width=width,
                )
                np.take(call.values, indices, 0, push.values, mode="clip")  # other modes copy via a buffer
            self.mailbox.send(Address(self.world.leaders[node], TO_MANAGER), message)
            sent_bytes += message.block.size
        self.mailbox.flush()
        return sent_bytes

    def _wait_for_room(self) -> None:
        """Receive answers until less than the maximum is requested or being sent."""
        self.backoff.reset()
        while max(self._requested_bytes, self.mailbox.transport.outgoing_bytes()) > _MAX_REQUESTED_BYTES:
            self.receive()

    def ring_chunks(self, number: int, row_bytes: int) -> Iterable[slice]:
        """Return slices of ``number`` rows such that a message of ``row_bytes`` per row fits into the ring."""
        size = max((self._ring.largest_record - _RECORD_HEADER_BYTES) // row_bytes, 1)
        return (slice(start, start + size) for start in range(0, number, size))

    def send_set(self, segment: Segment, number: int, ticket: int, rows: np.ndarray, values: np.ndarray) -> None:
        """Send this node's manager the ``values`` (n, row_width) of rows that are not here, for the call ``ticket``.

        Through the manager, which keeps the order with its deltas; see Service.on_set.
        """
        for chunk in self.ring_chunks(rows.size, 16 + 4 * segment.row_width):
            self.send_local(new(
                Set, segment=number, node=self.world.node, origin=self.world.rank, ticket=ticket, rows=rows[chunk],
                stamps=self._stamps[number][rows[chunk]], values=values[chunk],
            ))

    def send_local(self, message: Message) -> None:
        """Send ``message`` to this node's manager, through shared memory; wait while the ring is full."""
        if message.block.size > self._ring.largest_record:  # a single, very wide row
            self.mailbox.send(Address(self.world.leaders[self.world.node], TO_MANAGER), message)
            self.mailbox.flush()
            return
        self._sent_local += 1
        self.backoff.reset(spin=False)
        while not self._ring.try_write(message.block):
            self.receive()

    def receive(self) -> None:
        """Handle one answer if any has arrived, else wait by the backoff."""
        message = self.mailbox.receive()
        if message is None:
            self.world.progress.waiting()
            self.backoff.wait()
            return
        assert isinstance(message, (Rows, Done))
        call = self._calls[message.ticket]
        assert isinstance(call, RowsCall)
        if isinstance(message, Rows):
            self._take_rows(call, message)
            call.remaining -= message.rows.size
        else:
            call.remaining -= message.count
        assert call.remaining >= 0, "a call was answered twice"
        self.world.progress.work_done()
        self.backoff.reset()
        self.handled += 1

    def _take_rows(self, call: RowsCall, message: Rows) -> None:
        """Receive the values that ``message`` announces into the call's buffer, and learn the owners of its rows."""
        assert call.values is not None
        indices, width = message.indices, call.values.shape[1]
        first, end = int(indices[0]), int(indices[-1]) + 1
        if end - first == indices.size:  # ascending indices without gaps: no copy
            self.mailbox.transport.receive_values(message.sender, call.values[first:end])
        else:
            block = self.mailbox.transport.allocate(4 * indices.size * width)
            values = block.view(np.float32).reshape(indices.size, width)
            self.mailbox.transport.receive_values(message.sender, values)
            torch.from_numpy(call.values).index_copy_(0, torch.from_numpy(indices), torch.from_numpy(values))
        self._requested_bytes -= 4 * indices.size * width
        if message.stamps.size:
            update_stamps(self._cached[message.segment], message.rows, message.stamps)
