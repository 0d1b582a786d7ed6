"""End a job in which a rank hangs: a thread of each rank detects it, reports which rank hangs, and ends the job.

If a rank makes no progress (it was stopped, waits for a file system, or loops), soon all others wait for it, in MPI or
for the parameter server. Each rank counts the units of work that it completes (:mod:`lapse_elmo.progress`) in memory
shared by its node. The first live rank of each node sends the counts in datagrams to the two collectors, the first and
the last rank of the job. Once no rank has made progress for the limit, the first live collector reports which ranks
are silent and where the others wait. The cost is a few integers per rank, and few datagrams per node and tick.

Time counts only while the thread runs, so a machine or job that was suspended as a whole is not mistaken for a hang.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from types import TracebackType

import numpy as np

from lapse_elmo.errors import log_line
from lapse_elmo.mpi.exit import abort
from lapse_elmo.mpi.launcher import launcher_rank_and_size
from lapse_elmo.mpi.node_memory import NodeMemory
from lapse_elmo.mpi.signals import STALLED
from lapse_elmo.mpi.world import World
from lapse_elmo.progress import BEAT, NUM_FIELDS, PHASE_TYPE, Progress
from lapse_elmo.watchdog.report import describe, own_stacks, stack_lines
from lapse_elmo.watchdog.view import ProgressChannel, View

REPORT_FILE_VARIABLE = "LAPSE_ELMO_STALLS"  # environment variable: file to append reports to, besides stderr
_REPORT_TIMEOUT_S = 3.0  # for each of these two
_TICKS_PER_LIMIT = 20  # checks per limit of time
_MIN_TICK_S, _MAX_TICK_S = 0.1, 2.0
_RECEIVE_S = 0.1  # for which a collector receives, before it looks whether watching has ended
_SILENT_TICKS, _SILENT_FRACTION = 4, 0.25  # ticks, and fraction of the limit, without a heartbeat: the rank is silent
_ABORT_GRACE_S = 1.0  # for other nodes to print their reports
_ABORT_TIMEOUT_S = 15.0  # for the MPI library to end the job
_STACK_BYTES = 16_384
_STAGGER_S = 0.5  # before MPI has started, each rank waits this much longer than the previous one to report
_MAX_STAGGER_S = 10.0


class Watchdog:
    """A context manager that ends the job with status ``STALLED`` once no rank has made progress for a time limit.

    Until :meth:`join` it watches the start of MPI, which returns only once all ranks have called it.
    """

    def __init__(self, minutes: float, prog: str) -> None:
        """Prepare to watch.

        Args:
            minutes: The limit of time without progress; 0 turns the watchdog off.
            prog: The program's name, printed in front of a report.
        """
        self._limit_s = 60 * minutes
        self._prog = prog
        self._tick_s = min(max(self._limit_s / _TICKS_PER_LIMIT, _MIN_TICK_S), _MAX_TICK_S)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._group: _Group | None = None
        self._start_s = 0.0

    def __enter__(self) -> Watchdog:
        if self._limit_s:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop watching. After an error the job is about to end, which has its own time limits."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._group is not None:
            self._group.close()

    def join(self, world: World) -> None:
        """Watch all ranks of ``world`` (collective).

        Raises:
            ConfigError: A node's shared memory is full.
        """
        if self._limit_s:
            self._group = _Group(world, self._limit_s, self._tick_s, self._prog)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._over():
            now = time.monotonic()
            # A longer interval means that this process was suspended; it must not count as time of a hang.
            seconds, last = min(now - last, 2 * self._tick_s), now
            if self._group is not None:
                self._group.check(seconds)
            else:
                self._start_s += seconds
                self._check_start()

    def _over(self) -> bool:
        """Wait for a tick, in which a collector receives; return whether watching has ended."""
        if self._group is None or not self._group.receives:
            return self._ended.wait(self._tick_s)
        end = time.monotonic() + self._tick_s
        while not self._ended.is_set() and (left := end - time.monotonic()) > 0:
            self._group.receive(min(left, _RECEIVE_S))
        return self._ended.is_set()

    def _check_start(self) -> None:
        """End the job if MPI has not started within the limit."""
        rank, size = launcher_rank_and_size()
        if self._start_s < self._limit_s + min(_STAGGER_S * rank, _MAX_STAGGER_S):
            return
        head = (
            f"{self._prog}: [rank {rank}/{size} {socket.gethostname()}] error: MPI has not started on all {size} "
            f"ranks within {self._limit_s / 60:.4g} minutes (--stall-minutes): look for a host that is slow or cannot "
            f"be reached; the job ends with status {STALLED}"
        )
        text = "\n".join([head, *stack_lines([rank], [own_stacks()])])
        _report(text)
        os._exit(STALLED)  # the launcher ends the other ranks


def _report(text: str) -> None:
    """Write ``text`` to stderr and to the file that the environment names; each may take a few seconds, and then fails.

    What hangs may be the launcher, which reads stderr, or the file's file system.
    """
    for write in (log_line, _append):
        thread = threading.Thread(target=write, args=(text,), daemon=True)
        thread.start()
        thread.join(_REPORT_TIMEOUT_S)


def _append(text: str) -> None:
    path = os.environ.get(REPORT_FILE_VARIABLE)
    if not path:
        return
    with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
        file.write(f"{text}\n")


class _Group:
    """Watches the ranks of this node and, on the two collectors, all ranks of the job (collective)."""

    def __init__(self, world: World, limit_s: float, tick_s: float, prog: str) -> None:
        self._world, self._limit_s, self._tick_s, self._prog = world, limit_s, tick_s, prog
        locations = world.allgather((world.host, world.node))
        self._hosts = [host for host, _ in locations]
        self._ranks = np.array([rank for rank, (_, node) in enumerate(locations) if node == world.node])  # of this node
        self._here = np.array([rank for rank, host in enumerate(self._hosts) if host == world.host])
        local = world.local_size
        self._memory = NodeMemory(world, {
            "progress": ((local, NUM_FIELDS), np.int64), "phases": ((local,), PHASE_TYPE),
            "stacks": ((local,), np.dtype(f"S{_STACK_BYTES}")), "ending": ((1,), np.int64),
        })
        world.together(self._reserve)
        self._arrays = dict(self._memory.arrays)
        self._view = View(world.size)
        self._ending_s = 0.0  # how long another rank of the node has been ending the job
        self._channel = ProgressChannel(world, self._hosts) if world.num_nodes > 1 else None
        if world.rank == 0 and self._channel is not None and self._channel.unreachable:
            log_line(
                f"{prog}: warning: no address is known at which other hosts reach "
                f"{' and '.join(self._channel.unreachable)}: a job that hangs ends all the same, but its report lacks "
                "these nodes; add the hosts' names and addresses to /etc/hosts or to the name server"
            )
        mine = slice(world.local_rank, world.local_rank + 1)
        world.progress.move_to(self._arrays["progress"][world.local_rank], self._arrays["phases"][mine])
        world.barrier()

    def _reserve(self) -> None:
        if self._world.local_rank == 0:
            for name, array in self._memory.arrays.items():
                self._memory.reserve(name, 0, len(array))

    def close(self) -> None:
        """Release the shared memory and close the sockets."""
        private = Progress()
        self._world.progress.move_to(private.numbers, private.phase)
        if self._channel is not None:
            self._channel.close()
        self._arrays.clear()
        self._memory.close()

    @property
    def receives(self) -> bool:
        """Whether other nodes send their progress to this rank."""
        return self._channel is not None and self._channel.receives

    def receive(self, seconds: float) -> None:
        """Store what other nodes send within ``seconds``."""
        if self._channel is not None:
            self._channel.receive(self._view, seconds)

    def check(self, seconds: float) -> None:
        """Update the progress of all ranks, and end the job if none has made any for too long.

        Args:
            seconds: Time since the last call.
        """
        view, rank = self._view, self._world.rank
        self.receive(0.0)
        self._beat()
        view.tick(seconds)
        silent = view.silent_s > max(_SILENT_TICKS * self._tick_s, _SILENT_FRACTION * self._limit_s)
        first = rank == self._ranks[~silent[self._ranks]].min(initial=rank)
        if self._channel is not None and first:
            self._channel.send(self._ranks, view)
        idle_s = view.idle_s[self._ranks].min()
        # Each rank stores its own stacks well before the limit, for the rank of the node that will report them.
        if idle_s > self._limit_s / 2:
            self._arrays["stacks"][self._world.local_rank] = own_stacks()[:_STACK_BYTES]
        if self._arrays["ending"][0]:
            self._ending_s += seconds
        if idle_s < self._limit_s or 0 < self._ending_s < _ABORT_TIMEOUT_S:
            return  # in the second case another rank of the node is ending the job; take over if it does not succeed
        if self._channel is None:
            is_collector = first
        else:
            is_collector = rank == 0 or (rank == self._world.size - 1 and bool(silent[0]))
        cause_is_here = bool((silent | ~view.waiting)[self._ranks].any())
        if is_collector and view.idle_s.min() >= self._limit_s:
            self._end_job(silent, np.ones(self._world.size, bool))
        elif first and (cause_is_here or idle_s > 2 * self._limit_s):  # twice the limit: both collectors are gone
            self._end_job(silent, np.isin(np.arange(self._world.size), self._ranks))

    def _beat(self) -> None:
        """Count a heartbeat of this rank, and read the progress of the node's ranks.

        Heartbeats come from the watchdog's thread. They tell a rank that waits or computes from one that is stopped.
        """
        self._arrays["progress"][self._world.local_rank, BEAT] += 1
        self._view.take(self._ranks, self._arrays["progress"].copy(), self._arrays["phases"].copy())

    def _keep_beating(self, seconds: float) -> None:
        """Wait, with heartbeats."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._beat()
            if self._channel is not None:
                self._channel.send(self._ranks, self._view)
            time.sleep(self._tick_s)

    def _end_job(self, silent: np.ndarray, known: np.ndarray) -> None:
        """Report on the ``known`` ranks, and end the job.

        Args:
            silent: (size,) bool, ranks without a heartbeat.
            known: (size,) bool, ranks to report on.
        """
        self._arrays["ending"][0] = 1
        alive = [rank for rank in self._ranks if not silent[rank]]
        stacks = dict(zip(self._ranks.tolist(), self._arrays["stacks"].tolist(), strict=True))
        whose = "no rank" if known.all() else f"no rank of node {self._world.node}"
        lines = [
            f"{self._prog}: [{self._world}] error: {whose} has made progress for {self._limit_s / 60:.4g} minutes "
            f"(--stall-minutes): the job ends with status {STALLED}; the last checkpoint is kept",
            *describe(self._view, silent, known, self._hosts, self._here),
            *stack_lines(alive, [stacks[rank] for rank in alive]),
        ]
        _report("\n".join(lines))
        if self._channel is not None:
            self._keep_beating(_ABORT_GRACE_S + _SILENT_TICKS * self._tick_s)  # let other nodes report, too
        killer = threading.Timer(_ABORT_TIMEOUT_S, os._exit, [STALLED])  # the MPI library may be what hangs
        killer.daemon = True
        killer.start()
        abort(self._world, STALLED, quietly=True)
