"""The network interface of the embedded engine, its polling back-off, and its message memory.

The engine runs unchanged on two implementations of :class:`Transport`: MPI (:mod:`lapse_elmo.ps.mpi_transport`) and the
simulated network of tests/simulator, where a seed determines every order and delay.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
from typing import NamedTuple, Protocol

import numpy as np

from lapse_elmo.ps.wire import CHUNK_BYTES

TO_MANAGER, TO_WORKER, VALUES = 1, 2, 3  # tags

_SPIN_S = 2e-4  # how long a wait polls without sleeping, if every rank has a core
_SHORTEST_SLEEP_S = 2e-5
# The next sleep as a share of the time waited so far, and its upper bound in seconds. Low latency costs a rank 7 % of
# its speed in polling; in return, rows that several nodes relocate to themselves in turn arrive in a third of the time.
# Where ranks share cores, an idle manager must not take the time of those that compute: with 16 managers on 2 cores,
# polling every 4 ms took a quarter of it.
_NORMAL, _LOW_LATENCY, _CROWDED = (1 / 8, 4e-3), (1 / 32, 1e-3), (1 / 8, 32e-3)
_SMALLEST_KEPT, _LARGEST_KEPT, _MOST_KEPT = 1 << 16, CHUNK_BYTES + (1 << 16), 32  # bytes, bytes, blocks
_UNUSED = 3  # references to a free block: the list's, the loop variable's and getrefcount's argument


class Address(NamedTuple):
    """A receiver: a rank, and its manager or its worker (``TO_MANAGER``, ``TO_WORKER``)."""

    rank: int
    tag: int


class Transport(Protocol):
    """The network as seen by one worker or one manager.

    Blocks and values each arrive in the order of sending per pair of ends. Only ``receive_values``, ``sleep`` and
    ``finish`` block.
    """

    def send(self, to: Address, block: np.ndarray) -> None:
        """Start sending ``block`` (n,) uint8, which must not be changed from now on; the transport keeps it alive."""

    def receive(self) -> np.ndarray | None:
        """Return the next block that has arrived completely, or None."""

    def send_values(self, rank: int, values: np.ndarray) -> None:
        """Start sending ``values`` (n, width) float32 to the worker of ``rank``; as :meth:`send`."""

    def receive_values(self, rank: int, values: np.ndarray) -> None:
        """Receive the next values of the manager of ``rank`` into ``values`` (n, width); block until they are here."""

    def outgoing_bytes(self, to: Address | None = None) -> int:
        """Return the bytes not sent yet, in total or to one receiver; values count for the worker that gets them."""

    def allocate(self, size: int) -> np.ndarray:
        """Return uninitialised memory (size,) uint8 for a message; it is reused once nothing refers to it."""

    def now(self) -> float:
        """Return the seconds of a monotonic clock."""

    def sleep(self, seconds: float) -> None:
        """Sleep for about ``seconds``; 0 yields the processor once."""

    def finish(self) -> None:
        """Block until everything is sent."""


class Backoff:
    """Polling back-off: spin, then sleep for intervals that grow with the time waited.

    Args:
        transport: Provides the clock and sleeps.
        spin: Whether this thread has a core to spin on.
        low_latency: Whether to sleep for shorter intervals; only with ``spin``.
    """

    def __init__(self, transport: Transport, spin: bool, low_latency: bool = False) -> None:
        self._transport = transport
        self._spin_s = _SPIN_S if spin else 0.0
        self._share, self._longest_s = (_LOW_LATENCY if low_latency else _NORMAL) if spin else _CROWDED
        self.reset()

    def reset(self, spin: bool = True) -> None:
        """Start over after progress: the next wait spins or, without ``spin``, sleeps for the shortest interval."""
        self._start = self._transport.now() - (0.0 if spin else self._spin_s)

    def wait(self) -> None:
        """Spin or sleep once."""
        waited_s = self._transport.now() - self._start
        if waited_s < self._spin_s:
            self._transport.sleep(0)  # yields the interpreter's lock to the rank's other thread
            return
        self._transport.sleep(min(max(self._share * waited_s, _SHORTEST_SLEEP_S), self._longest_s))


class BlockPool:
    """Reused memory for messages, since fresh memory costs more than filling it. For one thread.

    A block is free when only this pool refers to it: a view of a block, such as a message's array, keeps it in use. The
    first free block is taken, so that few blocks are touched.
    """

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, _MOST_KEPT * _LARGEST_KEPT, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # fewer pages for MPI to register, where the kernel allows it
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._blocks: list[np.ndarray] = []

    def allocate(self, size: int) -> np.ndarray:
        """Return a block (size,) uint8; very small, large or exceeding ones are not from the pool."""
        if size < _SMALLEST_KEPT or size > _LARGEST_KEPT:
            return np.empty(size, np.uint8)
        for block in self._blocks:
            if sys.getrefcount(block) == _UNUSED:
                return block[:size]
        if len(self._blocks) == _MOST_KEPT:
            return np.empty(size, np.uint8)
        block = np.frombuffer(self._map, np.uint8, _LARGEST_KEPT, len(self._blocks) * _LARGEST_KEPT)
        self._blocks.append(block)
        return block[:size]
