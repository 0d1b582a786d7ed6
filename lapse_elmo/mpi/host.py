"""This machine: the CPU cores and GPUs that its ranks may use, and its address.

``python -m lapse_elmo.mpi.host`` prints how many ranks should train here, or with ``cores`` how many should preprocess;
``make train`` starts that many.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Collection, Iterator
from importlib import metadata

from lapse_elmo import cgroups
from lapse_elmo.subprocesses import output_of

_LOOPBACK, _LOOPBACK_NET = "127.0.0.1", "127."
_ANY_PORT = 9
_UNROUTED = "192.0.2.1"  # reserved for documentation by RFC 5737; any address outside the local networks would do
_MAX_ASKED = 3  # hosts whose names are looked up: without a name server, each may take seconds
_QUOTA_FILES = ("cpu.cfs_quota_us", "cpu.cfs_period_us")  # of cgroups of version 1
_NVIDIA_SMI_TIME_S = 30  # it loads the driver where that is not resident; with a broken driver it may hang


def usable_cores(cores: Collection[int] | None = None) -> int:
    """Return how many CPU cores may be used, limited by the quotas of its cgroups and by Slurm's allocation.

    Args:
        cores: The cores that several processes are bound to, in all; None for those of this process.
    """
    count = len(os.sched_getaffinity(0) if cores is None else cores)
    allotted = os.environ.get("SLURM_CPUS_ON_NODE", "")
    if allotted.isdecimal():
        count = min(count, int(allotted))
    return max(1, min([count, *_quotas()]))


def _quotas() -> Iterator[int]:
    """Yield the whole cores of each quota on processor time, of a container or of a user on a login node."""
    for folder, version in cgroups.groups("cpu"):
        if version == 2:
            limits = cgroups.numbers(folder / "cpu.max")
        else:
            limits = [number for name in _QUOTA_FILES for number in cgroups.numbers(folder / name)]
        if len(limits) == 2 and limits[0] is not None and limits[1]:  # else "max" or -1
            yield limits[0] // limits[1]


def usable_gpus() -> int:
    """Return how many NVIDIA GPUs this process may use, by nvidia-smi and ``CUDA_VISIBLE_DEVICES``, without torch.

    It is 0 if there is no nvidia-smi, or if it fails.
    """
    try:
        listed = output_of(["nvidia-smi", "-L"], _NVIDIA_SMI_TIME_S)
    except (OSError, subprocess.SubprocessError):
        return 0
    installed = sum(line.startswith("GPU ") for line in listed.splitlines())  # lines of MIG devices are indented
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return installed
    count = 0
    for name in (part.strip() for part in visible.split(",")):
        if not (name.startswith(("GPU-", "MIG-")) or (name.isdecimal() and int(name) < installed)):
            break  # CUDA ignores what follows the first invalid entry
        count += 1
    return min(count, installed)


def ranks_for_training() -> int:
    """Return one rank per usable GPU, or one per usable core without a GPU or with a torch without CUDA."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        if metadata.version("torch").endswith("+cpu"):
            return usable_cores()
    return usable_gpus() or usable_cores()


def own_address(hosts: Collection[str]) -> str | None:
    """Return an IPv4 address at which other ranks reach this host without MPI, or None if there is none.

    Without a default route, the interface towards another host is taken. The address of this host's own name is the
    last resort, but never a loopback address, which Debian gives that name.

    Args:
        hosts: The host names of all ranks, including this one. If they are all the same, the loopback address serves.
    """
    if len(set(hosts)) == 1:
        return _LOOPBACK
    own = socket.gethostname()
    others = [host for host in dict.fromkeys(hosts) if host != own]
    for host in (_UNROUTED, *others[:_MAX_ASKED], own):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
            probe.connect((host, _ANY_PORT))  # sends nothing: selects an interface
            address = str(probe.getsockname()[0])
            if not address.startswith(_LOOPBACK_NET):
                return address
    return None


if __name__ == "__main__":
    print(usable_cores() if sys.argv[1:] == ["cores"] else ranks_for_training())
