"""The embedded engine: all rows in memory that the ranks of one node share.

Rows lie in one MPI shared-memory window and are read and added to in place. Exactness comes from locks over intervals
of keys: a call sorts its keys, and each run of ``_RUN`` of them is handled under a lock of the byte interval
[first key, last key] of an unlinked file (open-file-description locks of Linux: the kernel finds the overlaps, a
waiting rank sleeps, and the locks of a rank that dies are released). Pulls share a lock, so no pull sees half a row.
"""

from __future__ import annotations

import fcntl
import os
import struct
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from lapse_elmo.errors import ConfigError, ServerError
from lapse_elmo.ps.api import DONE, Array, ParameterServer
from lapse_elmo.ps.layout import Layout, Segment
from lapse_elmo.ps.sampling import Sampler
from lapse_elmo.world import World

_RUN = 1024
_SHARED_MEMORY = "/dev/shm"


class SharedMemoryServer(ParameterServer):
    """Rows of ``layout`` shared by the ranks of one node.

    :param sampled: the segment that ``prepare_sample`` draws from, and how; None if nothing is sampled.
    :param first_sample: number of the first sample to be prepared; a resumed run goes on where it was.
    :raises ConfigError: if the world has several nodes, or the rows do not fit into shared memory.
    """

    def __init__(
        self, world: World, layout: Layout, sampled: tuple[str, Sampler] | None = None, first_sample: int = 0
    ) -> None:
        super().__init__(layout, sampled, first_sample)
        if world.num_nodes > 1:
            raise ConfigError(
                f"the embedded parameter server spans one node, but the {world.size} ranks are on {world.num_nodes}: "
                "start all ranks on one node"
            )
        self._world = world
        world.agree(lambda: _require_shared_memory(layout.num_bytes))
        self._window, memory = _allocate(world, layout.num_bytes)
        self._tables: dict[str, torch.Tensor] = {}
        start = 0
        for segment in layout.segments:
            rows = memory[start : start + segment.num_bytes].view(np.float32)
            self._tables[segment.name] = torch.from_numpy(rows.reshape(segment.num_rows, segment.width))
            start += segment.num_bytes
        self._locks = _IntervalLock(world)

    def pull_async(self, keys: Array, out: Array) -> int:
        keys, out, segment = self.checked("out", keys, out, writes=True)
        if segment is None:
            return DONE
        start = time.perf_counter()
        table, stats = self._tables[segment.name], self.stats.segments[segment.name]
        for rows, places in self._runs(keys, segment, exclusive=False):
            if isinstance(places, slice):
                torch.index_select(table, 0, rows, out=out[places])
            else:
                out.index_copy_(0, places, table.index_select(0, rows))
        stats.pulled_rows += keys.size
        stats.pulled_bytes += keys.size * segment.width * 4
        stats.pull_s += time.perf_counter() - start
        return DONE

    def push_async(self, keys: Array, deltas: Array) -> int:
        keys, deltas, segment = self.checked("deltas", keys, deltas)
        if segment is None:
            return DONE
        start = time.perf_counter()
        table, stats = self._tables[segment.name], self.stats.segments[segment.name]
        for rows, places in self._runs(keys, segment, exclusive=True):
            table.index_add_(0, rows, deltas[places])
        stats.pushed_rows += keys.size
        stats.pushed_bytes += keys.size * segment.width * 4
        stats.push_s += time.perf_counter() - start
        return DONE

    def set(self, keys: Array, values: Array) -> None:
        keys, values, segment = self.checked("values", keys, values)
        if segment is None:
            return
        if np.unique(keys).size != keys.size:
            raise ServerError("keys should be distinct in a set")
        for rows, places in self._runs(keys, segment, exclusive=True):
            self._tables[segment.name].index_copy_(0, rows, values[places])

    def localize_async(self, keys: Array) -> int:
        keys, _ = self.checked_keys(keys)
        self.stats.localized_rows += keys.size
        return DONE

    def wait(self, ticket: int) -> None:
        self.require_open()
        if ticket != DONE:
            raise ServerError(f"ticket: {ticket} was never given")

    def wait_all(self) -> None:
        self.require_open()

    def intent(self, keys: Array, start: int, end: int) -> None:
        keys, _ = self.checked_keys(keys)
        self.checked_clocks(start, end)
        self.stats.intended_rows += keys.size

    def is_local(self, name: str) -> np.ndarray | None:
        return None

    def owned_rows(self, name: str) -> np.ndarray:
        self.require_open()
        total, world = self.layout[name].num_rows, self._world
        return np.arange(total * world.rank // world.size, total * (world.rank + 1) // world.size)

    def quiesce(self) -> None:
        self.require_open()
        if self._window is not None:
            self._window.Sync()
        self._world.barrier()

    def barrier(self) -> None:
        self.require_open()
        self._world.barrier()

    def close(self) -> None:
        if self.closed:
            return
        self._world.barrier()
        self.closed = True
        self._tables.clear()
        self._locks.close()
        if self._window is not None:
            self._window.Unlock_all()
            self._window.Free()
            self._window = None

    def _runs(
        self, keys: np.ndarray, segment: Segment, *, exclusive: bool
    ) -> Iterator[tuple[torch.Tensor, slice | torch.Tensor]]:
        """Rows of the table, in runs of ascending key and under a lock each, with their places in the call's buffer."""
        order = None if np.all(keys[1:] >= keys[:-1]) else np.argsort(keys, kind="stable")
        if order is not None:
            keys = keys[order]
        rows = torch.from_numpy(keys - segment.first_key)
        stats = self.stats.segments[segment.name]
        for a in range(0, keys.size, _RUN):
            b = min(a + _RUN, keys.size)
            places = slice(a, b) if order is None else torch.from_numpy(order[a:b])
            stats.lock_wait_s += self._locks.acquire(int(keys[a]), int(keys[b - 1]) + 1, exclusive)
            try:
                yield rows[a:b], places
            finally:
                self._locks.release(int(keys[a]), int(keys[b - 1]) + 1)


class _IntervalLock:
    """Shared and exclusive locks over intervals of numbers, between the processes of a node."""

    def __init__(self, world: World) -> None:
        directory = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else tempfile.gettempdir()
        path = None
        if world.local_rank == 0:
            handle, path = tempfile.mkstemp(prefix="lapse-elmo-locks-", dir=directory)
            os.close(handle)
        path = world.bcast(path)
        assert path is not None
        # Opened by each rank for itself: a lock belongs to the open file description.
        self._file = os.open(path, os.O_RDWR)
        world.node_barrier()
        if world.local_rank == 0:
            os.unlink(path)

    def acquire(self, first: int, end: int, exclusive: bool) -> float:
        """Lock [first, end); returns the seconds waited."""
        kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
        start = time.perf_counter()
        fcntl.fcntl(self._file, fcntl.F_OFD_SETLKW, _flock(kind, first, end))
        return time.perf_counter() - start

    def release(self, first: int, end: int) -> None:
        fcntl.fcntl(self._file, fcntl.F_OFD_SETLKW, _flock(fcntl.F_UNLCK, first, end))

    def close(self) -> None:
        os.close(self._file)


def _flock(kind: int, first: int, end: int) -> bytes:
    """A ``struct flock`` of 64-bit Linux."""
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, first, end - first, 0)


def _require_shared_memory(num_bytes: int) -> None:
    """Refuse at once what would end in a bus error when the pages are touched."""
    try:
        room = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return  # no such mount: the MPI library keeps its windows elsewhere
    free = room.f_bavail * room.f_frsize
    if num_bytes > free:
        raise ConfigError(
            f"the tables take {num_bytes / 1e9:.2f} GB of shared memory but {_SHARED_MEMORY} has {free / 1e9:.2f} GB "
            "free: enlarge it, or choose a smaller vocabulary or --projection-size"
        )


def _allocate(world: World, num_bytes: int) -> tuple[Any, np.ndarray]:
    """(window, bytes) shared by the node's ranks; no window without MPI."""
    if world.node_comm is None:
        return None, np.zeros(num_bytes, np.uint8)
    from mpi4py import MPI

    window = MPI.Win.Allocate_shared(num_bytes if world.local_rank == 0 else 0, 1, comm=world.node_comm)
    window.Lock_all()  # the epoch in which Sync, a memory barrier, is allowed
    buffer, _ = window.Shared_query(0)
    return window, np.frombuffer(buffer, np.uint8)  # type: ignore[call-overload]
