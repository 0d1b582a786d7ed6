"""Nodes and ranks in one process: the simulated platform and world of the embedded engine."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from lapse_elmo import native
from lapse_elmo.progress import Progress
from lapse_elmo.ps.embedded import EmbeddedServer
from lapse_elmo.ps.layout import Segment
from lapse_elmo.ps.manager import Manager
from lapse_elmo.ps.platform import Shapes
from lapse_elmo.ps.rows import SOURCE, NativeRows, Rows
from lapse_elmo.ps.transport import TO_MANAGER, TO_WORKER, Address
from tests.simulator.memory import JobMemory, Memory
from tests.simulator.network import SimTransport, Simulation, Task
from tests.simulator.polls import ManagerPoll, WorkerPoll

T = TypeVar("T")


class SimRows(NativeRows):
    """Rows accessed through rows.c; before each access other tasks may run, as other processes would."""

    def __init__(self, simulation: Simulation, memory: Any, segment: Segment, library: ctypes.CDLL) -> None:
        super().__init__(memory, segment, library)
        self._preempt = simulation.preempt

    def _call(self, name: str, *arguments: np.ndarray | float) -> int:
        self._preempt()
        return super()._call(name, *arguments)


@functools.cache
def _library() -> ctypes.CDLL:
    library = native.load(SOURCE)
    assert library is not None, "the simulator needs a C compiler"
    return library


@dataclass
class Job:
    """State shared by all ranks of a simulated job."""

    simulation: Simulation
    num_nodes: int
    workers_per_node: int
    capacity: int = -1
    memory: JobMemory | None = None
    memories: dict[int, Memory] = field(default_factory=dict)
    library: ctypes.CDLL = field(default_factory=_library)
    _arrived: list[tuple[Task, int, Any]] = field(default_factory=list)
    _gathered: list[Any] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.num_nodes * self.workers_per_node

    def gather(self, rank: int, item: T) -> list[T]:
        """Wait for all ranks; return their items by rank."""
        task = self.simulation.current
        assert task is not None
        self._arrived.append((task, rank, item))
        if len(self._arrived) == self.size:
            arrived, self._arrived = self._arrived, []
            self._gathered = result = [None] * self.size
            for other, of, brought in arrived:
                result[of] = brought
                if other is not task:
                    self.simulation.release(other)
            return result  # type: ignore[return-value]
        self.simulation.block()
        return self._gathered


class SimWorld:
    """One rank's view of the job: the part of :class:`lapse_elmo.mpi.world.World` that the engine uses."""

    comm = None
    oversubscribed = True

    def __init__(self, job: Job, rank: int) -> None:
        self.job, self.rank, self.size = job, rank, job.size
        self.num_nodes, self.local_size = job.num_nodes, job.workers_per_node
        self.node, self.local_rank = divmod(rank, job.workers_per_node)
        self.leaders = [node * job.workers_per_node for node in range(job.num_nodes)]
        self.host_size = self.local_size
        self.progress = Progress()

    def barrier(self) -> None:
        self.job.gather(self.rank, None)

    def allgather(self, item: T) -> list[T]:
        return self.job.gather(self.rank, item)

    def together(self, function: Callable[[], T]) -> T:
        result = function()
        self.barrier()
        return result

    def sum_(self, array: np.ndarray) -> np.ndarray:
        np.add.reduce(self.job.gather(self.rank, array.copy()), 0, out=array)
        return array


class SimPlatform:
    """The :class:`~lapse_elmo.ps.platform.Platform` of one rank."""

    def __init__(self, world: SimWorld, slowness: float) -> None:
        self._world, self._job = world, world.job
        self._slowness = slowness
        self._manager: Task | None = None

    def memory(self, shapes: Shapes) -> Memory:
        job, node = self._job, self._world.node
        if job.memory is None:
            job.memory = JobMemory(job.num_nodes, shapes)
        if node not in job.memories:
            job.memories[node] = job.memory.of(node, job.capacity)
        return job.memories[node]

    def rows(self, memory: Any, segment: Segment) -> Rows:
        return SimRows(self._job.simulation, memory, segment, self._job.library)

    def transport(self, tag: int, *, low_latency: bool) -> SimTransport:
        return SimTransport(self._job.simulation, self._world.rank, tag)

    def start(self, serve: Callable[[], None], name: str, halt: Callable[[], None]) -> None:
        manager = serve.__self__  # type: ignore[attr-defined]
        assert isinstance(manager, Manager)
        simulation, polled = self._job.simulation, self._job.memories[self._world.node].polled
        inbox = simulation.inboxes[Address(self._world.rank, TO_MANAGER)]
        self._manager = Task(name, serve, self._slowness, poll=ManagerPoll(simulation, inbox, polled, manager))
        simulation.add(self._manager)

    def opened(self, server: EmbeddedServer) -> None:
        """Know the polls of the worker that has opened ``server``."""
        task, polled = self._job.simulation.current, self._job.memories[self._world.node].polled
        assert task is not None
        inbox = self._job.simulation.inboxes[Address(self._world.rank, TO_WORKER)]
        task.poll = WorkerPoll(inbox, polled, server._requests.backoff)

    def join(self) -> None:
        manager = self._manager
        if manager is not None:
            self._job.simulation.sleep_until(lambda: manager.let is None, 1e-4)

    def close(self) -> None:
        self._job.memories.pop(self._world.node, None)
