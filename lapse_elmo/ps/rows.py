"""The rows of one segment on one node: which are here, where they lie, and how they are read and changed in place.

A row is present as the main copy or as a replica, or absent. A replica is a value and, beside it, the sum of the deltas
that its owner has not been sent yet. Workers call ``pull``, ``push`` and ``set`` straight from their processes, while
the node's manager moves rows in and out; each row is guarded by itself, so that no call sees half of another.

Two implementations of the same methods: :class:`NativeRows` goes through rows.c, with a spin lock a row;
:class:`LockedRows` needs no compiler and guards intervals of rows by locks of the kernel.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from lapse_elmo import native
from lapse_elmo.ps.layout import Segment, turns
from lapse_elmo.ps.memory import NodeMemory
from lapse_elmo.ps.rules import Rule

PRESENT, REPLICA, DIRTY = 2, 4, 8  # as in rows.c
MAIN, COPY = PRESENT, PRESENT | REPLICA  # kinds of rows
MAIN_ROWS, REPLICA_ROWS = " main", " replica"  # endings of the names of arrays whose memory is reserved slot by slot
SOURCE = Path(__file__).parent / "rows.c"
_RUN = 1024


def shapes_of(segment: Segment, several_nodes: bool) -> dict[str, tuple[tuple[int, ...], type]]:
    """What a segment needs in a node's memory; replicas only where there are other nodes."""
    replicas = segment.num_rows if several_nodes else 0
    return {
        f"{segment.name} entries": ((segment.num_rows, 2), np.uint32),
        segment.name + MAIN_ROWS: ((segment.num_rows, segment.row_width), np.float32),
        segment.name + REPLICA_ROWS: ((replicas, 2, segment.row_width), np.float32),
    }


