"""What a node's manager knows of one segment, beside the rows themselves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lapse_elmo.ps.api import NodeStats
from lapse_elmo.ps.layout import Segment
from lapse_elmo.ps.memory import NodeMemory
from lapse_elmo.ps.rows import MAIN_ROWS, PRESENT, REPLICA_ROWS, open_rows
from lapse_elmo.ps.whereabouts import epoch_of, home_of, learn, stamp

_CHUNK_BYTES = 1 << 24


def where_name(segment: Segment) -> str:
    """Name of the array of stamps (num_rows,) in the node's memory."""
    return f"{segment.name} where"


class Slots:
    """Free places of an array: the lowest that were never used, and those given back.

    :param reserve: called with [first, end) before slots of this range are used for the first time.
    """

    def __init__(self, reserve: Callable[[int, int], None], chunk: int, capacity: int) -> None:
        self._reserve = reserve
        self._chunk, self._capacity = max(chunk, 1), capacity
        self._free = np.empty(capacity, np.int32)
        self._num_free, self._next, self._reserved = 0, 0, 0

    def take(self, number: int) -> np.ndarray:
        """``number`` slots (number,) int64."""
        again = min(number, self._num_free)
        self._num_free -= again
        fresh = number - again
        first, self._next = self._next, self._next + fresh
        self._reserve_to(self._next)
        returned = self._free[self._num_free : self._num_free + again]
        return np.concatenate([returned, np.arange(first, self._next)]).astype(np.int64)

    def prepare(self) -> bool:
        """While there is nothing else to do, reserve what will be needed next; whether there was something."""
        if self._num_free + self._reserved - self._next >= self._chunk // 2 or self._reserved >= self._capacity:
            return False
        self._reserve_to(self._reserved + 1)
        return True

    def _reserve_to(self, end: int) -> None:
        if end > self._reserved:
            end = min(max(end, self._reserved + self._chunk), self._capacity)
            self._reserve(self._reserved, end)
            self._reserved = end

    def give(self, slots: np.ndarray) -> None:
        """Give ``slots`` back."""
        self._free[self._num_free : self._num_free + slots.size] = slots
        self._num_free += slots.size


class SegmentState:
    """The rows of one segment on one node, and who wants, lends and borrows which. For the manager's thread alone.

    ``where`` (num_rows,) stamps, which the node's workers read. ``intents``: intents of the node's workers that are
    under way. ``wanted``: asked for, not yet here. ``lender``: node of the main copy of a replica, -1 for other rows.
    ``holders`` (num_nodes, num_rows): which nodes have replicas of a main copy that is here, ``num_holders`` how many;
    ``stale``: which of them have not been sent its newest value.
    """

    def __init__(
        self, number: int, segment: Segment, memory: NodeMemory, node: int, num_nodes: int, is_native: bool
    ) -> None:
        self.number, self.segment, self.node = number, segment, node
        self.stats = NodeStats()
        self.rows = open_rows(memory, segment, is_native)
        self.where = memory.arrays[where_name(segment)]
        total = segment.num_rows
        self.intents = np.zeros(total, np.int32)
        self.wanted = np.zeros(total, bool)
        self.lender = np.full(total, -1, np.int32)
        self.holders = np.zeros((num_nodes, total), bool)
        self.stale = np.zeros((num_nodes, total), bool)
        self.num_holders = np.zeros(total, np.int32)
        self._borrowed: np.ndarray | None = None
        self._lent: np.ndarray | None = None
        chunk = _CHUNK_BYTES // (4 * segment.row_width)
        self._main_slots = Slots(lambda a, b: memory.reserve(segment.name + MAIN_ROWS, a, b), chunk, total)
        self._replica_slots = Slots(
            lambda a, b: memory.reserve(segment.name + REPLICA_ROWS, a, b), chunk // 2, total if num_nodes > 1 else 0
        )

    def occupy(self, num_nodes: int) -> None:
        """Take the rows whose home this node is, all zero, before any worker asks for them."""
        mine = np.arange(self.node, self.segment.num_rows, num_nodes)
        self.where[:] = home_of(np.arange(self.segment.num_rows), num_nodes)
        self.rows.slots[mine] = self._main_slots.take(mine.size)
        self.rows.flags[mine] = PRESENT

    def prepare(self) -> bool:
        """While there is nothing else to do, make room for rows that may come; whether some was made."""
        return self._main_slots.prepare() or self._replica_slots.prepare()

    @property
    def borrowed(self) -> np.ndarray:
        """Rows with a replica here, ascending."""
        if self._borrowed is None:
            self._borrowed = np.flatnonzero(self.lender >= 0)
        return self._borrowed

    @property
    def lent(self) -> np.ndarray:
        """Rows whose main copy is here and that have replicas elsewhere, ascending."""
        if self._lent is None:
            self._lent = np.flatnonzero(self.num_holders)
        return self._lent

    def add_main(self, rows: np.ndarray, stamps: np.ndarray, values: np.ndarray) -> None:
        """Main copies arrive."""
        self.wanted[rows] = False
        learn(self.where, rows, stamps)
        self.rows.put(rows, self._main_slots.take(rows.size), values, as_replica=False)

    def give_main(self, rows: np.ndarray, receiver: int, out: np.ndarray) -> np.ndarray:
        """Main copies leave, into ``out``; their new stamps."""
        slots = self.rows.slots[rows].copy()
        self.rows.take(rows, out)
        self._main_slots.give(slots)
        self.where[rows] = stamp(epoch_of(self.where[rows]) + 1, receiver)
        return self.where[rows]

    def add_replicas(self, rows: np.ndarray, stamps: np.ndarray, values: np.ndarray, lender: int) -> None:
        """Replicas arrive."""
        self.wanted[rows] = False
        learn(self.where, rows, stamps)
        self.lender[rows] = lender
        self._borrowed = None
        self.rows.put(rows, self._replica_slots.take(rows.size), values, as_replica=True)

    def release(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Let replicas go that have no deltas: (rows that went, their lenders)."""
        slots = self.rows.slots[rows].copy()
        which = self.rows.release(rows)
        gone = rows[which]
        self._replica_slots.give(slots[which])
        lenders = self.lender[gone]
        self.lender[gone] = -1
        self._borrowed = None
        return gone, lenders

    def lend(self, rows: np.ndarray, holder: int) -> None:
        """``holder`` gets replicas of main copies that are here."""
        self._count(rows[~self.holders[holder, rows]], holder, 1)

    def unlend(self, rows: np.ndarray, holder: int) -> None:
        """``holder`` has dropped its replicas."""
        self._count(rows[self.holders[holder, rows]], holder, -1)

    def mark_stale(self, rows: np.ndarray, but: int = -1) -> None:
        """Main copies have changed: all who hold replicas of them, ``but`` one, need the new values."""
        for holder in range(len(self.holders)):
            if holder not in (but, self.node):
                self.stale[holder, rows] |= self.holders[holder, rows]

    def take_stale(self, holder: int, rows: np.ndarray) -> np.ndarray:
        """Those of ``rows`` whose new values ``holder`` needs; it is about to be sent them."""
        needed = rows[self.stale[holder, rows]]
        self.stale[holder, needed] = False
        return needed

    def _count(self, rows: np.ndarray, holder: int, change: int) -> None:
        self.holders[holder, rows] = change > 0
        self.stale[holder, rows] = False
        self.num_holders[rows] += change
        self._lent = None

    def close(self) -> None:
        """Let go of the node's memory."""
        self.rows.close()
        del self.where
