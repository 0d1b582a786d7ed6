"""The long simulation of a test run: a process at the lowest priority, next to all other tests.

Most of the other tests start processes and wait for them. The simulation takes what they leave of the processors, which
makes the whole suite minutes shorter. One process of the test run starts it, and any may wait for its result.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from tests.mpi import ROOT

SCHEDULES = int(os.environ.get("SCHEDULES", "20000"))
_LIMIT_S = 1800.0
_PID, _OUTPUT, _STATUS = "simulation.pid", "simulation.txt", "simulation.status"


def start(folder: Path) -> None:
    """Start the simulation, which writes to ``folder``."""
    command = [sys.executable, "-m", "tests.simulator", "--schedules", str(SCHEDULES), "--first", "1000000"]
    status = shlex.quote(str(folder / _STATUS))
    script = f"nice -n 19 {shlex.join(command)} > {shlex.quote(str(folder / _OUTPUT))} 2>&1; echo $? > {status}"
    process = subprocess.Popen(["sh", "-c", script], cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True)
    (folder / _PID).write_text(str(process.pid))


def wait(folder: Path) -> tuple[int, str]:
    """Wait at normal priority until the simulation has ended; return its exit status and output."""
    end, status = time.monotonic() + _LIMIT_S, folder / _STATUS
    while not (folder / _PID).exists() and time.monotonic() < end:  # the process that starts it may be late
        time.sleep(0.1)
    with contextlib.suppress(OSError):  # only root may raise a priority; at this point hardly anything is left to run
        os.setpriority(os.PRIO_PGRP, int((folder / _PID).read_text()), 0)
    while not (status.exists() and status.read_text()):
        assert time.monotonic() < end, "the simulation does not end"
        time.sleep(0.1)
    return int(status.read_text()), (folder / _OUTPUT).read_text()


def stop(folder: Path) -> None:
    """End the simulation, also if the tests were interrupted."""
    if (folder / _PID).exists() and not (folder / _STATUS).exists():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int((folder / _PID).read_text()), 9)
