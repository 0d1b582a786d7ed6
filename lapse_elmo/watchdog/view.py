"""Track the progress of all ranks, and exchange it between nodes."""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from collections.abc import Sequence

import numpy as np

from lapse_elmo.mpi.host import own_address
from lapse_elmo.mpi.world import World
from lapse_elmo.progress import BEAT, DONE, NUM_FIELDS, PHASE_TYPE, WAITING

_RECORD = np.dtype([("rank", np.int64), ("numbers", np.int64, (NUM_FIELDS,)), ("phase", PHASE_TYPE)])
_RECORDS_PER_DATAGRAM = 12  # so that a datagram fits an Ethernet frame
_MAX_DATAGRAM_BYTES = 1 << 16
_BUFFER_BYTES = 1 << 22  # for datagrams not received yet; where the kernel allows less, it gives that


class View:
    """The latest known progress of each rank, and for how long it has not changed.

    Attributes:
        numbers: (size, NUM_FIELDS) int64, see :mod:`lapse_elmo.progress`; -1 for ranks that have never reported.
        phases: (size,) PHASE_TYPE, what each rank is doing.
        idle_s: (size,) seconds without progress.
        silent_s: (size,) seconds without a heartbeat.
    """

    def __init__(self, size: int) -> None:
        self.numbers = np.full((size, NUM_FIELDS), -1, np.int64)
        self.phases = np.zeros(size, PHASE_TYPE)
        self.idle_s, self.silent_s = np.zeros(size), np.zeros(size)
        self._previous = self.numbers.copy()

    def take(self, ranks: np.ndarray, numbers: np.ndarray, phases: np.ndarray) -> None:
        """Store what ``ranks`` (n,) have reported: ``numbers`` (n, NUM_FIELDS) and ``phases`` (n,)."""
        self.numbers[ranks], self.phases[ranks] = numbers, phases

    def tick(self, seconds: float) -> None:
        """Advance time: what has not changed since the last call is older by ``seconds``."""
        for field, age in ((DONE, self.idle_s), (BEAT, self.silent_s)):
            same = self.numbers[:, field] == self._previous[:, field]
            age[:] = np.where(same, age + seconds, 0.0)
        self._previous[:] = self.numbers

    @property
    def waiting(self) -> np.ndarray:
        """Which ranks wait for others, (size,) bool."""
        return self.numbers[:, WAITING] > 0


class ProgressChannel:
    """Sends progress by UDP from every node to the collectors, the first and the last rank of the job (collective).

    UDP needs no thread support of the MPI library, and works while ranks are blocked in MPI. Lost datagrams do no harm,
    since the next one has newer numbers.
    """

    def __init__(self, world: World, hosts: Sequence[str]) -> None:
        self._collectors = [0, world.size - 1]
        token = secrets.token_bytes(16) if world.rank == 0 else b""  # marks datagrams of this job
        self._token = world.bcast(token)
        self._receiver: socket.socket | None = None
        address = self._open(hosts) if world.rank in self._collectors else None
        self._addresses = [world.bcast(address, root) for root in self._collectors]
        self._sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sender.setblocking(False)
        #: The hosts of collectors without an address that other hosts reach.
        self.unreachable = sorted(
            {hosts[rank] for rank, known in zip(self._collectors, self._addresses, strict=True) if known is None}
        )

    def _open(self, hosts: Sequence[str]) -> tuple[str, int] | None:
        """Open the receiving socket of a collector; returns its address, or None if there is none."""
        address = own_address(hosts)
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        self._receiver = receiver
        try:
            receiver.bind((address or "", 0))
        except OSError:
            return None
        return (address, receiver.getsockname()[1]) if address else None

    def send(self, ranks: np.ndarray, view: View) -> None:
        """Send the progress of ``ranks`` to the collectors."""
        records = np.zeros(ranks.size, _RECORD)
        records["rank"], records["numbers"], records["phase"] = ranks, view.numbers[ranks], view.phases[ranks]
        for address in filter(None, self._addresses):
            for start in range(0, ranks.size, _RECORDS_PER_DATAGRAM):
                with contextlib.suppress(OSError):  # a later one may arrive
                    self._sender.sendto(self._token + records[start : start + _RECORDS_PER_DATAGRAM].tobytes(), address)

    @property
    def receives(self) -> bool:
        """Whether this rank is a collector."""
        return self._receiver is not None

    def receive(self, view: View, seconds: float) -> None:
        """Store what arrives within ``seconds`` in ``view``; with 0, what has arrived.

        As it arrives: by default the kernel keeps some 90 datagrams, which 30 nodes of 32 ranks send in a tick. It
        would drop the rest, at each tick those of the same nodes.
        """
        if self._receiver is None:
            return
        end = time.monotonic() + seconds
        with contextlib.suppress(OSError):  # no more datagrams
            while True:
                self._receiver.settimeout(max(end - time.monotonic(), 0.0))
                data = self._receiver.recv(_MAX_DATAGRAM_BYTES)
                head, rest = data[: len(self._token)], data[len(self._token) :]
                if head == self._token and len(rest) % _RECORD.itemsize == 0:  # else of another program
                    records = np.frombuffer(rest, _RECORD)
                    view.take(records["rank"], records["numbers"], records["phase"])

    def close(self) -> None:
        """Close the sockets."""
        self._sender.close()
        if self._receiver is not None:
            self._receiver.close()
