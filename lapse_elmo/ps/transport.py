"""What the embedded engine needs of the world outside: sending, receiving, the time, and waiting.

The engine runs unchanged on two implementations: MPI (:mod:`lapse_elmo.ps.mpi_transport`) and the simulated network of
tests/simulator, which controls every order and delay by a seed.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
from typing import NamedTuple, Protocol

import numpy as np

from lapse_elmo.ps.wire import CHUNK_BYTES

TO_MANAGER, TO_WORKER, VALUES = 1, 2, 3  # tags

_SPIN_S = 2e-4  # how long a wait polls without a break, where every rank has a core
_SHORTEST_SLEEP_S = 2e-5
# The next sleep as a share of the time waited so far, and its upper bound in seconds. Low latency costs a rank 7 % of
# its speed in polling; in return, rows that several nodes relocate to themselves in turn arrive in a third of the time.
_NORMAL, _LOW_LATENCY = (1 / 8, 4e-3), (1 / 32, 1e-3)
_SMALLEST_KEPT, _LARGEST_KEPT, _MOST_KEPT = 1 << 16, CHUNK_BYTES + (1 << 16), 32  # bytes, bytes, blocks
_UNUSED = 3  # references to a kept block: the list's, the loop's and the argument's


class Address(NamedTuple):
    """One receiver: a rank, and whether its manager or its worker (`TO_MANAGER`, `TO_WORKER`)."""

    rank: int
    tag: int


class Transport(Protocol):
    """The network as one worker or one manager sees it. No call but `receive_values` and `sleep` waits."""

    def send(self, to: Address, block: np.ndarray) -> None:
        """Begin to send ``block`` (n,) uint8, which must not change any more. Blocks to one end keep their order."""

    def receive(self) -> np.ndarray | None:
        """Return the next block that has arrived completely, or None."""

    def send_values(self, rank: int, values: np.ndarray) -> None:
        """Begin to send ``values`` (n, width) float32 to the worker of ``rank``; they must not change any more."""

    def receive_values(self, rank: int, values: np.ndarray) -> None:
        """Wait for the next values that the manager of ``rank`` sends here, and receive them into ``values``."""

    def outgoing_bytes(self, to: Address | None = None) -> int:
        """Return how many bytes have not left yet, in all or to one end (values count as what its worker is sent)."""

    def allocate(self, size: int) -> np.ndarray:
        """Return memory (size,) uint8 for a message."""

    def now(self) -> float:
        """Return seconds of a clock that never goes back."""

    def sleep(self, seconds: float) -> None:
        """Let others run for about ``seconds``; 0 gives the processor away once."""

    def finish(self) -> None:
        """Wait until everything has left."""


class Backoff:
    """Polling: first without a break, then with sleeps that grow with the time waited.

    :param spin: whether there is a core for polling without a break.
    :param low_latency: whether to sleep less; of effect only with ``spin``.
    """

    def __init__(self, transport: Transport, spin: bool, low_latency: bool = False) -> None:
        self._transport = transport
        self._spin_s = _SPIN_S if spin else 0.0
        self._share, self._longest_s = _LOW_LATENCY if spin and low_latency else _NORMAL
        self.reset()

    def reset(self, spin: bool = True) -> None:
        """Start anew after progress: the next wait is short; without ``spin`` it is at least the shortest sleep."""
        self._start = self._transport.now() - (0.0 if spin else self._spin_s)

    def wait(self) -> None:
        """Let others run for a while."""
        waited_s = self._transport.now() - self._start
        if waited_s < self._spin_s:
            self._transport.sleep(0)  # gives the interpreter's lock to the rank's other thread
            return
        self._transport.sleep(min(max(self._share * waited_s, _SHORTEST_SLEEP_S), self._longest_s))


class BlockPool:
    """Memory for messages that is used again, since new memory costs more than filling it. For one thread.

    A block is free again when nothing but this list refers to it. The first free one is taken, so that few stay in use.
    """

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, _MOST_KEPT * _LARGEST_KEPT, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # where the machine allows it, MPI then looks up fewer pages
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._blocks: list[np.ndarray] = []

    def allocate(self, size: int) -> np.ndarray:
        """Return a block of ``size`` bytes."""
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
