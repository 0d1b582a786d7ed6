"""Access to rows without a compiler: the fallback for rows.c, in NumPy and torch under kernel locks."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from lapse_elmo import native
from lapse_elmo.mpi.node_memory import NodeMemory
from lapse_elmo.ps.layout import Segment, by_occurrence
from lapse_elmo.ps.rows import DIRTY, PRESENT, REPLICA, SOURCE, NativeRows, Rows
from lapse_elmo.ps.rules import Rule

_ROWS_PER_LOCK = 1024
_OFD_SETLKW = 38  # of Linux; builds of Python for a C library before 2.20, such as uv's, lack fcntl.F_OFD_SETLKW


def open_rows(memory: NodeMemory, segment: Segment, is_native: bool) -> Rows:
    """Return an accessor of the rows of ``segment``; ``is_native`` must be the same on all ranks of the node.

    The two implementations use different locks, which do not exclude each other.
    """
    library = native.load(SOURCE) if is_native else None
    return NativeRows(memory, segment, library) if library is not None else LockedRows(memory, segment)


class LockedRows(Rows):
    """Rows through NumPy and torch. A call sorts its rows and handles ``_ROWS_PER_LOCK`` at a time under a lock.

    The lock covers the byte interval [first key, last key] of the node's file. With Linux's open-file-description locks
    the kernel finds overlaps, a waiting rank sleeps, and the locks of a rank that dies are released.
    """

    def __init__(self, memory: NodeMemory, segment: Segment) -> None:
        super().__init__(memory, segment)
        self._file = memory.lock_file()
        self._first_key = segment.first_key
        self._main = torch.from_numpy(self.main)

    def close(self) -> None:
        """Close the lock file and release the references to shared memory."""
        os.close(self._file)
        del self._main
        super().close()

    def pull(self, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Copy the rows that are here into ``out``."""
        missing, result, main = [], torch.from_numpy(out), self._main[:, : out.shape[1]]
        for some, indices in self._runs(rows, exclusive=False):
            flags = self.flags[some]
            if np.all(flags & (PRESENT | REPLICA) == PRESENT):
                slots = torch.from_numpy(self.slots[some])
                if isinstance(indices, slice):
                    torch.index_select(main, 0, slots, out=result[indices])
                else:
                    result.index_copy_(0, torch.from_numpy(indices), main.index_select(0, slots))
                continue
            positions = _as_array(indices)
            for view, chosen in self._views(some, flags):
                out[positions[chosen]] = view[self.slots[some[chosen]], : out.shape[1]]
            missing.append(positions[flags & PRESENT == 0])
        return np.sort(np.concatenate(missing)) if missing else rows[:0]

    def add(self, rows: np.ndarray, deltas: np.ndarray, mark: bool = True) -> np.ndarray:
        """Add ``deltas`` to the rows that are here."""
        missing, source = [], torch.from_numpy(deltas)
        for some, indices in self._runs(rows, exclusive=True):
            flags = self.flags[some]
            self._mark(some, flags, mark)
            if np.all(flags & (PRESENT | REPLICA) == PRESENT):
                slots = torch.from_numpy(self.slots[some])
                part = source[indices] if isinstance(indices, slice) else source[torch.from_numpy(indices)]
                self._main.index_add_(0, slots, part)
                continue
            positions = _as_array(indices)
            for view, chosen in self._views(some, flags, with_deltas=True):
                np.add.at(view, self.slots[some[chosen]], deltas[positions[chosen]])
            missing.append(positions[flags & PRESENT == 0])
        return np.sort(np.concatenate(missing)) if missing else rows[:0]

    def _step(self, rule: Rule, rows: np.ndarray, gradients: np.ndarray, rate: float, mark: bool) -> np.ndarray:
        missing = []
        for some, indices in self._runs(rows, exclusive=True):
            flags, positions = self.flags[some], _as_array(indices)
            self._mark(some, flags, mark)
            for view, here in self._views(some, flags):
                for turn in by_occurrence(some[here]):  # steps of a repeated row must follow one another
                    chosen = here[turn]
                    slots = self.slots[some[chosen]]
                    gradient = torch.from_numpy(gradients[positions[chosen]])
                    change = rule.changes(torch.from_numpy(view[slots]), gradient, rate).numpy()
                    view[slots] += change
                    if flags[chosen[0]] & REPLICA:
                        self.replica[slots, 1] += change
            missing.append(positions[flags & PRESENT == 0])
        return np.sort(np.concatenate(missing)) if missing else rows[:0]

    def set(self, rows: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Overwrite the main copies that are here."""
        with self._locked(rows):
            here = self.owned(rows)
            self.main[self.slots[rows[here]]] = values[here]
            self.flags[rows[here]] |= DIRTY
        return np.flatnonzero(~here)

    def put(self, rows: np.ndarray, slots: np.ndarray, values: np.ndarray, as_replica: bool) -> None:
        """Store absent rows."""
        with self._locked(rows):
            if as_replica:
                self.replica[slots, 0], self.replica[slots, 1] = values, 0
            else:
                self.main[slots] = values
            self.slots[rows] = slots
            self.flags[rows] = PRESENT | (REPLICA if as_replica else 0)

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Move main copies to ``out``."""
        with self._locked(rows):
            out[:] = self.main[self.slots[rows]]
            self.flags[rows] = 0

    def promote(self, rows: np.ndarray, slots: np.ndarray, values: np.ndarray) -> None:
        """Make replicas main copies."""
        with self._locked(rows):
            dirty = self.flags[rows] & DIRTY
            # Adding -0.0 keeps all bits of a value, as a copy does; +0.0 would turn -0.0 into +0.0.
            deltas = np.where(dirty[:, None] != 0, self.replica[self.slots[rows], 1], np.float32(-0.0))
            self.main[slots] = values + deltas
            self.slots[rows] = slots
            self.flags[rows] = PRESENT | dirty

    def clear_dirty(self, rows: np.ndarray) -> np.ndarray:
        """Clear the dirty flags of main copies."""
        with self._locked(rows):
            changed = np.flatnonzero(self.flags[rows] & DIRTY)
            self.flags[rows[changed]] &= ~np.uint32(DIRTY)
        return changed

    def collect(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Take the deltas of replicas."""
        with self._locked(rows):
            changed = np.flatnonzero(self.flags[rows] & DIRTY)
            slots = self.slots[rows[changed]]
            deltas = self.replica[slots, 1]
            self.replica[slots, 1] = 0
            self.flags[rows[changed]] &= ~np.uint32(DIRTY)
        return changed, deltas

    def refresh(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Set replicas to ``values`` plus their deltas."""
        with self._locked(rows):
            slots = self.slots[rows]
            dirty = self.flags[rows] & DIRTY != 0  # adding -0.0 keeps all bits
            self.replica[slots, 0] = values + np.where(dirty[:, None], self.replica[slots, 1], np.float32(-0.0))

    def overwrite(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Set replicas to ``values`` and discard their deltas."""
        with self._locked(rows):
            slots = self.slots[rows]
            self.replica[slots, 0], self.replica[slots, 1] = values, 0
            self.flags[rows] &= ~np.uint32(DIRTY)

    def release(self, rows: np.ndarray) -> np.ndarray:
        """Remove the replicas that have no deltas."""
        with self._locked(rows):
            released = np.flatnonzero(self.flags[rows] & DIRTY == 0)
            self.flags[rows[released]] = 0
        return released

    def _mark(self, rows: np.ndarray, flags: np.ndarray, main_too: bool) -> None:
        """Mark replicas and, with ``main_too``, main copies as dirty."""
        changed = (flags & PRESENT != 0) & (main_too or flags & REPLICA != 0)
        self.flags[rows] = flags | np.where(changed, DIRTY, 0).astype(np.uint32)

    def _views(
        self, rows: np.ndarray, flags: np.ndarray, with_deltas: bool = False
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (array by slot, indices of the ``rows`` in it): main copies, replicas' values and, if asked, deltas."""
        main = np.flatnonzero(flags & (PRESENT | REPLICA) == PRESENT)
        replicas = np.flatnonzero(flags & (PRESENT | REPLICA) == PRESENT | REPLICA)
        if main.size:
            yield self.main, main
        if replicas.size:
            yield self.replica[:, 0], replicas
            if with_deltas:
                yield self.replica[:, 1], replicas

    def _runs(self, rows: np.ndarray, *, exclusive: bool) -> Iterator[tuple[np.ndarray, slice | np.ndarray]]:
        """Yield ``rows`` in ascending runs, each under a lock, with their indices in the call's buffers.

        Ascending order and one lock at a time prevent deadlocks.
        """
        order = None if np.all(rows[1:] >= rows[:-1]) else np.argsort(rows, kind="stable")
        if order is not None:
            rows = rows[order]
        for a in range(0, rows.size, _ROWS_PER_LOCK):
            b = min(a + _ROWS_PER_LOCK, rows.size)
            with self._interval(int(rows[a]), int(rows[b - 1]) + 1, exclusive):
                yield rows[a:b], slice(a, b) if order is None else order[a:b]

    @contextmanager
    def _locked(self, rows: np.ndarray) -> Iterator[None]:
        """Hold one exclusive lock on the interval that ``rows`` span."""
        if not rows.size:
            yield
            return
        with self._interval(int(rows.min()), int(rows.max()) + 1, exclusive=True):
            yield

    @contextmanager
    def _interval(self, first: int, end: int, exclusive: bool) -> Iterator[None]:
        self._lock(fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK, first, end)
        try:
            yield
        finally:
            self._lock(fcntl.F_UNLCK, first, end)

    def _lock(self, kind: int, first: int, end: int) -> None:
        # ``struct flock`` of 64-bit Linux.
        flock = struct.pack("hhqqi4x", kind, os.SEEK_SET, self._first_key + first, end - first, 0)
        fcntl.fcntl(self._file, _OFD_SETLKW, flock)


def _as_array(indices: slice | np.ndarray) -> np.ndarray:
    return np.arange(indices.start, indices.stop) if isinstance(indices, slice) else indices
