"""The engine's messages over MPI. Nothing here waits inside MPI: every operation is begun, and then tested.

A receive is begun when its message has been matched, and handed out once it is complete and everything that its sender
sent before it has been handed out. So a large message, whose data comes only when the sender enters MPI again, holds up
its own sender alone. (Where MPICH may not read the other process's memory, every message above some tens of KB is one.)
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from lapse_elmo.ps.transport import TO_WORKER, VALUES, Address, Backoff, BlockPool

if TYPE_CHECKING:
    from mpi4py import MPI

_TESTED_AT_ONCE = 64  # sends that one call tests, so that a poll stays cheap however many are under way
_MOST_INCOMING_BYTES = 1 << 26  # of receives under way; what exceeds it waits in MPI, and so at its sender


class MpiTransport:
    """A :class:`~lapse_elmo.ps.transport.Transport` for one thread of a rank.

    :param comm: a communicator for the server's messages alone.
    :param tag: of the blocks that are for this end.
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
        self._release_sent()
        self._track(self._comm.Isend([block, self._mpi.BYTE], to.rank, to.tag), block, to)

    def send_values(self, rank: int, values: np.ndarray) -> None:
        self._release_sent()
        self._track(self._comm.Isend([values, self._mpi.FLOAT], rank, VALUES), values, Address(rank, TO_WORKER))

    def receive_values(self, rank: int, values: np.ndarray) -> None:
        request = self._comm.Irecv([values, self._mpi.FLOAT], rank, VALUES)
        self._backoff.reset()
        while not request.Test():
            self._backoff.wait()

    def receive(self) -> np.ndarray | None:
        self._release_sent()
        while self._incoming_bytes < _MOST_INCOMING_BYTES:
            found = self._comm.Improbe(self._mpi.ANY_SOURCE, self._tag, self._status)
            if found is None:
                break
            block = self._blocks.allocate(self._status.Get_count(self._mpi.BYTE))
            request = found.Irecv([block, self._mpi.BYTE])
            source = self._status.Get_source()
            if source not in self._incoming and request.Test():
                return block
            self._incoming.setdefault(source, deque()).append((request, block))
            self._incoming_bytes += block.size
        for source, waiting in self._incoming.items():
            request, block = waiting[0]
            if request.Test():
                waiting.popleft()
                del self._incoming[source]  # and put back at the end: senders take turns
                if waiting:
                    self._incoming[source] = waiting
                self._incoming_bytes -= block.size
                return block
        return None

    def outgoing_bytes(self, to: Address | None = None) -> int:
        self._release_sent()
        return self._outgoing_bytes if to is None else self._outgoing.get(to, 0)

    def allocate(self, size: int) -> np.ndarray:
        return self._blocks.allocate(size)

    def now(self) -> float:
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def finish(self) -> None:
        self._backoff.reset()
        while self._sends:
            self._release_sent()
            self._backoff.wait()

    def _track(self, request: MPI.Request, array: np.ndarray, to: Address) -> None:
        self._sends.append((request, array, to))
        self._outgoing[to] = self._outgoing.get(to, 0) + array.nbytes
        self._outgoing_bytes += array.nbytes

    def _release_sent(self) -> None:
        """Drop completed sends, so that their memory can be used again."""
        for _ in range(min(len(self._sends), _TESTED_AT_ONCE)):
            request, array, to = self._sends.popleft()
            if not request.Test():
                self._sends.append((request, array, to))
                continue
            self._outgoing_bytes -= array.nbytes
            self._outgoing[to] -= array.nbytes
            if not self._outgoing[to]:
                del self._outgoing[to]
