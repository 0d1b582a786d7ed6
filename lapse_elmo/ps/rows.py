"""Access to the rows of one segment on one node, in place, from several processes at once.

A row is present as the main copy or as a replica, or absent. A replica consists of a value and the sum of the deltas
not sent to its owner yet. Workers call ``pull``, ``push`` and ``set`` in their own processes while the node's manager
adds and removes rows; each row is protected by itself, so that no call sees half of another.

There are two implementations: :class:`NativeRows` calls rows.c, with a spin lock per row that writers take, and the
fallback :class:`~lapse_elmo.ps.locked_rows.LockedRows` needs no compiler and uses kernel locks on intervals of rows.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from lapse_elmo.mpi.node_memory import NodeMemory
from lapse_elmo.ps.layout import Segment
from lapse_elmo.ps.rules import Rule

PRESENT, REPLICA, DIRTY = 2, 4, 8  # flags of a row's entry, as in rows.c
MAIN, COPY = PRESENT, PRESENT | REPLICA  # a row's main copy is here, or a replica
MAIN_ROWS, REPLICA_ROWS = " main", " replica"  # suffixes of array names; their memory is reserved as slots are used
SOURCE = Path(__file__).parent / "rows.c"
_INT64, _FLOAT32 = np.dtype(np.int64), np.dtype(np.float32)


def array_shapes(segment: Segment, several_nodes: bool) -> dict[str, tuple[tuple[int, ...], type]]:
    """Return the (shape, dtype) by name of a segment's arrays in shared memory; replicas only with several nodes."""
    replicas = segment.num_rows if several_nodes else 0
    return {
        f"{segment.name} entries": ((segment.num_rows, 2), np.uint32),
        segment.name + MAIN_ROWS: ((segment.num_rows, segment.row_width), np.float32),
        segment.name + REPLICA_ROWS: ((replicas, 2, segment.row_width), np.float32),
    }


