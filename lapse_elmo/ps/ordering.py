"""A memory fence for NumPy's accesses to shared memory; see ordering.c."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from lapse_elmo import native

SOURCE = Path(__file__).parent / "ordering.c"
_MEMBARRIER = {"aarch64": 283, "riscv64": 283, "ppc64le": 365, "s390x": 356}  # system call numbers
_GLOBAL = 1  # MEMBARRIER_CMD_GLOBAL: all running threads of the machine pass a barrier


@lru_cache(maxsize=1)
def fence() -> Callable[[], object]:
    """Return a function that orders this process's memory accesses before its call before those after it.

    Without a compiler: x86 keeps the order of stores and of loads, so nothing is needed there. On other processors the
    ``membarrier`` system call does the same, slowly.
    """
    library = native.load(SOURCE)
    if library is not None:
        function = library.fence
        function.restype = None
        return function
    number = _MEMBARRIER.get(platform.machine())
    if number is None:
        return _nothing
    system = ctypes.CDLL(None)
    return lambda: system.syscall(ctypes.c_long(number), ctypes.c_int(_GLOBAL), ctypes.c_uint(0), ctypes.c_int(0))


def _nothing() -> None:
    pass
