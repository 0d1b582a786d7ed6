"""The MPI world: ranks, nodes, agreements between ranks, and an end for every job.

Only this module, ``mpi_start`` and the MPI engine of the parameter server import mpi4py. All waiting is done by polling
with short sleeps once a wait gets long: MPI libraries spin in blocking calls, which starves the ranks that compute as
soon as there are more ranks than cores.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np

from lapse_elmo.cores import usable_cores
from lapse_elmo.errors import ConfigError, LaunchError, UserError, say
from lapse_elmo.launcher import below_srun, check_launcher, launcher_rank_and_size
from lapse_elmo.mpi_start import start
from lapse_elmo.mpich import own_shared_files
from lapse_elmo.output import check_output
from lapse_elmo.progress import Progress
from lapse_elmo.signals import INTERRUPTED, USER_ERROR, catch_interrupts, ignore_stop_signals
from lapse_elmo.streams import flush_to_launcher, open_standard_streams, unwritten_output

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")

_SPIN_S = 0.002  # how long a wait spins before it starts to sleep, when every rank has a core of its own
_LONGEST_SLEEP_S = 0.001
_ABORT_S = 10.0  # how long a rank waits for rank 0 to end the job before it does so itself
_LAST_S = 0.5
_ARRIVE_S = 60.0  # how long ranks that leave MPI together wait for each other


class World:
    """All ranks of the job, seen from one of them.

    ``rank``, ``size``: this rank and the number of ranks. ``node``, ``num_nodes``: its node (the ranks that share
    memory with it), numbered by first rank. ``local_rank``, ``local_size``: its place in the node. ``leaders``: the
    first rank of each node. ``host``: name; ``host_rank``, ``host_size``: its place among the ranks of its machine,
    which have ``cores`` cores in all. ``progress``: what this rank is doing, for a watchdog.

    :param nodes: split the ranks of each machine into so many nodes (0: they are one), to try several nodes on one.
    """

    def __init__(self, comm: MPI.Comm | None = None, nodes: int = 0) -> None:
        self.comm = comm
        self.host = socket.gethostname()
        self.rank, self.size = (comm.rank, comm.size) if comm is not None else (0, 1)
        self.node_comm: MPI.Intracomm | None = None
        self.node, self.local_rank, self.local_size = 0, 0, 1
        self.host_rank, self.host_size = 0, 1
        self.leaders = [0]
        self.cores = usable_cores()
        self.progress = Progress()
        self._leaving: list[Callable[[], object]] = []
        if comm is not None:
            from mpi4py import MPI

            host_comm = comm.Split_type(MPI.COMM_TYPE_SHARED, comm.rank)
            assert isinstance(host_comm, MPI.Intracomm)
            self.host_rank, self.host_size = host_comm.rank, host_comm.size
            self.node_comm = host_comm
            self.cores = usable_cores(self._bound_to(host_comm))
            self._find_nodes()
            self.unname_shared_files()
        if nodes > 1:
            self.split(nodes)

    def split(self, nodes: int) -> None:
        """Collective: split the ranks of each machine into ``nodes`` nodes, which do not share memory.

        :raises ConfigError: if a machine has fewer ranks.
        """
        fewest = min(self.allgather(self.host_size))
        if fewest < nodes:
            raise ConfigError(
                f"--nodes {nodes}: a machine's {fewest} ranks cannot be split into so many nodes; start more ranks"
            ).on_every_rank()
        assert self.node_comm is not None
        part = self.node_comm.Split(self.host_rank * nodes // self.host_size, self.rank)
        self.node_comm = cast("MPI.Intracomm", part)
        self._find_nodes()

    def _find_nodes(self) -> None:
        assert self.node_comm is not None
        self.local_rank, self.local_size = self.node_comm.rank, self.node_comm.size
        leader = self.node_bcast(self.rank)
        self.leaders = sorted(set(self.allgather(leader)))
        self.node = self.leaders.index(leader)

    def _bound_to(self, host_comm: MPI.Intracomm) -> set[int]:
        """The cores of this machine's ranks; a launcher may have bound each of them to its own."""
        mine = self._bcast_on(host_comm, self.rank, 0)
        places = self.allgather((mine, os.sched_getaffinity(0)))
        return {core for machine, cores in places if machine == mine for core in cores}

    @property
    def oversubscribed(self) -> bool:
        """Whether the ranks of this machine are more than the cores they have."""
        return self.host_size > self.cores

    @property
    def num_nodes(self) -> int:
        return len(self.leaders)

    def __str__(self) -> str:
        return f"rank {self.rank}/{self.size} {self.host}"

    def wait(self, request: MPI.Request) -> None:
        """Complete a nonblocking operation without keeping a core busy."""
        if not request.Test():
            self.progress.waits()
            start = time.perf_counter()
            sleep_s = 1e-5
            while not request.Test():
                if self.oversubscribed or time.perf_counter() - start > _SPIN_S:
                    time.sleep(sleep_s)
                    sleep_s = min(2 * sleep_s, _LONGEST_SLEEP_S)
        self.progress.made()

    def barrier(self) -> None:
        """Return once every rank has come here."""
        if self.comm is not None:
            self.wait(self.comm.Ibarrier())

    def node_barrier(self) -> None:
        """Return once every rank of this node has come here."""
        if self.node_comm is not None:
            self.wait(self.node_comm.Ibarrier())

    def bcast(self, obj: T, root: int = 0) -> T:
        """Rank ``root``'s ``obj`` (anything that pickles) on every rank."""
        return obj if self.comm is None else self._bcast_on(self.comm, obj, root)

    def node_bcast(self, obj: T) -> T:
        """The ``obj`` of this node's first rank (anything that pickles) on every rank of the node."""
        return obj if self.node_comm is None else self._bcast_on(self.node_comm, obj, 0)

    def _bcast_on(self, comm: MPI.Comm, obj: T, root: int) -> T:
        data = bytearray(pickle.dumps(obj)) if comm.rank == root else bytearray()
        length = np.array([len(data)], np.int64)
        self.wait(comm.Ibcast(length, root))
        if comm.rank != root:
            data = bytearray(int(length[0]))
        self.wait(comm.Ibcast(data, root))
        return obj if comm.rank == root else pickle.loads(data)

    def allgather(self, obj: T) -> list[T]:
        """Every rank's ``obj``, by rank, on every rank."""
        return self._gathered(obj, everywhere=True)

    def gather(self, obj: T) -> list[T]:
        """Every rank's ``obj``, by rank, on rank 0; an empty list on the others."""
        return self._gathered(obj, everywhere=False)

    def _gathered(self, obj: T, *, everywhere: bool) -> list[T]:
        if self.comm is None:
            return [obj]
        from mpi4py import MPI

        data = pickle.dumps(obj)
        lengths = self.gather_numbers(np.array([len(data)]))[:, 0]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        here = everywhere or self.rank == 0
        buffer = bytearray(int(starts[-1]) if here else 0)
        into = [buffer, lengths.tolist(), starts[:-1].tolist(), MPI.BYTE]
        self.wait(self.comm.Iallgatherv(data, into) if everywhere else self.comm.Igatherv(data, into if here else None))
        return [pickle.loads(buffer[a:b]) for a, b in itertools.pairwise(starts)] if here else []

    def gather_numbers(self, numbers: np.ndarray) -> np.ndarray:
        """Every rank's ``numbers`` (k,) as (size, k): one small message, for what is exchanged at each step."""
        out = np.empty((self.size, *numbers.shape), numbers.dtype)
        if self.comm is None:
            out[0] = numbers
        else:
            self.wait(self.comm.Iallgather(np.ascontiguousarray(numbers), out))
        return out

    def sum_(self, array: np.ndarray) -> np.ndarray:
        """Add up the ranks' contiguous arrays in place; every rank gets the same bits."""
        self.start_sum(array)()
        return array

    def start_sum(self, array: np.ndarray) -> Callable[[], None]:
        """Begin :meth:`sum_`; the sum is there, and ``array`` free again, once the result has been called."""
        if self.comm is None:
            return lambda: None
        from mpi4py import MPI

        request = self.comm.Iallreduce(MPI.IN_PLACE, array)
        return lambda: self.wait(request)

    def agree(self, function: Callable[[], T]) -> T:
        """Run ``function`` on rank 0 alone; its result, or its UserError, reaches every rank."""
        result: T | None = None
        error: UserError | None = None
        if self.rank == 0:
            try:
                result = function()
            except UserError as caught:
                error = caught
        result, error = self.bcast((result, error))
        if error is not None:
            raise error.on_every_rank()
        return result  # type: ignore[return-value]

    def together(self, function: Callable[[], T]) -> T:
        """Run ``function`` on every rank; if it raises a UserError on any, the first one is raised on all."""
        result: T | None = None
        error: UserError | None = None
        try:
            result = function()
        except UserError as caught:
            error = caught
        errors = self.allgather((error, str(self)))
        for other, where in errors:
            if other is not None:
                alike = all(str(e) == str(other) for e, _ in errors)
                raised = other if alike else type(other)(f"[{where}] {other}")
                raise raised.on_every_rank()
        return result  # type: ignore[return-value]

    def unname_shared_files(self) -> None:
        """Collective: take the names off the files in /dev/shm through which the node's ranks talk.

        MPICH removes them at the end, but not those of a job that is aborted or killed: they would hold memory until
        the machine starts anew. Every rank has mapped them by now, and a mapping needs no name.
        """
        self.barrier()
        for path in own_shared_files():
            with contextlib.suppress(OSError):  # another rank was faster
                os.unlink(path)

    def abort(self, status: int, *, quietly: bool = False) -> None:
        """End every rank of the job at once; ``quietly`` without the MPI library's line about it."""
        flush_to_launcher()
        if self.comm is not None and self.size > 1:
            if quietly:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            self.comm.Abort(status)
        os._exit(status)

    def require_threads(self, why: str) -> None:
        """Collective: refuse an MPI library that several threads of a rank cannot call at once.

        For the parameter server of several nodes, whose manager threads send and receive. Everything else calls MPI
        from the main thread alone (the threads that write checkpoints and compute never do), so any level will do.

        :raises LaunchError: on every rank.
        """
        from mpi4py import MPI

        def check() -> None:
            level = MPI.Query_thread()
            if level < MPI.THREAD_MULTIPLE:
                names = ("SINGLE", "FUNNELED", "SERIALIZED")
                raise LaunchError(
                    f"{why} needs MPI_THREAD_MULTIPLE, but the MPI library grants MPI_THREAD_{names[level]} only: "
                    "run on one node, or use an MPI library that was built with full thread support"
                )

        self.together(check)

    def on_leave(self, callback: Callable[[], object]) -> Callable[[], None]:
        """Have :meth:`leave` call ``callback`` before MPI ends, to stop threads that use MPI; the result undoes this.

        Callbacks must not communicate. The last one registered is called first.
        """
        self._leaving.append(callback)
        return lambda: self._leaving.remove(callback)

    def leave(self, status: int) -> None:
        """Collective: end the job in order with ``status``, which is not 0.

        Exits one by one would not do: a launcher kills the other ranks at the first bad status and may then report
        their death instead. mpirun reports the status of an abort faithfully. srun reports the highest status, so
        there the other ranks go first, with 0.
        """
        ignore_stop_signals()  # too late for them
        flush_to_launcher()
        if self.size == 1:
            os._exit(status)
        if self.rank and not below_srun():
            time.sleep(_ABORT_S)  # rank 0 ends this
        if below_srun():
            self._finalize(status)
            time.sleep(0 if self.rank else _LAST_S)
            os._exit(0 if self.rank else status)
        self.abort(status, quietly=True)

    def _finalize(self, status: int) -> None:
        """Collective: end MPI, once no rank sends any more; abort with ``status`` if the others do not come here."""
        from mpi4py import MPI

        assert self.comm is not None
        stopper = threading.Thread(target=lambda: [stop() for stop in reversed(self._leaving)], daemon=True)
        stopper.start()
        stopper.join(_ARRIVE_S)
        if stopper.is_alive():  # a thread waits for a rank that has stopped already
            self.abort(status, quietly=True)
        arrived, deadline = self.comm.Ibarrier(), time.monotonic() + _ARRIVE_S
        while not arrived.Test():
            if time.monotonic() > deadline:
                self.abort(status, quietly=True)
            time.sleep(_LONGEST_SLEEP_S)
        MPI.Finalize()


