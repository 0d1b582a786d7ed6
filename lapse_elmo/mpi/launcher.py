"""The environment variables that MPI launchers (mpirun, srun) set, readable before MPI is initialised."""

from __future__ import annotations

import itertools
import os
import re

from lapse_elmo.errors import LaunchError
from lapse_elmo.mpi.host import usable_cores

# Variables with the number of ranks that the launcher started on this machine.
LOCAL_SIZE_VARIABLES = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE")
# Variables with the rank and the number of ranks, one pair per launcher.
_VARIABLES = (
    ("PMI_RANK", "PMI_SIZE"),
    ("PMIX_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
    ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE"),  # jsrun, of LSF
)
_MOST_DIGITS = 9


def launcher_rank_and_size() -> tuple[int, int]:
    """Return this process's rank and the number of ranks according to the launcher; (0, 1) without one."""
    for names in _VARIABLES:
        rank, size = (os.environ.get(name, "") for name in names)
        if _is_number(rank) and _is_number(size):
            return int(rank), int(size)
    return 0, 1


def check_launcher() -> None:
    """Check that the launcher's variables hold numbers.

    Raises:
        LaunchError: If one does not; the message names it.
    """
    for name in (*itertools.chain.from_iterable(_VARIABLES), *LOCAL_SIZE_VARIABLES):
        value = os.environ.get(name, "0")
        if not _is_number(value):
            raise LaunchError(
                f"the environment variable {name} is {value[:40]!r}, expected an integer, as set by mpirun or srun: "
                "unset it, or start the program with one of them"
            )


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS


def highest_status_counts() -> bool:
    """Return whether the launcher reports the highest exit status of all ranks, as srun and ``flux run`` do.

    An mpirun may use srun for its own processes; then it is the mpirun that reports.
    """
    own = any(name in os.environ for name in ("SLURM_PROCID", "FLUX_TASK_RANK"))
    return own and not any(name in os.environ for name in LOCAL_SIZE_VARIABLES)


def oversubscribed() -> bool:
    """Return whether this machine has more ranks than cores, as far as the environment shows.

    Once MPI runs, :attr:`lapse_elmo.mpi.world.World.oversubscribed` is exact.
    """
    if "SLURM_CPUS_ON_NODE" in os.environ:  # Slurm may have bound each rank to cores of its own
        return _ranks_on_host() > usable_cores(range(os.cpu_count() or 1))
    return _ranks_on_host() > usable_cores()


def _ranks_on_host() -> int:
    for name in LOCAL_SIZE_VARIABLES:
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    node, tasks = os.environ.get("SLURM_NODEID", ""), os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks)  # "4(x2),3": two nodes with 4 ranks, one with 3
    counts = [int(count) for count, times in runs for _ in range(int(times or 1))]
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else 1
