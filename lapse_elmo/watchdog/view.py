"""What one rank knows of the progress of others, and how ranks of other nodes tell it."""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Sequence

import numpy as np

from lapse_elmo.mpi.host import own_address
from lapse_elmo.mpi.world import World
from lapse_elmo.progress import BEAT, DONE, NUM_FIELDS, PHASE_TYPE, WAITING

_RECORD = np.dtype([("rank", np.int64), ("numbers", np.int64, (NUM_FIELDS,)), ("phase", PHASE_TYPE)])
_AT_ONCE = 12  # records of a datagram, which then needs no fragments
_LARGEST_DATAGRAM = 1 << 16


class View:
    """The latest known progress of each rank, and for how long it has not changed.

    :ivar numbers: (size, NUM_FIELDS), -1 for ranks of which nothing is known. :ivar phases: (size,).
    :ivar idle_s: (size,) seconds without progress. :ivar still_s: (size,) seconds without a sign of life.
    """

    def __init__(self, size: int) -> None:
        self.numbers = np.full((size, NUM_FIELDS), -1, np.int64)
        self.phases = np.zeros(size, PHASE_TYPE)
        self.idle_s, self.still_s = np.zeros(size), np.zeros(size)
        self._before = self.numbers.copy()

    def take(self, ranks: np.ndarray, numbers: np.ndarray, phases: np.ndarray) -> None:
        """Note what ``ranks`` (n,) have told: (n, NUM_FIELDS) and (n,)."""
        self.numbers[ranks], self.phases[ranks] = numbers, phases

    def tick(self, seconds: float) -> None:
        """Let time pass: what has not changed since the last call is older now."""
        for field, age in ((DONE, self.idle_s), (BEAT, self.still_s)):
            same = self.numbers[:, field] == self._before[:, field]
            age[:] = np.where(same, age + seconds, 0.0)
        self._before[:] = self.numbers

    @property
    def waiting(self) -> np.ndarray:
        """(size,) bool: whether a rank waits for others."""
        return self.numbers[:, WAITING] > 0


class Post:
    """Datagrams from every node to the first and the last rank of the job (collective).

    They need no thread support of the MPI library, and pass by ranks that are blocked in it. Lost ones do not matter.
    """

    def __init__(self, world: World, hosts: Sequence[str]) -> None:
        self._collectors = [0, world.size - 1]
        token = secrets.token_bytes(16) if world.rank == 0 else b""
        self._token = world.bcast(token)
        self._inbox: socket.socket | None = None
        place = self._open(hosts) if world.rank in self._collectors else None
        self._places = [world.bcast(place, root) for root in self._collectors]
        self._outbox = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._outbox.setblocking(False)

    def _open(self, hosts: Sequence[str]) -> tuple[str, int] | None:
        address = own_address(hosts)
        inbox = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        inbox.setblocking(False)
        self._inbox = inbox
        try:
            inbox.bind((address or "", 0))
        except OSError:
            return None
        return (address, inbox.getsockname()[1]) if address else None

    def send(self, ranks: np.ndarray, view: View) -> None:
        """Tell the collectors of ``ranks``."""
        records = np.zeros(ranks.size, _RECORD)
        records["rank"], records["numbers"], records["phase"] = ranks, view.numbers[ranks], view.phases[ranks]
        for place in filter(None, self._places):
            for start in range(0, ranks.size, _AT_ONCE):
                with contextlib.suppress(OSError):  # the next one may arrive
                    self._outbox.sendto(self._token + records[start : start + _AT_ONCE].tobytes(), place)

    def receive(self, view: View) -> None:
        """Note what has arrived."""
        if self._inbox is None:
            return
        with contextlib.suppress(OSError):  # nothing more is there
            while True:
                data = self._inbox.recv(_LARGEST_DATAGRAM)
                head, rest = data[: len(self._token)], data[len(self._token) :]
                if head == self._token and len(rest) % _RECORD.itemsize == 0:  # not a stranger's
                    records = np.frombuffer(rest, _RECORD)
                    view.take(records["rank"], records["numbers"], records["phase"])

    def close(self) -> None:
        """Close the sockets."""
        self._outbox.close()
        if self._inbox is not None:
            self._inbox.close()
