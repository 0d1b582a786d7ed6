"""A memory fence for NumPy's accesses to shared memory; see ordering.c."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from lapse_elmo import native
from lapse_elmo.errors import ConfigError

SOURCE = Path(__file__).parent / "ordering.c"
_ORDERED = ("x86_64", "i686")
_MEMBARRIER = {"aarch64": 283, "riscv64": 283, "ppc64le": 365, "s390x": 356}  # system call numbers
_GLOBAL = 1  # MEMBARRIER_CMD_GLOBAL: all running threads of the machine pass a barrier


@lru_cache(maxsize=1)
def fence() -> Callable[[], object]:
    """Return a function that orders this process's memory accesses before its call before those after it.

    Without a compiler: x86 keeps the order of stores and of loads, so nothing is needed there. On other processors the
    ``membarrier`` system call does the same, slowly. Linux refuses it if some cores have no timer ticks (nohz_full),
    and so may a container.

    Raises:
        ConfigError: If there is neither a compiler nor the system call where it is needed.
    """
    library = native.load(SOURCE)
    if library is not None:
        function = library.fence
        function.restype = None
        return function
    machine = platform.machine()
    if machine in _ORDERED:
        return _nothing
    number, system = _MEMBARRIER.get(machine, -1), ctypes.CDLL(None)

    def barrier() -> int:
        return int(system.syscall(ctypes.c_long(number), ctypes.c_int(_GLOBAL), ctypes.c_uint(0), ctypes.c_int(0)))

    if barrier():
        raise ConfigError(
            f"{machine} processors may reorder accesses to shared memory, and there is neither compiled code "
            f"({native.problem(SOURCE)}) nor the system call membarrier: install a C compiler, or run 'make native' on "
            "a machine that has one"
        )
    return barrier


def _nothing() -> None:
    pass
