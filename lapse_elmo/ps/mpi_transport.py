"""The engine's messages over MPI. No call blocks inside MPI: every operation is non-blocking and then tested.

A receive is started when its message has been matched, and handed out once it is complete and all earlier messages of
its sender have been handed out. So a rendezvous message, whose data arrives only when the sender enters MPI again,
delays only messages of the same sender. (Without cross-memory attach, MPICH uses rendezvous from some tens of KB on.)
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from lapse_elmo.ps.transport import TO_WORKER, VALUES, Address, Backoff, BlockPool

if TYPE_CHECKING:
    from mpi4py import MPI

_TESTED_AT_ONCE = 64  # sends tested per call, so that a poll stays cheap however many are in progress
_MOST_INCOMING_BYTES = 1 << 26  # of receives in progress; further messages stay unmatched, which throttles senders


class MpiTransport:
    """A :class:`~lapse_elmo.ps.transport.Transport` for one thread of a rank.

    Args:
        comm: A communicator used for the server's messages only.
        tag: The MPI tag of the blocks for this end, ``TO_MANAGER`` or ``TO_WORKER``.
        spin: Whether waits may spin, see :class:`~lapse_elmo.ps.transport.Backoff`.
        low_latency: Whether waits sleep for shorter intervals.
    """

    def __init__(self, comm: MPI.Comm, tag: int, *, spin: bool, low_latency: bool) -> None:
        from mpi4py import MPI

        self._mpi, self._comm, self._tag = MPI, comm, tag
        self._blocks = BlockPool()
        self._status = MPI.Status()
        self._sends: deque[tuple[MPI.Request, np.ndarray, Address]] = deque()
        self._outgoing: dict[Address, int] = {}
        self._outgoing_bytes = 0
        self._incoming: dict[int, deque[tuple[MPI.Request, np.ndarray]]] = {}  # by sender, in the order of sending
        self._incoming_bytes = 0
        self._backoff = Backoff(self, spin, low_latency)

    def send(self, to: Address, block: np.ndarray) -> None:
        """Start sending a block."""
        self._release_sent()
        self._track(self._comm.Isend([block, self._mpi.BYTE], to.rank, to.tag), block, to)

    def send_values(self, rank: int, values: np.ndarray) -> None:
        """Start sending values to a worker."""
        self._release_sent()
        self._track(self._comm.Isend([values, self._mpi.FLOAT], rank, VALUES), values, Address(rank, TO_WORKER))

    def receive_values(self, rank: int, values: np.ndarray) -> None:
        """Receive values into a buffer, polling by the backoff."""
        request = self._comm.Irecv([values, self._mpi.FLOAT], rank, VALUES)
        self._backoff.reset()
        while not request.Test():
            self._backoff.wait()

    def receive(self) -> np.ndarray | None:
        """Return the next complete block, or None; also starts receives and frees completed sends."""
        self._release_sent()
        # A matched probe: no other thread of this rank can take the message between the probe and the receive.
        while self._incoming_bytes < _MOST_INCOMING_BYTES:
            found = self._comm.Improbe(self._mpi.ANY_SOURCE, self._tag, self._status)
            if found is None:
                break
            block = self._blocks.allocate(self._status.Get_count(self._mpi.BYTE))
            request = found.Irecv([block, self._mpi.BYTE])
            # The usual case, a small message that is here already, and no earlier one of its sender is incomplete.
            source = self._status.Get_source()
            if source not in self._incoming and request.Test():
                return block
            self._incoming.setdefault(source, deque()).append((request, block))
            self._incoming_bytes += block.size
        for source, waiting in self._incoming.items():
            request, block = waiting[0]
            if request.Test():
                waiting.popleft()
                del self._incoming[source]  # re-inserted at the end below, so that no sender starves the others
                if waiting:
                    self._incoming[source] = waiting
                self._incoming_bytes -= block.size
                return block
        return None

    def outgoing_bytes(self, to: Address | None = None) -> int:
        """Return the bytes of sends not completed, in total or to one receiver."""
        self._release_sent()
        return self._outgoing_bytes if to is None else self._outgoing.get(to, 0)

    def allocate(self, size: int) -> np.ndarray:
        """Return memory for a message from the pool."""
        return self._blocks.allocate(size)

    def now(self) -> float:
        """Return the seconds of a monotonic clock."""
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        """Sleep without holding the interpreter's lock."""
        time.sleep(seconds)

    def finish(self) -> None:
        """Block until all sends are completed."""
        self._backoff.reset()
        while self._sends:
            self._release_sent()
            self._backoff.wait()

    def _track(self, request: MPI.Request, array: np.ndarray, to: Address) -> None:
        """Keep ``array`` alive until its send is completed, and count its bytes until then."""
        self._sends.append((request, array, to))
        self._outgoing[to] = self._outgoing.get(to, 0) + array.nbytes
        self._outgoing_bytes += array.nbytes

    def _release_sent(self) -> None:
        """Drop completed sends, so that their memory can be reused."""
        for _ in range(min(len(self._sends), _TESTED_AT_ONCE)):
            request, array, to = self._sends.popleft()
            if not request.Test():
                self._sends.append((request, array, to))
                continue
            self._outgoing_bytes -= array.nbytes
            self._outgoing[to] -= array.nbytes
            if not self._outgoing[to]:
                del self._outgoing[to]
