"""Find out whether stderr ends at a terminal, which gets a progress bar, or in a file, which gets plain lines."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_LAUNCHERS = (
    *("mpirun", "mpiexec", "mpiexec.hydra", "hydra_pmi_proxy"),
    *("prterun", "orterun", "orted", "prted", "srun", "slurmstepd"),
)
_STDERR = 2


def stderr_is_terminal() -> bool:
    """Return whether stderr ends at a terminal, directly or through an MPI launcher.

    A launcher connects its ranks through pipes and copies their output to its own stderr. So this also checks the
    stderr of the launchers among the parent processes on this host.
    """
    if sys.stderr.isatty():
        return True
    process = os.getppid()
    while process > 1:
        try:
            status = Path(f"/proc/{process}/stat").read_text()
            name = status[status.index("(") + 1 : status.rindex(")")]
            if name not in _LAUNCHERS:
                return False
            if os.readlink(f"/proc/{process}/fd/{_STDERR}").startswith(("/dev/pts/", "/dev/tty", "/dev/console")):
                return True
            process = int(status[status.rindex(")") + 2 :].split()[1])
        except (OSError, ValueError):
            return False
    return False