class Rows(ABC):
    """Accessor of the rows of ``segment`` in ``memory``, for use by one thread.

    In all methods, ``rows`` (n,) are int64 row numbers within the segment, and results that select some of them are
    indices into ``rows``, (m,) int64, ascending. ``values`` and ``deltas`` are float32 of whole rows, (n, row_width),
    unless stated otherwise. Buffers are only used during the call. Methods from ``put`` on are for the manager, and
    their ``rows`` are distinct and of the stated kind.

    Attributes:
        entries: (num_rows, 2) uint32, each row's flags and slot; ``flags`` and ``slots`` are views of it.
        main: (num_rows, row_width) float32, main copies by slot.
        replica: (num_rows, 2, row_width) float32, values and deltas of replicas by slot.
    """

    def __init__(self, memory: NodeMemory, segment: Segment) -> None:
        arrays = memory.arrays
        entries = arrays[f"{segment.name} entries"]
        self.width, self.row_width, self.rule = segment.width, segment.row_width, segment.rule
        self.entries = entries
        self.flags, self.slots = entries[:, 0], entries[:, 1].view(np.int32)
        self.main, self.replica = arrays[segment.name + MAIN_ROWS], arrays[segment.name + REPLICA_ROWS]

    def present(self, rows: np.ndarray) -> np.ndarray:
        """Return which rows are here, as main copy or replica, (n,) bool."""
        return self.flags[rows] & PRESENT != 0

    def owned(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Return which rows have their main copy here, (n,) bool."""
        return self.flags[rows] & (PRESENT | REPLICA) == PRESENT

    def all_owned(self, rows: np.ndarray) -> bool:
        """Return whether the main copies of all ``rows`` are here."""
        return bool(self.owned(rows).all())

    def kinds(self) -> np.ndarray:
        """Return ``MAIN`` or ``COPY`` for the rows that are here, 0 for others, (num_rows,)."""
        return self.flags & COPY

    @abstractmethod
    def pull(self, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Copy the rows that are here into ``out``: (n, width), or (n, row_width) for whole rows.

        Returns:
            Indices of the rows that are not here; ``out`` is not changed there.
        """

    def push(self, rows: np.ndarray, values: np.ndarray, rate: float = 0.0, mark: bool = True) -> np.ndarray:
        """Add ``values`` (n, width) to the rows that are here; repeated rows get all of theirs.

        If the segment has a rule, ``values`` are gradients, and each makes a step at the learning rate ``rate``.

        Args:
            rows: (n,) rows, in any order.
            values: (n, width) float32.
            rate: Learning rate, used if there is a rule.
            mark: Whether main copies become dirty; replicas always do.

        Returns:
            Indices of the rows that are not here.
        """
        if self.rule is None:
            return self.add(rows, values, mark)
        return self._step(self.rule, rows, values, rate, mark)

    @abstractmethod
    def add(self, rows: np.ndarray, deltas: np.ndarray, mark: bool = True) -> np.ndarray:
        """Add ``deltas`` to the rows that are here, ignoring any rule; otherwise as :meth:`push`."""

    @abstractmethod
    def _step(self, rule: Rule, rows: np.ndarray, gradients: np.ndarray, rate: float, mark: bool) -> np.ndarray:
        """Take a step of ``rule`` per row with ``gradients`` (n, width); otherwise as :meth:`push`."""

    @abstractmethod
    def set(self, rows: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Overwrite the main copies that are here; return the indices of other rows, also of replicas."""

    @abstractmethod
    def put(self, rows: np.ndarray, slots: np.ndarray, values: np.ndarray, as_replica: bool) -> None:
        """Store absent rows in ``slots`` (n,), as main copies or as replicas without deltas."""

    @abstractmethod
    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Move main copies to ``out``; the rows become absent."""

    @abstractmethod
    def promote(self, rows: np.ndarray, slots: np.ndarray, values: np.ndarray) -> None:
        """Make replicas main copies in ``slots`` (n,), with ``values`` plus the replicas' deltas."""

    @abstractmethod
    def clear_dirty(self, rows: np.ndarray) -> np.ndarray:
        """Clear the dirty flags of main copies; return the indices of those that had changed since the last call."""

    @abstractmethod
    def collect(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Take the deltas of the replicas that have any, and clear them there; return (indices, deltas)."""

    @abstractmethod
    def refresh(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Set replicas to ``values``, the owner's, plus their own deltas."""

    @abstractmethod
    def overwrite(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Set replicas to ``values`` and discard their deltas."""

    @abstractmethod
    def release(self, rows: np.ndarray) -> np.ndarray:
        """Remove the replicas that have no deltas; return their indices."""

    def close(self) -> None:
        """Release the references to shared memory."""
        del self.entries, self.flags, self.slots, self.main, self.replica


# The arguments of rows.c's functions: p for a pointer, i for int64, f for float. Those of _LISTING return how many
# indices they have listed in the last argument, the others return nothing.
_ARGUMENTS = {
    "owned": "ppi", "pull": "pppiipipp", "add": "pppipipip", "step": "pppiiipipffip", "set": "ppipipp",
    "put": "pppipippi", "take": "ppipip", "promote": "pppipipp", "clear_dirty": "ppip", "collect": "ppipipp",
    "refresh": "ppipip", "overwrite": "ppipip", "release": "ppip",
}
_LISTING = ("owned", "pull", "add", "step", "set", "clear_dirty", "collect", "release")
_ANYTHING = ctypes.c_char * 0  # an array of any size and kind contains it
_CTYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}


class NativeRows(Rows):
    """Rows through rows.c, whose functions run without the interpreter's lock.

    Before a pointer is passed to C, dtype, shape and contiguity of its array are asserted.
    """

    def __init__(self, memory: NodeMemory, segment: Segment, library: ctypes.CDLL) -> None:
        super().__init__(memory, segment)
        self._functions: dict[str, Any] = {}
        for name, codes in _ARGUMENTS.items():
            function = getattr(library, f"rows_{name}")
            function.argtypes = [_CTYPES[code] for code in codes]
            function.restype = ctypes.c_int64 if name in _LISTING else None
            self._functions[name] = function
        # Determined once: NumPy takes longer to find an address than rows.c takes for a few rows.
        self._entries, self._main, self._replica = map(_address, (self.entries, self.main, self.replica))

    def all_owned(self, rows: np.ndarray) -> bool:
        """Return whether the main copies of all ``rows`` are here, without a temporary array."""
        assert rows.dtype == _INT64, rows.dtype
        return self._call("owned", self._entries, rows, rows.size) == rows.size

    def pull(self, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Call rows_pull."""
        assert out.ndim == 2 and out.shape[1] <= self.row_width, out.shape
        _check(rows, out, out.shape[1])
        return self._list("pull", (self._entries, self._main, self._replica, self.row_width, out.shape[1]), rows, out)

    def add(self, rows: np.ndarray, deltas: np.ndarray, mark: bool = True) -> np.ndarray:
        """Call rows_add."""
        _check(rows, deltas, self.row_width)
        return self._list("add", (self._entries, self._main, self._replica, self.row_width), rows, deltas, int(mark))

    def _step(self, rule: Rule, rows: np.ndarray, gradients: np.ndarray, rate: float, mark: bool) -> np.ndarray:
        _check(rows, gradients, self.width)
        before = (self._entries, self._main, self._replica, self.row_width, self.width, rule.code)
        return self._list("step", before, rows, gradients, float(rate), float(rule.epsilon), int(mark))

    def set(self, rows: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Call rows_set."""
        _check(rows, values, self.row_width)
        return self._list("set", (self._entries, self._main, self.row_width), rows, values)

    def put(self, rows: np.ndarray, slots: np.ndarray, values: np.ndarray, as_replica: bool) -> None:
        """Call rows_put."""
        _check(rows, values, self.row_width, slots)
        before = (self._entries, self._main, self._replica, self.row_width)
        self._call("put", *before, rows, rows.size, slots, values, int(as_replica))

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Call rows_take."""
        _check(rows, out, self.row_width)
        self._call("take", self._entries, self._main, self.row_width, rows, rows.size, out)

    def promote(self, rows: np.ndarray, slots: np.ndarray, values: np.ndarray) -> None:
        """Call rows_promote."""
        _check(rows, values, self.row_width, slots)
        self._call("promote", self._entries, self._main, self._replica, self.row_width, rows, rows.size, slots, values)

    def clear_dirty(self, rows: np.ndarray) -> np.ndarray:
        """Call rows_clear_dirty."""
        return self._list("clear_dirty", (self._entries,), rows)

    def collect(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Call rows_collect for the replicas that are dirty now; those that become so later are for the next call."""
        # Selecting them first keeps the buffer as small as the deltas, of which there are usually few.
        dirty = np.flatnonzero(self.flags[rows] & DIRTY)
        deltas = np.empty((dirty.size, self.row_width), np.float32)
        which = self._list("collect", (self._entries, self._replica, self.row_width), rows[dirty], deltas)
        return dirty[which], deltas[: which.size]

    def refresh(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Call rows_refresh."""
        _check(rows, values, self.row_width)
        self._call("refresh", self._entries, self._replica, self.row_width, rows, rows.size, values)

    def overwrite(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Call rows_overwrite."""
        _check(rows, values, self.row_width)
        self._call("overwrite", self._entries, self._replica, self.row_width, rows, rows.size, values)

    def release(self, rows: np.ndarray) -> np.ndarray:
        """Call rows_release."""
        return self._list("release", (self._entries,), rows)

    def _list(self, name: str, before: tuple[int, ...], rows: np.ndarray, *more: np.ndarray | float) -> np.ndarray:
        """Call a function of rows.c that lists indices into ``rows`` in its last argument; return them."""
        assert rows.dtype == _INT64 and rows.ndim == 1, (rows.dtype, rows.shape)
        listed = np.empty(rows.size, np.int64)
        number = self._call(name, *before, rows, rows.size, *more, listed)
        return listed[:number]

    def _call(self, name: str, *arguments: np.ndarray | float) -> int:
        """Call ``rows_<name>`` with ``arguments``: addresses and other ints, floats, and arrays as their addresses."""
        return int(self._functions[name](*[_address(a) if isinstance(a, np.ndarray) else a for a in arguments]) or 0)


def _address(array: np.ndarray) -> int:
    """Return the address of a contiguous array. ``array.ctypes.data`` is the same, but takes eight times as long."""
    try:
        return ctypes.addressof(_ANYTHING.from_buffer(array.data))  # which refuses arrays that are not contiguous
    except TypeError:
        assert array.flags.c_contiguous and not array.flags.writeable, array.strides
        return array.ctypes.data


def _check(rows: np.ndarray, values: np.ndarray, width: int, slots: np.ndarray | None = None) -> None:
    """Assert that ``values`` (n, width) and ``slots`` (n,) belong to ``rows`` (n,), with the dtypes that rows.c has."""
    assert rows.dtype == _INT64 and rows.ndim == 1, (rows.dtype, rows.shape)
    shape = (rows.size, width)
    assert values.dtype == _FLOAT32 and values.shape == shape, (values.dtype, values.shape, shape)
    assert slots is None or (slots.dtype == _INT64 and slots.shape == rows.shape), (slots, rows.shape)
