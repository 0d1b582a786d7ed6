"""The rows of one segment on one node: which are here, where they lie, and how they are read and changed in place.

A row is present as the main copy or as a replica, or absent. A replica is a value and, beside it, the sum of the deltas
that its owner has not been sent yet. Workers call ``pull``, ``push`` and ``set`` straight from their processes, while
the node's manager moves rows in and out; each row is guarded by itself, so that no call sees half of another.

Two implementations of the same methods: :class:`NativeRows` goes through rows.c, with a spin lock a row;
:class:`~lapse_elmo.ps.locked_rows.LockedRows` needs no compiler and guards intervals of rows by locks of the kernel.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np

from lapse_elmo.ps.layout import Segment
from lapse_elmo.ps.memory import NodeMemory
from lapse_elmo.ps.rules import Rule

PRESENT, REPLICA, DIRTY = 2, 4, 8  # as in rows.c
MAIN, COPY = PRESENT, PRESENT | REPLICA  # kinds of rows
MAIN_ROWS, REPLICA_ROWS = " main", " replica"  # endings of the names of arrays whose memory is reserved slot by slot
SOURCE = Path(__file__).parent / "rows.c"


def array_shapes(segment: Segment, several_nodes: bool) -> dict[str, tuple[tuple[int, ...], type]]:
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
    def promote(self, rows: np.ndarray, slots: np.ndarray, values: np.ndarray) -> None:
        """Let replicas become main copies in ``slots``: ``values`` plus their deltas."""

    @abstractmethod
    def clear_dirty(self, rows: np.ndarray) -> np.ndarray:
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


class NativeRows(Rows):
    """Through rows.c, whose calls run without the interpreter's lock."""

    def __init__(self, memory: NodeMemory, segment: Segment, library: ctypes.CDLL) -> None:
        super().__init__(memory, segment)
        self._library = library
        for name in ("owned", "pull", "add", "step", "set", "clear_dirty", "collect", "release"):
            getattr(library, f"rows_{name}").restype = ctypes.c_int64

    def all_owned(self, rows: np.ndarray) -> bool:
        return self._call("owned", self.entries, rows, rows.size) == rows.size

    def pull(self, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        assert out.shape[1] <= self.row_width
        return self._list("pull", (self.entries, self.main, self.replica, self.row_width, out.shape[1]), rows, out)

    def add(self, rows: np.ndarray, deltas: np.ndarray, mark: bool = True) -> np.ndarray:
        assert deltas.shape[1] == self.row_width
        return self._list("add", (self.entries, self.main, self.replica, self.row_width), rows, deltas, int(mark))

    def _step(self, rule: Rule, rows: np.ndarray, gradients: np.ndarray, rate: float, mark: bool) -> np.ndarray:
        assert gradients.shape[1] == self.width
        before = (self.entries, self.main, self.replica, self.row_width, self.width, rule.code)
        return self._list("step", before, rows, gradients, float(rate), float(rule.epsilon), int(mark))

    def set(self, rows: np.ndarray, values: np.ndarray) -> np.ndarray:
        return self._list("set", (self.entries, self.main, self.row_width), rows, values)

    def put(self, rows: np.ndarray, slots: np.ndarray, values: np.ndarray, as_replica: bool) -> None:
        before = (self.entries, self.main, self.replica, self.row_width)
        self._call("put", *before, rows, rows.size, slots, values, int(as_replica))

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        self._call("take", self.entries, self.main, self.row_width, rows, rows.size, out)

    def promote(self, rows: np.ndarray, slots: np.ndarray, values: np.ndarray) -> None:
        self._call("promote", self.entries, self.main, self.replica, self.row_width, rows, rows.size, slots, values)

    def clear_dirty(self, rows: np.ndarray) -> np.ndarray:
        return self._list("clear_dirty", (self.entries,), rows)

    def collect(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Only as much room as there are changed rows now; one that changes meanwhile has its turn next time.
        dirty = np.flatnonzero(self.flags[rows] & DIRTY)
        deltas = np.empty((dirty.size, self.row_width), np.float32)
        which = self._list("collect", (self.entries, self.replica, self.row_width), rows[dirty], deltas)
        return dirty[which], deltas[: which.size]

    def refresh(self, rows: np.ndarray, values: np.ndarray) -> None:
        self._call("refresh", self.entries, self.replica, self.row_width, rows, rows.size, values)

    def overwrite(self, rows: np.ndarray, values: np.ndarray) -> None:
        self._call("overwrite", self.entries, self.replica, self.row_width, rows, rows.size, values)

    def release(self, rows: np.ndarray) -> np.ndarray:
        return self._list("release", (self.entries,), rows)

    def _list(
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
