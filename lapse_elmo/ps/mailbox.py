"""The messages that one thread of a rank, worker or manager, sends and receives, merged into few transmissions."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from lapse_elmo.ps.messages import HolderPush, Message, Pull, Push, Set, SetDone
from lapse_elmo.ps.ring import Ring
from lapse_elmo.ps.transport import TO_WORKER, Address, Transport
from lapse_elmo.ps.wire import read

_MERGED_BYTES = 1 << 16  # messages below this size wait for the next flush and are sent together
_URGENT = (Pull, Push, HolderPush, Set, SetDone)  # a worker is waiting for the answer


class Mailbox:
    """One end of the engine's network.

    Small messages to a receiver are collected until :meth:`flush`. Messages between two ends keep their order.

    Args:
        transport: The network.
        rings: For a manager, the rings of its node's workers.
    """

    def __init__(self, transport: Transport, rings: Sequence[Ring] = ()) -> None:
        self.transport = transport
        self._rings = rings
        self._next_ring = 0
        self._outbox: dict[Address, list[np.ndarray]] = {}
        self._urgent: set[Address] = set()  # receivers with an urgent message in the outbox
        self._inbox: deque[Message] = deque()
        self.sent = 0  # messages
        self.transmissions = 0
        self.sent_bytes = 0

    def send(self, to: Address, message: Message) -> None:
        """Send ``message`` at the next flush, or at once if it is large. It must not be changed from now on."""
        self.sent += 1
        if message.block.size < _MERGED_BYTES:
            self._outbox.setdefault(to, []).append(message.block)
            if to.tag == TO_WORKER or isinstance(message, _URGENT):
                self._urgent.add(to)
            return
        self._flush_to(to)
        self._transmit(to, message.block)

    def send_values(self, rank: int, values: np.ndarray) -> None:
        """Send values (n, width) to the worker of ``rank``, after all messages to it; they must not be changed."""
        self._flush_to(Address(rank, TO_WORKER))
        self.transport.send_values(rank, values)
        self.sent_bytes += values.nbytes

    def flush(self, urgent_only: bool = False) -> None:
        """Start sending the collected messages: all, or those to receivers of urgent ones, in their order."""
        for to in list(self._urgent if urgent_only else self._outbox):
            self._flush_to(to)
        self._urgent.clear()

    def receive(self) -> Message | None:
        """Return the next message, or None. Messages of one sender arrive in the order of sending."""
        if self._inbox:
            return self._inbox.popleft()
        for _ in range(len(self._rings)):  # round robin, so that no worker starves the others
            self._next_ring = (self._next_ring + 1) % len(self._rings)
            block = self._rings[self._next_ring].read()
            if block is not None:
                return next(read(block))
        block = self.transport.receive()
        if block is None:
            return None
        self._inbox.extend(read(block))
        return self._inbox.popleft()

    def _flush_to(self, to: Address) -> None:
        """Send the messages collected for ``to``, in transmissions of bounded size."""
        together: list[np.ndarray] = []
        size = 0
        for block in self._outbox.pop(to, ()):
            if size + block.size > 4 * _MERGED_BYTES:
                self._transmit(to, np.concatenate(together))
                together, size = [], 0
            together.append(block)
            size += block.size
        if together:
            self._transmit(to, together[0] if len(together) == 1 else np.concatenate(together))

    def _transmit(self, to: Address, block: np.ndarray) -> None:
        self.transport.send(to, block)
        self.transmissions += 1
        self.sent_bytes += block.size
