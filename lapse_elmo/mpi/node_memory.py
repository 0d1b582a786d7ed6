"""Shared memory of the ranks of a node: named arrays in one unlinked file.

MPI's shared-memory windows are not used: if a job is killed they may leave files behind until the machine restarts,
and they allocate their whole size at once. This file is unlinked as soon as all ranks have opened it, so the kernel
frees it with the last of them, however they end. Its pages are allocated when they are reserved, so an array can have
the largest size that it may ever need.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import tempfile
from typing import Any

import numpy as np

from lapse_elmo.errors import ConfigError
from lapse_elmo.mpi.world import World

_FOLDER = "/dev/shm"
_ALIGNMENT = mmap.PAGESIZE
_MADV_POPULATE_WRITE = 23  # map pages now (Linux 5.14); the module mmap does not name it


class NodeMemory:
    """Arrays shared by the node's ranks, all zero (construction is collective).

    Args:
        world: The ranks.
        shapes: (shape, dtype) by name.

    Attributes:
        arrays: The arrays by name. Elements must be reserved before they are written.

    Raises:
        ConfigError: If the file cannot be created.
    """

    def __init__(self, world: World, shapes: dict[str, tuple[tuple[int, ...], Any]]) -> None:
        self._starts: dict[str, int] = {}
        size = 0
        for name, (shape, dtype) in shapes.items():
            self._starts[name] = size
            size += -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // _ALIGNMENT) * _ALIGNMENT
        self.file = _create_shared_file(world, size)
        self._map = mmap.mmap(self.file, max(size, 1))
        with contextlib.suppress(OSError):  # fewer TLB misses, where the kernel allows it
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.arrays: dict[str, np.ndarray] = {
            name: np.frombuffer(self._map, dtype, int(np.prod(shape)), self._starts[name]).reshape(shape)
            for name, (shape, dtype) in shapes.items()
        }

    def reserve(self, name: str, first: int, end: int) -> None:
        """Allocate the pages of the elements [first, end) of an array's first dimension.

        Writing to pages that are not allocated raises SIGBUS when memory is short, and so kills the process.

        Raises:
            ConfigError: If there is not enough shared memory.
        """
        array = self.arrays[name]
        item = array.itemsize * int(np.prod(array.shape[1:]))
        if end <= first or not item:
            return
        try:
            os.posix_fallocate(self.file, self._starts[name] + first * item, (end - first) * item)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.ENOMEM):
                raise
            raise _no_room(f"the values of {name}", (end - first) * item) from None
        self._prefault(self._starts[name] + first * item, (end - first) * item)

    def _prefault(self, start: int, size: int) -> None:
        """Map the reserved pages into this process at once, which costs less than one page fault each."""
        start -= start % _ALIGNMENT
        with contextlib.suppress(OSError):  # Linux before 5.14
            self._map.madvise(_MADV_POPULATE_WRITE, start, min(size + _ALIGNMENT, len(self._map) - start))

    def lock_file(self) -> int:
        """Return a new open file description, to which file locks belong. The caller closes it."""
        return os.open(f"/proc/self/fd/{self.file}", os.O_RDWR)

    def close(self) -> None:
        """Free the memory, once nothing refers to the arrays any more."""
        self.arrays.clear()
        with contextlib.suppress(BufferError):  # an array is still in use: the memory is freed with it
            self._map.close()
        os.close(self.file)


def require_room(world: World, num_bytes: int) -> None:
    """Refuse rows that do not fit into shared memory, before anything is allocated (collective).

    Args:
        world: The ranks.
        num_bytes: Size of all rows of the job; each node starts with an equal share.

    Raises:
        ConfigError: On all ranks, if they do not fit on one of them.
    """

    def check() -> None:
        on_host = world.host_size / world.local_size  # nodes per machine, if machines are split
        if num_bytes * on_host / world.num_nodes > free_bytes():
            raise _no_room("the tables", int(num_bytes * on_host / world.num_nodes))

    world.together(check)


def free_bytes() -> int:
    """Return the free shared memory of this machine."""
    room = os.statvfs(_folder())
    return room.f_bavail * room.f_frsize


def _no_room(what: str, num_bytes: int) -> ConfigError:
    return ConfigError(
        f"{what} take {num_bytes / 1e9:.2f} GB of shared memory but {_folder()} has {free_bytes() / 1e9:.2f} GB free: "
        "enlarge it, use more nodes, or choose a smaller vocabulary or --projection-size"
    )


def _folder() -> str:
    return _FOLDER if os.access(_FOLDER, os.W_OK) else tempfile.gettempdir()


def _create_shared_file(world: World, size: int) -> int:
    """Create a file of ``size`` bytes, open it on each of the node's ranks, and unlink it; return its descriptor."""
    made: list[str] = []

    def make() -> str:
        if world.local_rank:
            return ""
        try:
            handle, path = tempfile.mkstemp(prefix="lapse-elmo-", dir=_folder())
            try:
                os.ftruncate(handle, max(size, 1))
            except OSError:
                os.unlink(path)
                raise
            finally:
                os.close(handle)
        except OSError as error:  # also if it exceeds the limit on file sizes (ulimit -f)
            wanted = f"file of {size / 1e9:.2f} GB for shared memory in {_folder()}"
            raise ConfigError(f"no {wanted}: {error.strerror}") from None
        made.append(path)
        return path

    try:
        path = world.node_bcast(world.together(make))
        file = os.open(path, os.O_RDWR)
        world.node_barrier()
    finally:  # also if another node could not create its file
        for path in made:
            os.unlink(path)
    return file
