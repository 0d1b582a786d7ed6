"""What an earlier start of a Slurm job has left in /dev/shm, which MPICH would take for its own.

MPICH connects the ranks of a node through a file whose name is a hash of the job's and the step's number. A job that
is requeued keeps its number, and its steps are counted from 0 again. If its ranks were killed while MPI started, before
the file was unlinked (:class:`~lapse_elmo.mpi.world.World`), the next start on that node finds it: no rank initialises
it then, and messages of the killed ranks are delivered to the new ones.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path

_FNV_START, _FNV_FACTOR = 2166136261, 16777619
_PARENT, _START_TICKS = 1, 19  # fields of /proc/PID/stat, counted from the one after the name


def remove_left_files(folder: Path = Path("/dev/shm")) -> None:
    """Remove the files of MPICH that have this step's name but are older than the step, in a job that was requeued."""
    job, step = (os.environ.get(name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    if not job or not step or "SLURM_RESTART_COUNT" not in os.environ:
        return
    started_s = step_start_s()
    if started_s is None:
        return
    for path in folder.glob(f"mpich_*_{mpich_number(f'{job}.{step}'):x}_*"):
        with contextlib.suppress(OSError):  # another rank was faster, or the file is another user's
            _remove(path, started_s)


def _remove(path: Path, started_s: float) -> None:
    # Ranks take turns by locking the old file. Otherwise this one might find it old, and remove the new file that
    # another rank has made in its place meanwhile.
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        state = os.fstat(handle)
        is_old = state.st_uid == os.getuid() and state.st_mtime < started_s
        if is_old and os.path.samestat(state, path.stat()):
            path.unlink()
    finally:
        os.close(handle)


def mpich_number(name: str) -> int:
    """Return the number that MPICH makes of a job's name (32-bit FNV-1a); under Slurm's pmi2 that is ``JOB.STEP``."""
    number = _FNV_START
    for byte in name.encode():
        number = (number ^ byte) * _FNV_FACTOR & 0xFFFFFFFF
    return number


def step_start_s() -> float | None:
    """Return when Slurm started this step on this machine, as a time of its clock; None if that cannot be seen.

    That is the start of the ``slurmstepd`` from which all ranks of the step on this machine descend. The start of this
    process would not do: another rank may be minutes ahead.
    """
    process = os.getppid()
    with contextlib.suppress(OSError, ValueError, IndexError):
        while process > 1:
            text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
            fields = text[text.rindex(")") + 1 :].split()
            if text[text.index("(") + 1 : text.rindex(")")] == "slurmstepd":
                ago_s = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[_START_TICKS]) / os.sysconf("SC_CLK_TCK")
                return time.time() - ago_s
            process = int(fields[_PARENT])
    return None
