"""The manager's bookkeeping of one segment on one node: everything but the values of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from lapse_elmo.ps.api import NodeStats
from lapse_elmo.ps.directory import NO_NODE, epoch_of, home_of, is_copied, stamp, update_stamps
from lapse_elmo.ps.holders import Holders
from lapse_elmo.ps.layout import Segment
from lapse_elmo.ps.rows import MAIN_ROWS, PRESENT, REPLICA, REPLICA_ROWS, Rows

_CHUNK_BYTES = 1 << 24  # of rows, reserved at a time: the kernel clears the pages, which is slow


class Memory(Protocol):
    """Named arrays that the workers and the manager of a node share; see :mod:`lapse_elmo.mpi.node_memory`."""

    arrays: dict[str, np.ndarray]

    def reserve(self, name: str, first: int, end: int) -> None:
        """Allocate the memory of the elements [first, end) of an array's first dimension."""


def stamps_name(segment: Segment) -> str:
    """Return the name of the array of owner stamps (num_rows,) in the node's memory."""
    return f"{segment.name} stamps"


def cached_name(segment: Segment) -> str:
    """Return the name of the array of stamps (num_rows,) that the node's workers have received with answers."""
    return f"{segment.name} cached stamps"


class Slots:
    """Allocates the slots of an array: freed ones first, then the lowest that was never used.

    Args:
        reserve: Called with (first, end) before slots of this range are used for the first time.
        chunk: Number of slots to reserve at a time, at least.
        capacity: Number of slots in all.
    """

    def __init__(self, reserve: Callable[[int, int], None], chunk: int, capacity: int) -> None:
        self._reserve = reserve
        self._chunk, self._capacity = max(chunk, 1), capacity
        self._free = np.empty(0, np.int32)  # grows with the number of free slots, not with the capacity
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
        """Reserve memory ahead of its use; return whether any was reserved.

        For idle moments: reserving is slow, since the kernel clears the pages.
        """
        if self._num_free + self._reserved - self._next >= self._chunk // 2 or self._reserved >= self._capacity:
            return False
        self._reserve_to(self._reserved + 1)
        return True

    def _reserve_to(self, end: int) -> None:
        """Reserve the slots below ``end``, by whole chunks."""
        if end > self._reserved:
            end = min(max(end, self._reserved + self._chunk), self._capacity)
            self._reserve(self._reserved, end)
            self._reserved = end

    def free(self, slots: np.ndarray) -> None:
        """Make ``slots`` available again."""
        end = self._num_free + slots.size
        if end > self._free.size:
            self._free = np.concatenate([self._free[: self._num_free], np.empty(end, np.int32)])
        self._free[self._num_free : end] = slots
        self._num_free = end


class SegmentState:
    """The rows of one segment on one node, with their owners, holders, intents and requests.

    Only the manager's thread may use it.

    Args:
        number: The segment's number in messages.
        segment: The segment.
        memory: The node's shared memory.
        rows: Access to the segment's rows for the manager's thread.
        node: Number of this node.
        num_nodes: Number of nodes of the job.

    Attributes:
        stamps: (num_rows,) int64 owner stamps in shared memory, written here and read by the node's workers.
        intents: (num_rows,) int32, the number of active intents of the node's workers for each row.
        wanted: (num_rows,) bool, rows that were requested and have not arrived yet.
        replica_owner: (num_rows,) uint16, the owners of replicas on this node, ``NO_NODE`` for all other rows.
        holders: The nodes that hold replicas of the rows owned here.
    """

    def __init__(self, number: int, segment: Segment, memory: Memory, rows: Rows, node: int, num_nodes: int) -> None:
        self.number, self.segment, self.node, self.num_nodes = number, segment, node, num_nodes
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

    def occupy(self) -> None:
        """Create the frequent rows and those whose home is this node, all zero; before any worker accesses rows."""
        rows = np.arange(self.segment.num_rows)
        self.stamps[:] = home_of(rows, self.num_nodes)
        mine = np.flatnonzero((self.stamps == self.node) | (rows < self.segment.frequent))
        self.rows.slots[mine] = self._main_slots.allocate(mine.size)
        self.rows.flags[mine] = PRESENT

    def set_rows(self, rows: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Overwrite main copies here; return the indices of the rows (n,) that another node has to overwrite."""
        elsewhere = is_copied(rows, self.segment.frequent, self.num_nodes, self.node)
        elsewhere[self.rows.set(rows, values)] = True
        return np.flatnonzero(elsewhere)

    def prepare(self) -> bool:
        """Reserve memory for rows that may come, see :meth:`Slots.prepare`; return whether any was reserved."""
        return self._main_slots.prepare() or self._replica_slots.prepare()

    @property
    def replica_rows(self) -> np.ndarray:
        """Rows with a replica on this node, (n,) int64, ascending."""
        if self._replica_rows is None:
            self._replica_rows = np.flatnonzero(self.replica_owner != NO_NODE)
        return self._replica_rows

    def add_main(self, rows: np.ndarray, stamps: np.ndarray, values: np.ndarray) -> None:
        """Store main copies that have arrived, replacing replicas of the same rows.

        Args:
            rows: (n,) distinct rows, whose main copies are not here.
            stamps: (n,) their owner stamps, which name this node.
            values: (n, row_width) float32; deltas of a replaced replica that were not sent yet are added to them.
        """
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
        """Move main copies into ``out`` (n, row_width) for ``receiver``; return their new owner stamps (n,)."""
        assert self.rows.all_owned(rows), "a row that is not here is to be given"
        slots = self.rows.slots[rows].copy()
        stamps = stamp(epoch_of(self.stamps[rows]) + 1, receiver)
        self.rows.take(rows, out)
        self._main_slots.free(slots)
        self.stamps[rows] = stamps
        return stamps

    def add_replicas(self, rows: np.ndarray, stamps: np.ndarray, values: np.ndarray, owner: int) -> None:
        """Store replicas (n, row_width) that ``owner`` has sent, with the owner stamps (n,) of their rows."""
        self.wanted[rows] = False
        update_stamps(self.stamps, rows, stamps)
        self.replica_owner[rows] = owner
        self._replica_rows = None
        self.rows.put(rows, self._replica_slots.allocate(rows.size), values, as_replica=True)

    def release(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Drop the replicas among ``rows`` that have no deltas; return (the rows dropped, their owners)."""
        slots = self.rows.slots[rows].copy()
        which = self.rows.release(rows)
        gone = rows[which]
        self._replica_slots.free(slots[which])
        owners = self.replica_owner[gone]
        self.replica_owner[gone] = NO_NODE
        self._replica_rows = None
        return gone, owners

    def close(self) -> None:
        """Release the references to shared memory."""
        self.rows.close()
        del self.stamps
