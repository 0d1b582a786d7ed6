"""Memory that the ranks of a node share: named arrays in one file that has no name any more.

MPI's own shared windows are not used: what they leave behind when a job is killed stays until the machine restarts,
and they take their whole size at once. This file is unlinked as soon as all ranks have opened it, so it goes with the
last of them, whatever ends them; and its pages are taken only when they are reserved, so that an array may be as long
as it could ever get.
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
_ALIGNMENT = 4096
_MADV_POPULATE_WRITE = 23


class NodeMemory:
    """The arrays of ``shapes``, {name: (shape, dtype)}, all zero, shared by the node's ranks (collective).

    :raises ConfigError: if there is no room for it.
    """

    def __init__(self, world: World, shapes: dict[str, tuple[tuple[int, ...], Any]]) -> None:
        self._starts: dict[str, int] = {}
        size = 0
        for name, (shape, dtype) in shapes.items():
            self._starts[name] = size
            size += -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // _ALIGNMENT) * _ALIGNMENT
        self.file = _create_shared_file(world, size)
        self._map = mmap.mmap(self.file, max(size, 1))
        with contextlib.suppress(OSError):  # where the machine allows it, rows then cost fewer look-ups of addresses
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.arrays: dict[str, np.ndarray] = {
            name: np.frombuffer(self._map, dtype, int(np.prod(shape)), self._starts[name]).reshape(shape)
            for name, (shape, dtype) in shapes.items()
        }

    def reserve(self, name: str, first: int, end: int) -> None:
        """Take the pages of the elements [first, end) of an array's first dimension: to write to others may kill.

        :raises ConfigError: if there is no room for them.
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
            raise _no_room(f"the rows of {name}", (end - first) * item) from None
        self._prefault(self._starts[name] + first * item, (end - first) * item)

    def _prefault(self, start: int, size: int) -> None:
        """Have the reserved pages entered for this process in one go, rather than one by one as they are used."""
        start -= start % _ALIGNMENT
        with contextlib.suppress(OSError):  # Linux before 5.14
            self._map.madvise(_MADV_POPULATE_WRITE, start, min(size + _ALIGNMENT, len(self._map) - start))

    def lock_file(self) -> int:
        """A new open file description, to which locks belong; for the caller to close."""
        return os.open(f"/proc/self/fd/{self.file}", os.O_RDWR)

    def close(self) -> None:
        """Give the memory back once nothing refers to the arrays any more."""
        self.arrays.clear()
        with contextlib.suppress(BufferError):  # an array is still referred to: the memory goes with it
            self._map.close()
        os.close(self.file)


def require_room(world: World, num_bytes: int) -> None:
    """Collective: refuse rows that do not fit, before anything is taken.

    :param num_bytes: of all rows; each node starts with an equal share.
    """

    def check() -> None:
        on_host = world.host_size / world.local_size  # nodes, where one machine is split into several
        if num_bytes * on_host / world.num_nodes > free_bytes():
            raise _no_room("the tables", int(num_bytes * on_host / world.num_nodes))

    world.together(check)


def free_bytes() -> int:
    """Shared memory that is free on this machine."""
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
    """One new file of ``size`` bytes, opened by each of the node's ranks for itself."""

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
        except OSError as error:  # of a limit on the size of files too (ulimit -f), for this is one
            wanted = f"file of {size / 1e9:.2f} GB for shared memory in {_folder()}"
            raise ConfigError(f"no {wanted}: {error.strerror}") from None
        return path

    path = world.node_bcast(world.together(make))
    file = os.open(path, os.O_RDWR)
    world.node_barrier()
    if world.local_rank == 0:
        os.unlink(path)
    return file
