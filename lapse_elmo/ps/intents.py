"""Intents of a node's workers: which are active at the workers' clocks."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from lapse_elmo.ps.node_state import SegmentState

HORIZON = 32  # clocks before its start at which an intent becomes active and its rows are requested


class Intents:
    """Counts the active intents per row in ``SegmentState.intents``: from ``HORIZON`` clocks before start to end.

    Args:
        states: The node's bookkeeping, by segment number.
        clocks: (workers,) int64, the clocks of the node's workers in shared memory; only read here.
    """

    def __init__(self, states: Sequence[SegmentState], clocks: np.ndarray) -> None:
        self._states = states
        self._clocks = clocks
        self._last_clocks = clocks.tobytes()
        self._number = 0  # breaks ties in the heaps, whose entries' arrays cannot be compared
        Entry = tuple[int, int, int, np.ndarray, int]
        self._scheduled: list[list[Entry]] = [[] for _ in clocks]  # per worker, a heap by start
        self._active: list[list[Entry]] = [[] for _ in clocks]  # per worker, a heap by end

    def add(self, segment: int, rows: np.ndarray, worker: int, start: int, end: int) -> np.ndarray:
        """Register an intent of ``worker`` for the distinct ``rows`` in the clocks [start, end).

        Returns:
            The rows to request now: all, or none if the intent starts later or has ended.
        """
        if end <= self._clocks[worker]:
            return rows[:0]
        self._number += 1
        if start > self._clocks[worker] + HORIZON:
            heapq.heappush(self._scheduled[worker], (start - HORIZON, self._number, segment, rows, end))
            return rows[:0]
        heapq.heappush(self._active[worker], (end, self._number, segment, rows, end))
        self._states[segment].intents[rows] += 1
        return rows

    def clocks_advanced(self) -> bool:
        """Return whether a clock has advanced since the last :meth:`advance`."""
        return self._clocks.tobytes() != self._last_clocks

    def advance(self) -> tuple[list[tuple[int, np.ndarray]], list[tuple[int, np.ndarray]]]:
        """Expire and activate intents by the current clocks.

        Returns:
            (segment, rows) lists: rows that have no active intent any more, and rows to request now.
        """
        clocks = self._clocks.copy()
        self._last_clocks = clocks.tobytes()
        ended, due = [], []
        for worker, clock in enumerate(clocks.tolist()):
            while self._active[worker] and self._active[worker][0][0] <= clock:
                _, _, segment, rows, _ = heapq.heappop(self._active[worker])
                counts = self._states[segment].intents
                counts[rows] -= 1
                ended.append((segment, rows[counts[rows] == 0]))
            while self._scheduled[worker] and self._scheduled[worker][0][0] <= clock:
                start, _, segment, rows, end = heapq.heappop(self._scheduled[worker])
                due.append((segment, self.add(segment, rows, worker, start, end)))
        return ended, due
