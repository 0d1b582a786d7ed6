"""Which cores the ranks of a machine have for themselves, as far as affinity, cgroup and Slurm tell."""

from __future__ import annotations

import os
import re
from collections.abc import Collection

# How many ranks of the job a launcher started on this machine.
LOCAL_SIZE_VARIABLES = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE")


def usable_cores(cores: Collection[int] | None = None) -> int:
    """How many of ``cores`` may be used: the CPU quota of the cgroup cuts them, and what Slurm gave the job here.

    :param cores: those that several processes are bound to, in all; without it those of this process.
    """
    count = len(os.sched_getaffinity(0) if cores is None else cores)
    allotted = os.environ.get("SLURM_CPUS_ON_NODE", "")
    if allotted.isdecimal():
        count = min(count, int(allotted))
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
    except (OSError, ValueError):
        return count
    return count if quota == "max" else max(1, min(count, int(quota) // int(period)))


def crowded() -> bool:
    """Whether this machine's ranks are more than its cores, as far as can be told before MPI starts."""
    if "SLURM_CPUS_ON_NODE" in os.environ:  # Slurm may have bound each rank to cores of its own
        return _launched_here() > usable_cores(range(os.cpu_count() or 1))
    return _launched_here() > usable_cores()


def _launched_here() -> int:
    for name in LOCAL_SIZE_VARIABLES:
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    node, tasks = os.environ.get("SLURM_NODEID", ""), os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks)  # "4(x2),3" are three nodes
    counts = [int(count) for count, times in runs for _ in range(int(times or 1))]
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else 1
