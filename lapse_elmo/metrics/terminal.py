"""Is somebody looking? Progress bars are for terminals, plain lines for files."""

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
    """Return whether what is written to stderr appears on a terminal, possibly by way of the MPI launcher.

    A launcher gives its ranks pipes and copies them to its own stderr, so the launchers above this process on the same
    host are looked at too.
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