class Rows(ABC):
    """Rows of ``segment`` in ``memory``; an object serves one thread.

    ``rows`` are int64 numbers within the segment; ``missing`` and ``changed`` results are positions in ``rows``. Values
    and deltas are those of whole rows, (n, row_width), where nothing else is said.
    """

    def __init__(self, memory: NodeMemory, segment: Segment) -> None:
        arrays = memory.arrays
        entries = arrays[f"{segment.name} entries"]
        self.width, self.row_width, self.rule = segment.width, segment.row_width, segment.rule
        self.entries = entries
        self.flags, self.slots = entries[:, 0], entries[:, 1].view(np.int32)
        self.main, self.replica = arrays[segment.name + MAIN_ROWS], arrays[segment.name + REPLICA_ROWS]

    def present(self, rows: np.ndarray) -> np.ndarray:
        """Which rows (n,) are here, as main copy or replica."""
        return self.flags[rows] & PRESENT != 0

    def owned(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Of which rows (n,) the main copy is here."""
        return self.flags[rows] & (PRESENT | REPLICA) == PRESENT

    def all_owned(self, rows: np.ndarray) -> bool:
        """Whether the main copies of all ``rows`` are here."""
        return bool(self.owned(rows).all())

    def kinds(self) -> np.ndarray:
        """MAIN or COPY (num_rows,) of the rows that are here, 0 of others."""
        return self.flags & COPY

    @abstractmethod
    def pull(self, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Copy the rows that are here to ``out``; the missing ones.

        :param out: (n, width) for what is pulled of a row, or (n, row_width) for whole rows.
        """

    def push(self, rows: np.ndarray, values: np.ndarray, rate: float = 0.0, mark: bool = True) -> np.ndarray:
        """Add ``values`` (n, width) to the rows that are here; the missing ones. Repeats are all added.

        Where the segment has a rule they are gradients, each of which makes a step at the learning rate ``rate``.

        :param mark: whether main copies count as changed by it. Replicas always do.
        """
        if self.rule is None:
            return self.add(rows, values, mark)
        return self._step(self.rule, rows, values, rate, mark)

    @abstractmethod
    def add(self, rows: np.ndarray, deltas: np.ndarray, mark: bool = True) -> np.ndarray:
        """Add ``deltas`` to the rows that are here; the missing ones. See :meth:`push`."""

    @abstractmethod
    def _step(self, rule: Rule, rows: np.ndarray, gradients: np.ndarray, rate: float, mark: bool) -> np.ndarray:
        """Take a step of ``rule`` with ``gradients`` (n, width)."""

    @abstractmethod
    def set(self, rows: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Overwrite the main copies that are here; the missing ones."""

    @abstractmethod
    def put(self, rows: np.ndarray, slots: np.ndarray, values: np.ndarray, as_replica: bool) -> None:
        """Let absent rows be here, in ``slots``."""

    @abstractmethod
    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy main copies to ``out`` and let them be absent."""

    @abstractmethod
    def clean(self, rows: np.ndarray) -> np.ndarray:
        """Which main copies have changed since the last call."""

    @abstractmethod
    def collect(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Take the deltas of replicas that have some: (which, deltas)."""

    @abstractmethod
    def refresh(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Replicas become ``values`` plus their deltas."""

    @abstractmethod
    def overwrite(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Replicas become ``values``; their deltas are forgotten."""

    @abstractmethod
    def release(self, rows: np.ndarray) -> np.ndarray:
        """Let the replicas that have no deltas be absent; which they are."""

    def close(self) -> None:
        """Let go of the memory."""
        del self.entries, self.flags, self.slots, self.main, self.replica


def open_rows(memory: NodeMemory, segment: Segment, is_native: bool) -> Rows:
    """The rows of ``segment``; ``is_native`` must be the same for all who open them."""
    library = native.load(SOURCE) if is_native else None
    return NativeRows(memory, segment, library) if library is not None else LockedRows(memory, segment)


class NativeRows(Rows):
    """Through rows.c, whose calls run without the interpreter's lock."""

    def __init__(self, memory: NodeMemory, segment: Segment, library: ctypes.CDLL) -> None:
        super().__init__(memory, segment)
        self._library = library
        for name in ("owned", "pull", "add", "step", "set", "clean", "collect", "release"):
            getattr(library, f"rows_{name}").restype = ctypes.c_int64

    def all_owned(self, rows: np.ndarray) -> bool:
        return self._call("owned", self.entries, rows, rows.size) == rows.size

    def pull(self, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        assert out.shape[1] <= self.row_width
        return self._listing("pull", (self.entries, self.main, self.replica, self.row_width, out.shape[1]), rows, out)

    def add(self, rows: np.ndarray, deltas: np.ndarray, mark: bool = True) -> np.ndarray:
        assert deltas.shape[1] == self.row_width
        return self._listing("add", (self.entries, self.main, self.replica, self.row_width), rows, deltas, int(mark))

    def _step(self, rule: Rule, rows: np.ndarray, gradients: np.ndarray, rate: float, mark: bool) -> np.ndarray:
        assert gradients.shape[1] == self.width
        before = (self.entries, self.main, self.replica, self.row_width, self.width, rule.code)
        return self._listing("step", before, rows, gradients, float(rate), float(rule.epsilon), int(mark))

    def set(self, rows: np.ndarray, values: np.ndarray) -> np.ndarray:
        return self._listing("set", (self.entries, self.main, self.row_width), rows, values)

    def put(self, rows: np.ndarray, slots: np.ndarray, values: np.ndarray, as_replica: bool) -> None:
        before = (self.entries, self.main, self.replica, self.row_width)
        self._call("put", *before, rows, rows.size, slots, values, int(as_replica))

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        self._call("take", self.entries, self.main, self.row_width, rows, rows.size, out)

    def clean(self, rows: np.ndarray) -> np.ndarray:
        return self._listing("clean", (self.entries,), rows)

    def collect(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Only as much room as there are changed rows now; one that changes meanwhile has its turn next time.
        dirty = np.flatnonzero(self.flags[rows] & DIRTY)
        deltas = np.empty((dirty.size, self.row_width), np.float32)
        which = self._listing("collect", (self.entries, self.replica, self.row_width), rows[dirty], deltas)
        return dirty[which], deltas[: which.size]

    def refresh(self, rows: np.ndarray, values: np.ndarray) -> None:
        self._call("refresh", self.entries, self.replica, self.row_width, rows, rows.size, values)

    def overwrite(self, rows: np.ndarray, values: np.ndarray) -> None:
        self._call("overwrite", self.entries, self.replica, self.row_width, rows, rows.size, values)

    def release(self, rows: np.ndarray) -> np.ndarray:
        return self._listing("release", (self.entries,), rows)

    def _listing(
        self, name: str, before: tuple[np.ndarray | int, ...], rows: np.ndarray, *more: np.ndarray | float
    ) -> np.ndarray:
        listed = np.empty(rows.size, np.int64)
        number = self._call(name, *before, rows, rows.size, *more, listed)
        return listed[:number]

    def _call(self, name: str, *arguments: np.ndarray | float) -> int:
        passed: list[ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float] = []
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                assert argument.flags.c_contiguous
                passed.append(ctypes.c_void_p(argument.ctypes.data))
            else:
                passed.append(ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument))
        return getattr(self._library, f"rows_{name}")(*passed)


class LockedRows(Rows):
    """With NumPy and torch. A call sorts its rows, and each run of ``_RUN`` of them is handled under a lock.

    The lock is one of the byte interval [first key, last key] of the node's file (open-file-description locks of Linux:
    the kernel finds the overlaps, a waiting rank sleeps, and the locks of a rank that dies are released).
    """

    def __init__(self, memory: NodeMemory, segment: Segment) -> None:
        super().__init__(memory, segment)
        self._file = memory.lock_file()
        self._first_key = segment.first_key
        self._main = torch.from_numpy(self.main)

    def close(self) -> None:
        os.close(self._file)
        del self._main
        super().close()

    def pull(self, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        missing, result, main = [], torch.from_numpy(out), self._main[:, : out.shape[1]]
        for some, places in self._runs(rows, exclusive=False):
            flags = self.flags[some]
            if np.all(flags & (PRESENT | REPLICA) == PRESENT):
                slots = torch.from_numpy(self.slots[some])
                if isinstance(places, slice):
                    torch.index_select(main, 0, slots, out=result[places])
                else:
                    result.index_copy_(0, torch.from_numpy(places), main.index_select(0, slots))
                continue
            positions = _positions(places)
            for view, chosen in self._views(some, flags):
                out[positions[chosen]] = view[self.slots[some[chosen]], : out.shape[1]]
            missing.append(positions[flags & PRESENT == 0])
        return np.sort(np.concatenate(missing)) if missing else rows[:0]

    def add(self, rows: np.ndarray, deltas: np.ndarray, mark: bool = True) -> np.ndarray:
        missing, source = [], torch.from_numpy(deltas)
        for some, places in self._runs(rows, exclusive=True):
            flags = self.flags[some]
            self._mark(some, flags, mark)
            if np.all(flags & (PRESENT | REPLICA) == PRESENT):
                slots = torch.from_numpy(self.slots[some])
                part = source[places] if isinstance(places, slice) else source[torch.from_numpy(places)]
                self._main.index_add_(0, slots, part)
                continue
            positions = _positions(places)
            for view, chosen in self._views(some, flags, with_deltas=True):
                np.add.at(view, self.slots[some[chosen]], deltas[positions[chosen]])
            missing.append(positions[flags & PRESENT == 0])
        return np.sort(np.concatenate(missing)) if missing else rows[:0]

    def _step(self, rule: Rule, rows: np.ndarray, gradients: np.ndarray, rate: float, mark: bool) -> np.ndarray:
        missing = []
        for some, places in self._runs(rows, exclusive=True):
            flags, positions = self.flags[some], _positions(places)
            self._mark(some, flags, mark)
            for view, here in self._views(some, flags):
                for turn in turns(some[here]):  # the steps of a repeated row, one after another
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
        with self._locked(rows):
            here = self.owned(rows)
            self.main[self.slots[rows[here]]] = values[here]
            self.flags[rows[here]] |= DIRTY
        return np.flatnonzero(~here)

    def put(self, rows: np.ndarray, slots: np.ndarray, values: np.ndarray, as_replica: bool) -> None:
        with self._locked(rows):
            if as_replica:
                self.replica[slots, 0], self.replica[slots, 1] = values, 0
            else:
                self.main[slots] = values
            self.slots[rows] = slots
            self.flags[rows] = PRESENT | (REPLICA if as_replica else 0)

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        with self._locked(rows):
            out[:] = self.main[self.slots[rows]]
            self.flags[rows] = 0

    def clean(self, rows: np.ndarray) -> np.ndarray:
        with self._locked(rows):
            changed = np.flatnonzero(self.flags[rows] & DIRTY)
            self.flags[rows[changed]] &= ~np.uint32(DIRTY)
        return changed

    def collect(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with self._locked(rows):
            changed = np.flatnonzero(self.flags[rows] & DIRTY)
            slots = self.slots[rows[changed]]
            deltas = self.replica[slots, 1]
            self.replica[slots, 1] = 0
            self.flags[rows[changed]] &= ~np.uint32(DIRTY)
        return changed, deltas

    def refresh(self, rows: np.ndarray, values: np.ndarray) -> None:
        with self._locked(rows):
            slots = self.slots[rows]
            self.replica[slots, 0] = values + self.replica[slots, 1]

    def overwrite(self, rows: np.ndarray, values: np.ndarray) -> None:
        with self._locked(rows):
            slots = self.slots[rows]
            self.replica[slots, 0], self.replica[slots, 1] = values, 0
            self.flags[rows] &= ~np.uint32(DIRTY)

    def release(self, rows: np.ndarray) -> np.ndarray:
        with self._locked(rows):
            released = np.flatnonzero(self.flags[rows] & DIRTY == 0)
            self.flags[rows[released]] = 0
        return released

    def _mark(self, rows: np.ndarray, flags: np.ndarray, main_too: bool) -> None:
        """Count replicas and, with ``main_too``, main copies as changed."""
        changed = (flags & PRESENT != 0) & (main_too or flags & REPLICA != 0)
        self.flags[rows] = flags | np.where(changed, DIRTY, 0).astype(np.uint32)

    def _views(
        self, rows: np.ndarray, flags: np.ndarray, with_deltas: bool = False
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(array, positions of ``rows`` in it, by slot): main copies, replicas' values and, if wanted, their deltas."""
        main = np.flatnonzero(flags & (PRESENT | REPLICA) == PRESENT)
        replicas = np.flatnonzero(flags & (PRESENT | REPLICA) == PRESENT | REPLICA)
        if main.size:
            yield self.main, main
        if replicas.size:
            yield self.replica[:, 0], replicas
            if with_deltas:
                yield self.replica[:, 1], replicas

    def _runs(self, rows: np.ndarray, *, exclusive: bool) -> Iterator[tuple[np.ndarray, slice | np.ndarray]]:
        """``rows`` in runs of ascending order, each under a lock, with their places in the call's buffer."""
        order = None if np.all(rows[1:] >= rows[:-1]) else np.argsort(rows, kind="stable")
        if order is not None:
            rows = rows[order]
        for a in range(0, rows.size, _RUN):
            b = min(a + _RUN, rows.size)
            with self._interval(int(rows[a]), int(rows[b - 1]) + 1, exclusive):
                yield rows[a:b], slice(a, b) if order is None else order[a:b]

    @contextmanager
    def _locked(self, rows: np.ndarray) -> Iterator[None]:
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
        # A ``struct flock`` of 64-bit Linux.
        flock = struct.pack("hhqqi4x", kind, os.SEEK_SET, self._first_key + first, end - first, 0)
        fcntl.fcntl(self._file, fcntl.F_OFD_SETLKW, flock)


def _positions(places: slice | np.ndarray) -> np.ndarray:
    return np.arange(places.start, places.stop) if isinstance(places, slice) else places
