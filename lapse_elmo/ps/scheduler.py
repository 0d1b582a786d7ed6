"""The scheduler of a native package and its watchdog, in processes of their own; :func:`main` is their program.

Rank 0 starts it and holds its standard input. It forks into the package's scheduler, which blocks in C++ until every
node has shut down, and a watchdog for the scheduler, for rank 0, and for the start-up. (During start-up, each node
blocks in C++ without a time limit and holds the interpreter's lock, so it cannot watch itself.) Rank 0 sends a letter
for each phase:

==========  ======================================================================================================
``STARTS``  the nodes start: the time limit begins, and the death of the scheduler ends the job
``UP``      every node is up: the time limit ends
``ENDS``    every node is shutting down: the scheduler ends by itself
==========  ======================================================================================================

The end of the input without ``ENDS`` means that rank 0 has died: the watchdog then kills the scheduler.
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
_END_S = 20.0  # time for the scheduler to end once the nodes shut down
_SET_PARENT_DEATH_SIGNAL = 1  # of Linux's prctl


def main(argv: list[str]) -> None:
    """Run scheduler and watchdog for the rank that started this process.

    Args:
        argv: The adapter's module, the number of keys, the time limit of the start in seconds, and the rank's process
            id.
    """
    module, num_keys, start_s, parent = argv[0], int(argv[1]), float(argv[2]), int(argv[3])
    _die_with(parent)
    living, held = os.pipe()  # the scheduler keeps one end open, so the other signals its death
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
    """Watch until the scheduler has ended; return this process's exit status."""
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
                _end_job(parent, "the scheduler of the parameter server has died", signal.SIGTERM)
            return 1
        else:
            # bin/train would only note a SIGTERM, to save what it has trained.
            why = f"not all nodes of the parameter server came up within {start_s:.0f} s of each other"
            _end_job(parent, why, signal.SIGKILL)
            return 1


def _end(scheduler: int, living: int) -> int:
    """Wait for the scheduler to end, and kill it if it does not; return this process's exit status."""
    ready, _, _ = select.select([living], [], [], _END_S)
    if not ready:
        os.kill(scheduler, signal.SIGKILL)
    _, status = os.waitpid(scheduler, 0)
    return 0 if ready and status == 0 else 1


def _end_job(parent: int, why: str, number: signal.Signals) -> None:
    """Print ``why`` and end rank 0, and with it the job, which rank 0 cannot do itself while blocked in C++."""
    log_line(f"lapse-elmo: error: {why}")
    with contextlib.suppress(ProcessLookupError):
        os.kill(parent, number)
