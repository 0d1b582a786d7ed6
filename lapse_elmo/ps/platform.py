"""The embedded engine's access to the machine: shared memory, a network, and a thread for the node's manager.

The simulator of tests/simulator is a second implementation, which controls the order of all events.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from lapse_elmo import native
from lapse_elmo.mpi.node_memory import NodeMemory
from lapse_elmo.mpi.world import World
from lapse_elmo.ps.layout import Segment
from lapse_elmo.ps.locked_rows import open_rows
from lapse_elmo.ps.mpi_transport import MpiTransport
from lapse_elmo.ps.node_state import Memory
from lapse_elmo.ps.rows import SOURCE, Rows
from lapse_elmo.ps.transport import Transport

if TYPE_CHECKING:
    from mpi4py import MPI

_PR_SET_TIMERSLACK = 29
Shapes = dict[str, tuple[tuple[int, ...], Any]]


class Platform(Protocol):
    """The machine as seen by one rank. ``memory``, ``transport`` and ``close`` are collective."""

    def memory(self, shapes: Shapes) -> Memory:
        """Return arrays of the given shapes, all zero, shared by the node's ranks."""

    def rows(self, memory: Memory, segment: Segment) -> Rows:
        """Return an accessor of the rows of ``segment`` for use by one thread."""

    def transport(self, tag: int, *, low_latency: bool) -> Transport:
        """Return this rank's end of the network for blocks with ``tag``; ``low_latency`` shortens its waits."""

    def start(self, serve: Callable[[], None], name: str, halt: Callable[[], None]) -> None:
        """Run ``serve`` concurrently with this rank's worker; call ``halt`` if the rank exits before ``join``."""

    def join(self) -> None:
        """Block until ``serve`` has returned."""

    def close(self) -> None:
        """Free the shared memory and the network."""


class MpiPlatform:
    """The platform of a real job: MPI, shared memory, and a thread per manager (construction is collective)."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._memory: NodeMemory | None = None
        self._thread: threading.Thread | None = None
        self._comm: MPI.Comm | None = None
        if world.comm is not None and world.num_nodes > 1:
            world.require_threads("a parameter server of several nodes")
            self._comm = world.comm.Dup()
        self.is_native = all(world.allgather(native.load(SOURCE) is not None))

    def memory(self, shapes: Shapes) -> Memory:
        """Return shared memory with the given arrays."""
        self._memory = NodeMemory(self._world, shapes)
        return self._memory

    def rows(self, memory: Memory, segment: Segment) -> Rows:
        """Return an accessor through rows.c or, if any rank of the job lacks it, under kernel locks."""
        assert isinstance(memory, NodeMemory)
        return open_rows(memory, segment, self.is_native)

    def transport(self, tag: int, *, low_latency: bool) -> Transport:
        """Return an end on the server's own communicator."""
        assert self._comm is not None
        return MpiTransport(self._comm, tag, spin=not self._world.oversubscribed, low_latency=low_latency)

    def start(self, serve: Callable[[], None], name: str, halt: Callable[[], None]) -> None:
        """Run ``serve`` in a thread."""

        def run() -> None:
            ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0)  # ns; the default adds 50 us to a sleep
            serve()

        # An exception in the thread ends the job, through threading.excepthook.
        self._thread = threading.Thread(target=run, name=name, daemon=True)
        self._thread.start()
        self._forget_halt = self._world.on_leave(halt)

    def join(self) -> None:
        """Join the thread, if there is one."""
        if self._thread is not None:
            self._thread.join()
            self._forget_halt()
            self._thread = None

    def close(self) -> None:
        """Free the communicator and the shared memory (collective)."""
        if self._comm is not None:
            self._comm.Free()
        if self._memory is not None:
            self._memory.close()
