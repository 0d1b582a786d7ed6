"""The world: all ranks of the job, and the nodes they form."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from lapse_elmo.errors import ConfigError, LaunchError
from lapse_elmo.mpi.collectives import Collectives
from lapse_elmo.mpi.host import usable_cores

if TYPE_CHECKING:
    from mpi4py import MPI


class World(Collectives):
    """All ranks of the job, seen from one of them, and what they can do together.

    Attributes:
        node: Number of this rank's node. A node is a set of ranks that share memory; nodes are ordered by first rank.
        local_rank: This rank's position in its node.
        local_size: The number of ranks in its node.
        leaders: The first rank of each node.
        host: Name of this machine, with ``#1``, ``#2``... at its end if several machines have the same name.
        host_rank: This rank's position among the ranks of its machine.
        host_size: The number of ranks on its machine.
        cores: CPU cores that the ranks of this machine may use, in all.
        exit_callbacks: Called, last one first, before MPI ends (:meth:`on_leave`).

    Args:
        comm: All ranks; None for a process without MPI.
    """

    def __init__(self, comm: MPI.Comm | None = None) -> None:
        super().__init__(comm)
        self.host = socket.gethostname()
        self.node, self.local_rank, self.local_size = 0, 0, 1
        self.host_rank, self.host_size = 0, 1
        self.leaders = [0]
        self.cores = usable_cores()
        self.exit_callbacks: list[Callable[[], object]] = []
        if comm is not None:
            from mpi4py import MPI

            host_comm = comm.Split_type(MPI.COMM_TYPE_SHARED, comm.rank)
            assert isinstance(host_comm, MPI.Intracomm)
            self.host_rank, self.host_size = host_comm.rank, host_comm.size
            self.node_comm = host_comm
            self._look_at_machines(host_comm)
            self.oversubscribed = self.host_size > self.cores
            self._find_nodes()
            self._unlink_shared_files()

    def split(self, nodes: int) -> None:
        """Split the ranks of each machine into ``nodes`` nodes that do not share memory (collective).

        Raises:
            ConfigError: If a machine has fewer ranks.
        """
        fewest = min(self.allgather(self.host_size))
        if fewest < nodes:
            raise ConfigError(
                f"--nodes {nodes}: a machine with {fewest} ranks cannot be split into {nodes} nodes; start more ranks"
            ).on_every_rank()
        assert self.node_comm is not None
        part = self.node_comm.Split(self.host_rank * nodes // self.host_size, self.rank)
        self.node_comm = cast("MPI.Intracomm", part)
        self._find_nodes()

    def across_nodes(self, per_node: int) -> Collectives | None:
        """Return the ranks of all nodes that have this rank's position in their node (collective).

        Args:
            per_node: Include only the first ``per_node`` ranks of each node.

        Returns:
            Their collective calls; None if this rank does not take part, or there is only one node.
        """
        if self.num_nodes == 1:
            return None
        assert self.comm is not None
        from mpi4py import MPI

        takes_part = self.local_rank < per_node
        comm = self.comm.Split(self.local_rank if takes_part else MPI.UNDEFINED, self.rank)
        if not takes_part:
            return None
        across = Collectives(comm)
        across.oversubscribed, across.progress = self.oversubscribed, self.progress
        return across

    def _find_nodes(self) -> None:
        assert self.node_comm is not None
        self.local_rank, self.local_size = self.node_comm.rank, self.node_comm.size
        leader = self.node_bcast(self.rank)
        self.leaders = sorted(set(self.allgather(leader)))
        self.node = self.leaders.index(leader)

    def _look_at_machines(self, host_comm: MPI.Intracomm) -> None:
        """Count the cores of all ranks of this machine, and give it a name that no other machine has."""
        mine = self._bcast_on(host_comm, self.rank, 0)  # the machine's first rank stands for it
        # A launcher may have bound each rank to cores of its own.
        ranks = self.allgather((mine, self.host, os.sched_getaffinity(0)))
        self.cores = usable_cores({core for machine, _, cores in ranks if machine == mine for core in cores})
        alike = sorted({machine for machine, name, _ in ranks if name == self.host})
        if len(alike) > 1:
            self.host += f"#{alike.index(mine) + 1}"

    def _unlink_shared_files(self) -> None:
        """Unlink the files in /dev/shm through which MPICH connects the ranks of a node (collective).

        MPICH removes them when it ends, but not those of a job that is aborted or killed: they would hold memory until
        the machine is restarted. Every rank has mapped them after the barrier, and a mapping needs no name.
        """
        self.barrier()
        for path in mapped_mpich_files():
            with contextlib.suppress(OSError):  # another rank was faster
                os.unlink(path)

    @property
    def num_nodes(self) -> int:
        """The number of nodes."""
        return len(self.leaders)

    def __str__(self) -> str:
        return f"rank {self.rank}/{self.size} {self.host}"

    def require_threads(self, why: str) -> None:
        """Refuse an MPI library that several threads of a rank cannot call at the same time (collective).

        The parameter server needs this on several nodes, where its manager threads send and receive. Everything else
        calls MPI from the main thread alone (not from the threads that write checkpoints or compute), so any level
        of thread support will do.

        Raises:
            LaunchError: On every rank; the message begins with ``why``.
        """
        from mpi4py import MPI

        def check() -> None:
            level = MPI.Query_thread()
            if level < MPI.THREAD_MULTIPLE:
                names = ("SINGLE", "FUNNELED", "SERIALIZED")
                raise LaunchError(
                    f"{why} needs MPI_THREAD_MULTIPLE, but the MPI library only provides MPI_THREAD_{names[level]}: "
                    "run on one node, or use an MPI library that was built with full thread support"
                )

        self.together(check)

    def on_leave(self, callback: Callable[[], object]) -> Callable[[], None]:
        """Have ``callback`` called before MPI ends (:func:`lapse_elmo.mpi.exit.leave`), to stop threads that use MPI.

        Callbacks must not communicate. The last one registered is called first.

        Returns:
            A function that unregisters ``callback``.
        """
        self.exit_callbacks.append(callback)
        return lambda: self.exit_callbacks.remove(callback)


def solo() -> World:
    """Return a world of this process alone, without MPI."""
    return World(None)


def mapped_mpich_files() -> set[str]:
    """Return the paths of MPICH's files in /dev/shm that this process has mapped."""
    with open("/proc/self/maps", encoding="ascii", errors="replace") as file:
        paths = {line.split(None, 5)[5].rstrip("\n") for line in file if "/dev/shm/mpich_shm_" in line}
    return {path for path in paths if not path.endswith("(deleted)")}
