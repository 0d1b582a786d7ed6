"""Debian's Open MPI in the place of the installed MPICH, where ``openmpi-bin`` is installed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

_PROGRAM = "mpirun.openmpi"  # Debian's name for it next to MPICH's
_ENVIRONMENT = {
    "MPI4PY_MPIABI": "openmpi",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",  # more ranks than cores
    "OMPI_MCA_hwloc_base_binding_policy": "none",
}
# Without reading the memory of other processes: a rendezvous for every message of 4 KiB or more.
CMA_OFF = {"OMPI_MCA_btl_vader_single_copy_mechanism": "none"}

# Several nodes of Slurm on one machine: Open MPI's ranks would take each other's shared memory for their own, since it
# is named by host and local rank. So all of them use TCP, which leaves the loopback out by default.
NODES_ON_ONE_HOST = {
    "OMPI_MCA_btl": "self,tcp", "OMPI_MCA_btl_tcp_if_include": "lo", "OMPI_MCA_oob_tcp_if_include": "lo",
}


def why_not() -> str:
    """Return why this machine cannot run jobs on Open MPI; "" if it can."""
    return "" if shutil.which(_PROGRAM) else "Open MPI is not installed (Debian: openmpi-bin)"


def site() -> str:
    """Return lines for slurm/site.sh with which jobs of several nodes of Slurm, all on this machine, use it."""
    variables = {**_ENVIRONMENT, **NODES_ON_ONE_HOST}
    return "".join(f"export {name}={value}\n" for name, value in variables.items())


def job(env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the launcher and environment of a job for :func:`tests.mpi.start`, with ``env`` in addition."""
    return {"launcher": [_PROGRAM], "env": {**_ENVIRONMENT, **(env or {})}}
