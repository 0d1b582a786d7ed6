"""What one thread of a rank, worker or manager, sends and receives: messages merged into transmissions."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from lapse_elmo.ps.messages import HolderPush, Message, Pull, Push, Set, SetDone
from lapse_elmo.ps.ring import Ring
from lapse_elmo.ps.transport import TO_WORKER, Address, Transport
from lapse_elmo.ps.wire import read

_MERGED_BYTES = 1 << 16  # messages below this size wait for the next flush, to be sent together
_URGENT = (Pull, Push, HolderPush, Set, SetDone)  # a worker waits for them


class Mailbox:
    """One end of the engine's network.

    Small messages to one receiver are merged until :meth:`flush`; messages between two ends keep their order.

    :param rings: of the workers whose messages to this manager come through shared memory.
    """

    def __init__(self, transport: Transport, rings: Sequence[Ring] = ()) -> None:
        self.transport = transport
        self._rings = rings
        self._next_ring = 0
        self._outbox: dict[Address, list[np.ndarray]] = {}
        self._urgent: set[Address] = set()  # receivers that should not wait
        self._inbox: deque[Message] = deque()
        self.sent = 0  # messages
        self.transmissions = 0
        self.sent_bytes = 0

    def send(self, to: Address, message: Message) -> None:
        """Send ``message`` at the next flush, or at once if it is large; it must not be changed any more."""
        self.sent += 1
        if message.block.size < _MERGED_BYTES:
            self._outbox.setdefault(to, []).append(message.block)
            if to.tag == TO_WORKER or isinstance(message, _URGENT):
                self._urgent.add(to)
            return
        self._flush_to(to)
        self._transmit(to, message.block)

    def send_values(self, rank: int, values: np.ndarray) -> None:
        """Send values to the worker of ``rank``, after all messages to it."""
        self._flush_to(Address(rank, TO_WORKER))
        self.transport.send_values(rank, values)
        self.sent_bytes += values.nbytes

    def flush(self, urgent_only: bool = False) -> None:
        """Begin to send what was kept back: all of it, or what a worker waits for and all before it."""
        for to in list(self._urgent if urgent_only else self._outbox):
            self._flush_to(to)
        self._urgent.clear()

    def receive(self) -> Message | None:
        """Return the next message, or None. Messages of one sender come in the order of sending."""
        if self._inbox:
            return self._inbox.popleft()
        for _ in range(len(self._rings)):  # workers take turns
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
        """Send what was kept back for ``to`` together, in transmissions of bounded size."""
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
