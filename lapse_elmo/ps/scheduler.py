"""The scheduler of a native package, as a process of its own, which runs :func:`main`.

Rank 0 starts it and holds its standard input. It becomes two: the package's scheduler, which blocks in C++ until every
node has shut down, and a watch over it, over rank 0 and over the start-up, during which each node blocks in C++ as
well, without a limit and with Python's lock in its hands. Rank 0 sends a letter at each turn:

==========  ======================================================================================================
``STARTS``  the nodes begin to start: from now on their time runs, and the scheduler's death ends the job
``UP``      every node is up: no time limit any more
``ENDS``    every node is shutting down: the scheduler ends by itself
==========  ======================================================================================================

Without ``ENDS``, the end of the input means that rank 0 has died: the scheduler dies with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import select
import signal
import sys
import time

from lapse_elmo.errors import log_line

STARTS, UP, ENDS = b"s", b"u", b"e"
_END_S = 20.0  # for the scheduler to end once the nodes shut down
_SET_PARENT_DEATH_SIGNAL = 1  # of Linux's prctl


def main(argv: list[str]) -> None:
    """``MODULE NUM_KEYS START_S PARENT``: of the adapter ``MODULE``, for the rank whose process is PARENT."""
    module, num_keys, start_s, parent = argv[0], int(argv[1]), float(argv[2]), int(argv[3])
    _die_with(parent)
    living, held = os.pipe()  # the scheduler holds the one end: the other shows its death
    watch, scheduler = os.getpid(), os.fork()
    if scheduler == 0:
        _die_with(watch)
        os.close(living)
        devnull = os.open(os.devnull, os.O_RDWR)
        os.dup2(devnull, 0)
        os.dup2(devnull, 1)  # the package's progress lines
        importlib.import_module(module).run_scheduler(num_keys)
        os._exit(0)
    os.close(held)
    sys.exit(_watch(scheduler, living, start_s, parent))


def _die_with(parent: int) -> None:
    """Have this process killed when ``parent`` dies."""
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _watch(scheduler: int, living: int, start_s: float, parent: int) -> int:
    """Until the scheduler has ended; this process's status."""
    deadline: float | None = None
    phase = b""
    while True:
        left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        ready, _, _ = select.select([0, living], [], [], left)
        if 0 in ready:
            before, phase = phase, os.read(0, 1)
            if not phase:
                os.kill(scheduler, signal.SIGKILL)
                return 1
            if phase == STARTS:
                deadline = time.monotonic() + start_s
            elif phase == UP:
                deadline = None
            elif phase == ENDS:
                return _end(scheduler, living)
            phase = phase or before
        elif living in ready:
            if phase:
                _end_job(parent, "the scheduler of the parameter server has died")
            return 1
        else:
            _end_job(parent, f"not all nodes of the parameter server came up within {start_s:.0f} s of each other")
            return 1


def _end(scheduler: int, living: int) -> int:
    """Wait for the scheduler, which is about to end; kill it if it does not."""
    ready, _, _ = select.select([living], [], [], _END_S)
    if not ready:
        os.kill(scheduler, signal.SIGKILL)
    _, status = os.waitpid(scheduler, 0)
    return 0 if ready and status == 0 else 1


def _end_job(parent: int, why: str) -> None:
    """Say ``why`` and end rank 0, and with it the job: it cannot do so itself while it is blocked in C++."""
    log_line(f"lapse-elmo: error: {why}")
    with contextlib.suppress(ProcessLookupError):
        os.kill(parent, signal.SIGTERM)
