"""This machine: the CPU cores that its ranks may use, and its address."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Collection

_LOOPBACK = "127.0.0.1"
_UNROUTED = ("192.0.2.1", 9)  # reserved for documentation by RFC 5737; any address outside the local networks would do


def usable_cores(cores: Collection[int] | None = None) -> int:
    """Return how many CPU cores may be used, limited by the cgroup's quota and by Slurm's allocation.

    Args:
        cores: The cores that several processes are bound to, in all; None for those of this process.
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


def own_address(hosts: Collection[str]) -> str | None:
    """Return an IPv4 address at which other ranks reach this host without MPI, or None if there is none.

    Args:
        hosts: The host names of all ranks, including this one. If they are all the same, the loopback address serves.
    """
    if len(set(hosts)) == 1:
        return _LOOPBACK
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(_UNROUTED)  # sends nothing: selects the interface of the default route
        return str(probe.getsockname()[0])
    with contextlib.suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return None
