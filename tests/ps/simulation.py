"""The long simulation of a test run: processes at the lowest priority, next to all other tests.

Most of the other tests start processes and wait for them. The simulation takes what they leave of the processors, which
makes the whole suite minutes shorter. One process of the test run starts it, and any may wait for its result.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from tests.mpi import ROOT

SCHEDULES = int(os.environ.get("SCHEDULES", "5000"))
_FIRST = 1_000_000  # the seed of the first schedule
_PROCESSES = 2  # one a core, for when the other tests have ended
_LIMIT_S = 1800.0
_STARTED = "simulation.pids"


def start(folder: Path) -> None:
    """Start the simulation, which writes to ``folder``."""
    bounds = [SCHEDULES * part // _PROCESSES for part in range(_PROCESSES + 1)]
    pids = []
    for part, (first, end) in enumerate(itertools.pairwise(bounds)):
        seeds = ["--schedules", str(end - first), "--first", str(_FIRST + first)]
        command = shlex.join([sys.executable, "-m", "tests.simulator", *seeds])
        output, status = (shlex.quote(str(path)) for path in _files(folder, part))
        script = f"nice -n 19 {command} > {output} 2>&1; echo $? > {status}"
        process = subprocess.Popen(["sh", "-c", script], cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True)
        pids.append(process.pid)
    (folder / f"{_STARTED}.new").write_text(json.dumps(pids))
    (folder / f"{_STARTED}.new").rename(folder / _STARTED)


def wait(folder: Path) -> tuple[int, str]:
    """Wait at normal priority until the simulation has ended; return the highest exit status and the output."""
    end = time.monotonic() + _LIMIT_S
    while not (folder / _STARTED).exists() and time.monotonic() < end:  # the process that starts it may be late
        time.sleep(0.1)
    for pid in json.loads((folder / _STARTED).read_text()):
        with contextlib.suppress(OSError):  # only root may raise a priority; hardly anything else is left to run now
            os.setpriority(os.PRIO_PGRP, pid, 0)
    outputs, statuses = zip(*(_files(folder, part) for part in range(_PROCESSES)), strict=True)
    while not all(status.exists() and status.read_text() for status in statuses):
        assert time.monotonic() < end, "the simulation does not end"
        time.sleep(0.1)
    return max(int(status.read_text()) for status in statuses), "".join(output.read_text() for output in outputs)


def stop(folder: Path) -> None:
    """End the simulation, also if the tests were interrupted."""
    pids = json.loads((folder / _STARTED).read_text()) if (folder / _STARTED).exists() else []
    for part, pid in enumerate(pids):
        if not _files(folder, part)[1].exists():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, 9)


def _files(folder: Path, part: int) -> tuple[Path, Path]:
    """Return where a process of the simulation writes its output and its exit status."""
    return folder / f"simulation-{part}.txt", folder / f"simulation-{part}.status"
