"""The manager's bookkeeping of one segment on one node: everything but the values of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from lapse_elmo.ps.api import NodeStats
from lapse_elmo.ps.directory import NO_NODE, epoch_of, home_of, stamp, update_stamps
from lapse_elmo.ps.holders import Holders
from lapse_elmo.ps.layout import Segment
from lapse_elmo.ps.rows import MAIN_ROWS, PRESENT, REPLICA, REPLICA_ROWS, Rows

_CHUNK_BYTES = 1 << 24


class Memory(Protocol):
    """Named arrays that the workers and the manager of a node share; see :class:`~lapse_elmo.ps.memory.NodeMemory`."""

    arrays: dict[str, np.ndarray]

    def reserve(self, name: str, first: int, end: int) -> None:
        """Take the memory of the elements [first, end) of an array."""


def stamps_name(segment: Segment) -> str:
    """Return the name of the array of owner stamps (num_rows,) in the node's memory."""
    return f"{segment.name} stamps"


def cached_name(segment: Segment) -> str:
    """Return the name of the array of stamps (num_rows,) that the node's workers have learned of."""
    return f"{segment.name} cached stamps"


class Slots:
    """Free places of an array: the lowest that were never used, and those that were given back.

    :param reserve: called with [first, end) before slots of this range are used for the first time.
    """

    def __init__(self, reserve: Callable[[int, int], None], chunk: int, capacity: int) -> None:
        self._reserve = reserve
        self._chunk, self._capacity = max(chunk, 1), capacity
        self._free = np.empty(0, np.int32)  # grows with what was given back at once, not with the capacity
        self._num_free, self._next, self._reserved = 0, 0, 0

    def allocate(self, number: int) -> np.ndarray:
        """Return ``number`` slots (number,) int64."""
        again = min(number, self._num_free)
        self._num_free -= again
        fresh = number - again
        first, self._next = self._next, self._next + fresh
        self._reserve_to(self._next)
        returned = self._free[self._num_free : self._num_free + again]
        return np.concatenate([returned, np.arange(first, self._next)]).astype(np.int64)

    def prepare(self) -> bool:
        """While there is nothing else to do, reserve what will be needed next; return whether there was something."""
        if self._num_free + self._reserved - self._next >= self._chunk // 2 or self._reserved >= self._capacity:
            return False
        self._reserve_to(self._reserved + 1)
        return True

    def _reserve_to(self, end: int) -> None:
        if end > self._reserved:
            end = min(max(end, self._reserved + self._chunk), self._capacity)
            self._reserve(self._reserved, end)
            self._reserved = end

    def free(self, slots: np.ndarray) -> None:
        """Give ``slots`` back."""
        end = self._num_free + slots.size
        if end > self._free.size:
            self._free = np.concatenate([self._free[: self._num_free], np.empty(end, np.int32)])
        self._free[self._num_free : end] = slots
        self._num_free = end


class SegmentState:
    """The rows of one segment on one node, and who wants, lends and borrows which. For the manager's thread alone.

    :ivar stamps: (num_rows,) int64 owner stamps, which the node's workers read.
    :ivar intents: (num_rows,) int32, intents of the node's workers that are under way.
    :ivar wanted: (num_rows,) bool, asked for and not here yet.
    :ivar replica_owner: (num_rows,) uint16, the owner of a replica that is here, `NO_NODE` for other rows.
    """

    def __init__(self, number: int, segment: Segment, memory: Memory, rows: Rows, node: int, num_nodes: int) -> None:
        self.number, self.segment, self.node = number, segment, node
        self.stats = NodeStats()
        self.rows = rows
        self.stamps = memory.arrays[stamps_name(segment)]
        total = segment.num_rows
        self.intents = np.zeros(total, np.int32)
        self.wanted = np.zeros(total, bool)
        self.replica_owner = np.full(total, NO_NODE, np.uint16)
        self.holders = Holders(total)
        self._replica_rows: np.ndarray | None = None
        chunk = _CHUNK_BYTES // (4 * segment.row_width)
        self._main_slots = Slots(lambda a, b: memory.reserve(segment.name + MAIN_ROWS, a, b), chunk, total)
        self._replica_slots = Slots(
            lambda a, b: memory.reserve(segment.name + REPLICA_ROWS, a, b), chunk // 2, total if num_nodes > 1 else 0
        )

    def occupy(self, num_nodes: int) -> None:
        """Take the rows whose home this node is, all zero, before any worker asks for them."""
        mine = np.arange(self.node, self.segment.num_rows, num_nodes)
        self.stamps[:] = home_of(np.arange(self.segment.num_rows), num_nodes)
        self.rows.slots[mine] = self._main_slots.allocate(mine.size)
        self.rows.flags[mine] = PRESENT

    def prepare(self) -> bool:
        """While there is nothing else to do, make room for rows that may come; return whether some was made."""
        return self._main_slots.prepare() or self._replica_slots.prepare()

    @property
    def replica_rows(self) -> np.ndarray:
        """Rows with a replica here, ascending."""
        if self._replica_rows is None:
            self._replica_rows = np.flatnonzero(self.replica_owner != NO_NODE)
        return self._replica_rows

    def add_main(self, rows: np.ndarray, stamps: np.ndarray, values: np.ndarray) -> None:
        """Main copies arrive, in place of the replicas of those rows that have one."""
        self.wanted[rows] = False
        update_stamps(self.stamps, rows, stamps)
        held = self.rows.flags[rows] & REPLICA != 0
        slots = self._main_slots.allocate(rows.size)
        if held.any():
            promoted = rows[held]
            old = self.rows.slots[promoted].copy()
            self.rows.promote(promoted, slots[held], values[held])
            self._replica_slots.free(old)
            self.replica_owner[promoted] = NO_NODE
            self._replica_rows = None
            rows, slots, values = rows[~held], slots[~held], values[~held]
        self.rows.put(rows, slots, values, as_replica=False)

    def give_main(self, rows: np.ndarray, receiver: int, out: np.ndarray) -> np.ndarray:
        """Main copies leave, into ``out``; return their new stamps."""
        slots = self.rows.slots[rows].copy()
        stamps = stamp(epoch_of(self.stamps[rows]) + 1, receiver)
        self.rows.take(rows, out)
        self._main_slots.free(slots)
        self.stamps[rows] = stamps
        return stamps

    def add_replicas(self, rows: np.ndarray, stamps: np.ndarray, values: np.ndarray, owner: int) -> None:
        """Replicas arrive."""
        self.wanted[rows] = False
        update_stamps(self.stamps, rows, stamps)
        self.replica_owner[rows] = owner
        self._replica_rows = None
        self.rows.put(rows, self._replica_slots.allocate(rows.size), values, as_replica=True)

    def release(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Let replicas go that have no deltas; return (rows that went, their owners)."""
        slots = self.rows.slots[rows].copy()
        which = self.rows.release(rows)
        gone = rows[which]
        self._replica_slots.free(slots[which])
        owners = self.replica_owner[gone]
        self.replica_owner[gone] = NO_NODE
        self._replica_rows = None
        return gone, owners

    def close(self) -> None:
        """Let go of the node's memory."""
        self.rows.close()
        del self.stamps
