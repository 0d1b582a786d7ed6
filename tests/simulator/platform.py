"""Nodes and ranks in one process: the simulated platform and world of the embedded engine."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from lapse_elmo import native
from lapse_elmo.errors import ConfigError
from lapse_elmo.progress import Progress
from lapse_elmo.ps.layout import Segment
from lapse_elmo.ps.rows import SOURCE, NativeRows, Rows
from tests.simulator.network import SimTransport, Simulation, Task

T = TypeVar("T")


@dataclass
class Memory:
    """The arrays of one node. ``capacity`` limits the elements that may be reserved in total, unless negative."""

    arrays: dict[str, np.ndarray]
    capacity: int = -1

    def reserve(self, name: str, first: int, end: int) -> None:
        if self.capacity >= 0:
            self.capacity -= end - first
            if self.capacity < 0:
                raise ConfigError(f"no room for {name}")


class SimRows(NativeRows):
    """Rows accessed through rows.c; before each access other tasks may run, as other processes would."""

    def __init__(self, simulation: Simulation, memory: Any, segment: Segment, library: ctypes.CDLL) -> None:
        super().__init__(memory, segment, library)
        self._simulation = simulation

    def _call(self, name: str, *arguments: np.ndarray | float) -> int:
        self._simulation.preempt()
        return super()._call(name, *arguments)


@dataclass
class Job:
    """State shared by all ranks of a simulated job."""

    simulation: Simulation
    num_nodes: int
    workers_per_node: int
    capacity: int = -1
    memories: dict[int, Memory] = field(default_factory=dict)
    library: ctypes.CDLL = field(init=False)
    _arrived: list[tuple[Task, Any]] = field(default_factory=list)
    _gathered: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        library = native.load(SOURCE)
        assert library is not None, "the simulator needs a C compiler"
        self.library = library

    @property
    def size(self) -> int:
        return self.num_nodes * self.workers_per_node

    def gather(self, rank: int, item: T) -> list[T]:
        """Wait for all ranks; return their items by rank."""
        task = self.simulation.current
        assert task is not None
        self._arrived.append((task, (rank, item)))
        if len(self._arrived) == self.size:
            arrived, self._arrived = self._arrived, []
            self._gathered = [item for _, item in sorted((pair for _, pair in arrived), key=lambda pair: pair[0])]
            result = self._gathered
            for other, _ in arrived:
                if other is not task:
                    self.simulation.release(other)
            return result
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
        array[:] = np.sum(self.job.gather(self.rank, array.copy()), 0)
        return array


class SimPlatform:
    """The :class:`~lapse_elmo.ps.platform.Platform` of one rank."""

    def __init__(self, world: SimWorld, slowness: float) -> None:
        self._world, self._job = world, world.job
        self._slowness = slowness
        self._manager: Task | None = None

    def memory(self, shapes: dict[str, tuple[tuple[int, ...], Any]]) -> Memory:
        job, node = self._job, self._world.node
        if node not in job.memories:
            arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
            job.memories[node] = Memory(arrays, job.capacity)
        return job.memories[node]

    def rows(self, memory: Any, segment: Segment) -> Rows:
        return SimRows(self._job.simulation, memory, segment, self._job.library)

    def transport(self, tag: int, *, low_latency: bool) -> SimTransport:
        return SimTransport(self._job.simulation, self._world.rank, tag)

    def start(self, serve: Callable[[], None], name: str, halt: Callable[[], None]) -> None:
        self._manager = Task(name, serve, self._slowness)
        self._job.simulation.add(self._manager)

    def join(self) -> None:
        while self._manager is not None and self._manager.let is not None:
            self._job.simulation.sleep(1e-4)

    def close(self) -> None:
        self._job.memories.pop(self._world.node, None)
