"""What MPICH needs to be told, and what it leaves behind."""

from __future__ import annotations

import os
import re

_DEVICE = re.compile(r"^MPICH Device:\s*ch4:(.*)", re.MULTILINE)


def settle_before_loading(crowded: bool) -> None:
    """Set what MPICH reads when it is loaded; ``crowded``: there are more ranks than cores."""
    if crowded:  # a rank in a wait inside the library (Init, Finalize) yields its core
        os.environ.setdefault("MPIR_CVAR_ENABLE_HEAVY_YIELD", "1")


def settle_before_init(version: str) -> None:
    """Set what MPICH reads when it is initialised.

    An MPICH that was built for libfabric and UCX takes UCX unless told otherwise. UCX is not made for threads that wait
    for messages, as the server's managers do. And a rank tells its address in it by lines whose length is chance: up to
    1,009 bytes were seen, and Slurm's pmi2 reads 1,024 at a time and takes the rest of a longer one for a new request.
    Probably that is why ranks now and then did not start. Lines of libfabric's stay below 300.

    :param version: what ``MPI_Get_library_version`` says.
    """
    device = _DEVICE.search(version)
    if device and {"ofi", "ucx"} <= set(re.findall(r"\w+", device[1])):
        os.environ.setdefault("MPIR_CVAR_CH4_NETMOD", "ofi")


def own_shared_files() -> set[str]:
    """MPICH's named files in /dev/shm that this process has mapped."""
    with open("/proc/self/maps", encoding="ascii", errors="replace") as file:
        paths = {line.split(None, 5)[5].rstrip("\n") for line in file if "/dev/shm/mpich_shm_" in line}
    return {path for path in paths if not path.endswith("(deleted)")}
