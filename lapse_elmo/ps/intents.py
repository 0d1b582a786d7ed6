"""Intents of a node's workers: which are under way, and when they end."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from lapse_elmo.ps.node_state import SegmentState

HORIZON = 32  # clocks: an intent is acted on when its start is at most so far away


class Intents:
    """Counts intents in ``SegmentState.intents`` from their announcement to the end of their clocks.

    :param clocks: (workers of the node,) int64, in memory that the workers advance.
    """

    def __init__(self, states: Sequence[SegmentState], clocks: np.ndarray) -> None:
        self._states = states
        self._clocks = clocks
        self._last_clocks = clocks.tobytes()
        self._number = 0  # so that entries of equal clocks are never compared further
        Entry = tuple[int, int, int, np.ndarray, int]
        self._scheduled: list[list[Entry]] = [[] for _ in clocks]  # by start
        self._active: list[list[Entry]] = [[] for _ in clocks]  # by end

    def add(self, segment: int, rows: np.ndarray, worker: int, start: int, end: int) -> np.ndarray:
        """Register an intent for distinct ``rows``; return those to act on now."""
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
        """Return whether a clock has advanced since :meth:`advance`."""
        return self._clocks.tobytes() != self._last_clocks

    def advance(self) -> tuple[list[tuple[int, np.ndarray]], list[tuple[int, np.ndarray]]]:
        """Look at the clocks; return (segment, rows) whose intents have all ended, and those to act on now."""
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
