"""The end of a job in which a rank hangs: a thread of each rank notices it, says who is silent, and ends the job.

A rank that makes no progress (it is stopped, its file system is away, it loops) soon has all others wait for it, in
MPI or for the parameter server. Each rank counts the pieces of work that it does (:mod:`lapse_elmo.progress`) in memory
that its node shares; the first living rank of a node tells the first and the last rank of the job by datagrams. Where
no rank has made progress for the limit, the first living one of these two says which ranks are silent and where the
others wait. So it costs each rank a few numbers, and a node one datagram in a while to each of the two.

A machine or job that was suspended as a whole is not taken for a rank that hangs: time counts only while the thread
runs.
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
from lapse_elmo.mpi.signals import STALLED
from lapse_elmo.mpi.world import World
from lapse_elmo.progress import BEAT, NUM_FIELDS, PHASE_TYPE, Progress
from lapse_elmo.ps.memory import NodeMemory
from lapse_elmo.watchdog.report import describe, stack_lines, stacks_of_this_process
from lapse_elmo.watchdog.view import Post, View

NOTES = "LAPSE_ELMO_STALLS"  # names a file for the report of a stall, in addition to stderr
_NOTE_S = 3.0  # its file system may be what hangs
_TICKS = 20  # in the limit
_SHORTEST_TICK_S, _LONGEST_TICK_S = 0.1, 2.0
_STILL_TICKS, _STILL_SHARE = 4, 0.25  # without a sign of life, and of the limit: a rank is silent, not only slow
_GRACE_S = 1.0  # for what other nodes have to say
_ABORT_S = 15.0  # for the MPI library to end the job
_STACK_BYTES = 16_384
_ALONE_S = 0.5  # by which each further rank waits longer before it says that MPI does not start
_MOST_ALONE_S = 10.0


class Watchdog:
    """Ends the job with status ``STALLED`` once no rank has made progress for ``minutes``; 0 turns it off.

    A context. Until :meth:`join` it watches the start of MPI, which returns only once all ranks have come to it.

    :param prog: the name of the program, in front of what is printed.
    """

    def __init__(self, minutes: float, prog: str) -> None:
        self._limit_s = 60 * minutes
        self._prog = prog
        self._tick_s = min(max(self._limit_s / _TICKS, _SHORTEST_TICK_S), _LONGEST_TICK_S)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._group: _Group | None = None
        self._alone_s = 0.0

    def __enter__(self) -> Watchdog:
        if self._limit_s:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop watching; after an error the job is about to be ended, which has time limits of its own."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._group is not None:
            self._group.close()

    def join(self, world: World) -> None:
        """Collective: watch all ranks of ``world``.

        :raises ConfigError: if a node has no room in its shared memory.
        """
        if self._limit_s:
            self._group = _Group(world, self._limit_s, self._tick_s, self._prog)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(self._tick_s):
            now = time.monotonic()
            seconds, last = min(now - last, 2 * self._tick_s), now
            if self._group is not None:
                self._group.look(seconds)
            else:
                self._alone_s += seconds
                self._look_alone()

    def _look_alone(self) -> None:
        rank, size = launcher_rank_and_size()
        if self._alone_s < self._limit_s + min(_ALONE_S * rank, _MOST_ALONE_S):
            return
        head = (
            f"{self._prog}: [rank {rank}/{size} {socket.gethostname()}] error: the {size} ranks have not come together "
            f"in {self._limit_s / 60:.4g} minutes (--stall-minutes): one of them does not start; look for a host that "
            f"is slow or away; the job ends with status {STALLED}"
        )
        text = "\n".join([head, *stack_lines([rank], [stacks_of_this_process()])])
        log_line(text)
        _leave_note(text)
        os._exit(STALLED)  # the launcher ends the other ranks


def _leave_note(text: str) -> None:
    """Append ``text`` to the file that the environment names, if it can be written in a few seconds."""
    path = os.environ.get(NOTES)
    if path:
        thread = threading.Thread(target=_append, args=(path, text), daemon=True)
        thread.start()
        thread.join(_NOTE_S)


def _append(path: str, text: str) -> None:
    with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
        file.write(f"{text}\n")


class _Group:
    """The ranks of a node, and on the first and the last rank of the job all ranks (collective)."""

    def __init__(self, world: World, limit_s: float, tick_s: float, prog: str) -> None:
        self._world, self._limit_s, self._tick_s, self._prog = world, limit_s, tick_s, prog
        places = world.allgather((world.host, world.node))
        self._hosts = [host for host, _ in places]
        self._ranks = np.array([rank for rank, (_, node) in enumerate(places) if node == world.node])
        self._here = np.array([rank for rank, host in enumerate(self._hosts) if host == world.host])
        local = world.local_size
        self._memory = NodeMemory(world, {
            "progress": ((local, NUM_FIELDS), np.int64), "phases": ((local,), PHASE_TYPE),
            "stacks": ((local,), np.dtype(f"S{_STACK_BYTES}")), "ending": ((1,), np.int64),
        })
        world.together(self._reserve)
        self._arrays = dict(self._memory.arrays)
        self._view = View(world.size)
        self._ending_s = 0.0  # for which another rank of the node has been ending the job
        self._post = Post(world, self._hosts) if world.num_nodes > 1 else None
        mine = slice(world.local_rank, world.local_rank + 1)
        world.progress.move_to(self._arrays["progress"][world.local_rank], self._arrays["phases"][mine])
        world.barrier()

    def _reserve(self) -> None:
        if self._world.local_rank == 0:
            for name, array in self._memory.arrays.items():
                self._memory.reserve(name, 0, len(array))

    def close(self) -> None:
        """Give the memory back."""
        private = Progress()
        self._world.progress.move_to(private.numbers, private.phase)
        if self._post is not None:
            self._post.close()
        self._arrays.clear()
        self._memory.close()

    def look(self, seconds: float) -> None:
        """Note how far all ranks are; end the job if none has come further for too long. ``seconds`` have passed."""
        view, rank = self._view, self._world.rank
        if self._post is not None:
            self._post.receive(view)
        self._beat()
        view.tick(seconds)
        silent = view.still_s > max(_STILL_TICKS * self._tick_s, _STILL_SHARE * self._limit_s)
        first = rank == self._ranks[~silent[self._ranks]].min(initial=rank)
        if self._post is not None and first:
            self._post.send(self._ranks, view)
        idle_s = view.idle_s[self._ranks].min()
        if idle_s > self._limit_s / 2:
            self._arrays["stacks"][self._world.local_rank] = stacks_of_this_process()[:_STACK_BYTES]
        if self._arrays["ending"][0]:
            self._ending_s += seconds
        if idle_s < self._limit_s or 0 < self._ending_s < _ABORT_S:
            return
        if self._post is None:
            collects = first
        else:
            collects = rank == 0 or (rank == self._world.size - 1 and bool(silent[0]))
        guilty = bool((silent | ~view.waiting)[self._ranks].any())
        if collects and view.idle_s.min() >= self._limit_s:
            self._end(silent, np.ones(self._world.size, bool))
        elif first and (guilty or idle_s > 2 * self._limit_s):  # where the two that collect are gone, too
            self._end(silent, np.isin(np.arange(self._world.size), self._ranks))

    def _beat(self) -> None:
        """Give a sign of life, and note how far the node's ranks are."""
        self._arrays["progress"][self._world.local_rank, BEAT] += 1
        self._view.take(self._ranks, self._arrays["progress"].copy(), self._arrays["phases"].copy())

    def _stay(self, seconds: float) -> None:
        """Let time pass, with signs of life."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._beat()
            if self._post is not None:
                self._post.send(self._ranks, self._view)
            time.sleep(self._tick_s)

    def _end(self, silent: np.ndarray, known: np.ndarray) -> None:
        """Say what is known of the ``known`` ranks, and end the job."""
        self._arrays["ending"][0] = 1
        alive = [rank for rank in self._ranks if not silent[rank]]
        stacks = dict(zip(self._ranks.tolist(), self._arrays["stacks"].tolist(), strict=True))
        whose = "no rank" if known.all() else f"no rank of node {self._world.node}"
        lines = [
            f"{self._prog}: [{self._world}] error: {whose} has made progress for {self._limit_s / 60:.4g} minutes "
            f"(--stall-minutes): the job ends with status {STALLED}, the last checkpoint stays",
            *describe(self._view, silent, known, self._hosts, self._here),
            *stack_lines(alive, [stacks[rank] for rank in alive]),
        ]
        log_line("\n".join(lines))
        _leave_note("\n".join(lines))
        if self._post is not None:
            self._stay(_GRACE_S + _STILL_TICKS * self._tick_s)  # another node may know more
        killer = threading.Timer(_ABORT_S, os._exit, [STALLED])  # the MPI library may be what hangs
        killer.daemon = True
        killer.start()
        abort(self._world, STALLED, quietly=True)