def solo() -> World:
    """A world of this process alone, without MPI."""
    return World(None)


def enter() -> World:
    """Join the MPI world.

    :raises LaunchError: where MPI cannot be used or does not fit the launcher (:func:`lapse_elmo.mpi_start.start`).
    """
    return World(start())


def launch(main: Callable[[list[str], Callable[[], World]], int | None], argv: list[str], prog: str) -> None:
    """Run a program of ``bin/``: ``main(argv, enter)``, which calls ``enter()`` once its options are parsed.

    ``main`` may return an exit status, the same on every rank (signals.py lists them). A UserError becomes one line
    and status 2, anything else a traceback and status 1. An error of one rank ends the whole job; what ends it is an
    abort, since the other ranks may be waiting for this one.
    """
    world: World | None = None

    def enter_once() -> World:
        nonlocal world
        world = enter()
        threading.excepthook = lambda hook: _fail(world, prog, hook.exc_value or RuntimeError("thread failed"))
        return world

    open_standard_streams()
    catch_interrupts()
    if launcher_rank_and_size()[0] and {"-h", "--help"} & set(argv):
        sys.exit(0)  # rank 0 shows it
    try:
        check_launcher()
        status = main(argv, enter_once)
        check_output()
        if status:
            (world or solo()).leave(status)
    except SystemExit as stop:
        if world is None or world.size == 1:
            if problem := unwritten_output():  # of --help
                say(f"{prog}: error: cannot write the standard output: {problem}")
                stop.code = USER_ERROR
            raise
        why = stop.code if isinstance(stop.code, str) else f"sys.exit({stop.code})"
        say(f"{prog}: [{world}] left the job: {why}")
        world.abort(stop.code if isinstance(stop.code, int) and stop.code else 1)
    except BrokenPipeError:  # who read our output has gone, `| head` for instance: as a program killed by SIGPIPE
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        (world or solo()).abort(128 + signal.SIGPIPE)
    except BaseException as error:  # whatever it is, the other ranks must not wait for this one
        _fail(world, prog, error)


def _fail(world: World | None, prog: str, error: BaseException) -> None:
    """Report ``error`` and end the process, and with it the job."""
    rank = world.rank if world else launcher_rank_and_size()[0]
    if isinstance(error, UserError):
        everywhere = error.everywhere or world is None
        if not everywhere or rank == 0:  # else rank 0 says it
            prefix = f"[{world}] " if world and world.size > 1 and not everywhere else ""
            say(f"{prog}: {prefix}error: {error}")
        if everywhere and world is None:
            # Before MPI there is no way to wait for rank 0, and some launchers kill the others at the first bad status.
            time.sleep(1.0 if rank else 0)
            sys.exit(USER_ERROR)
        if everywhere and world is not None:
            world.leave(USER_ERROR)
        status = USER_ERROR
    elif isinstance(error, KeyboardInterrupt):
        status = INTERRUPTED
    else:
        prefix = f"[{world}] " if world and world.size > 1 else ""
        text = "".join(traceback.format_exception(error))
        say("\n".join(prefix + line for line in text.splitlines()))
        status = 1
    (world or solo()).abort(status)
