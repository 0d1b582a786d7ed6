"""Which replicas of a node's main copies other nodes hold, and which of them are out of date: O(rows lent) memory.

Each main copy has a version, which counts up when its value changes. For each holder the owner stores the rows that are
lent to it and the version that was last sent of each. What the holder itself added needs no sending back: its replica
has it already, though perhaps rounded in another way, which ``exact`` asks for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class _Lent:
    """The rows lent to one holder, ascending."""

    rows: np.ndarray  # (n,) int64
    sent: np.ndarray  # (n,) int64: version that the replica has
    rounded: np.ndarray  # (n,) bool: whether it may differ in rounding
    ending: np.ndarray  # (n,) bool: whether the holder will drop it after the round under way

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Return all arrays, in the order of the fields."""
        return self.rows, self.sent, self.rounded, self.ending

    def find(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (indices of those of ``rows`` that are lent, which of ``rows`` they are)."""
        places = np.searchsorted(self.rows, rows)
        places[places == self.rows.size] = 0
        found = self.rows[places] == rows if self.rows.size else np.zeros(rows.size, bool)
        return places[found], np.flatnonzero(found)


class Lending:
    """Replicas elsewhere of the main copies of one segment on one node."""

    def __init__(self, num_rows: int) -> None:
        self.num_holders = np.zeros(num_rows, np.uint16)
        self._version = np.zeros(num_rows, np.int64)
        self._now = 0
        self._lent: dict[int, _Lent] = {}

    @property
    def num_bytes(self) -> int:
        """Memory of the bookkeeping."""
        return self.num_holders.nbytes + self._version.nbytes + 18 * sum(lent.rows.size for lent in self._lent.values())

    def rows_of(self, holder: int) -> np.ndarray:
        """Return the rows lent to ``holder``, ascending."""
        lent = self._lent.get(holder)
        return np.empty(0, np.int64) if lent is None else lent.rows

    def is_lent(self, rows: np.ndarray, holder: int) -> np.ndarray:
        """Return which of ``rows`` (n,) are lent to ``holder``."""
        lent = self._lent.get(holder)
        result = np.zeros(rows.size, bool)
        if lent is not None:
            result[lent.find(rows)[1]] = True
        return result

    def lend(self, rows: np.ndarray, holder: int) -> None:
        """``holder`` is about to be sent current values of the distinct ``rows``, none of which it holds."""
        lent = self._lent.get(holder)
        new = _Lent(rows, self._version[rows], *np.zeros((2, rows.size), bool))
        if lent is not None:
            assert not lent.find(rows)[0].size, "rows are lent twice to a node"
            new = _Lent(*(np.concatenate(pair) for pair in zip(lent.arrays(), new.arrays(), strict=True)))
        order = np.argsort(new.rows, kind="stable")
        self._lent[holder] = _Lent(*(array[order] for array in new.arrays()))
        self.num_holders[rows] += 1

    def give_up(self, rows: np.ndarray, holder: int) -> None:
        """``holder`` has no replicas of ``rows`` any more."""
        lent = self._lent[holder]
        places, found = lent.find(rows)
        assert found.size == rows.size, "a node gives up rows that are not lent to it"
        kept = np.ones(lent.rows.size, bool)
        kept[places] = False
        if kept.any():
            self._lent[holder] = _Lent(*(array[kept] for array in lent.arrays()))
        else:
            del self._lent[holder]
        self.num_holders[rows] -= 1

    def changed(self, rows: np.ndarray) -> None:
        """The distinct ``rows`` have new values, which no holder knows."""
        if rows.size:
            self._now += 1
            self._version[rows] = self._now

    def changed_by(self, rows: np.ndarray, holder: int) -> None:
        """The distinct ``rows`` have new values, by what ``holder`` added."""
        before = self._version[rows]
        self.changed(rows)
        lent = self._lent.get(holder)
        if lent is not None:
            places, which = lent.find(rows)
            current = lent.sent[places] == before[which]
            lent.sent[places[current]] = self._now
            lent.rounded[places[current]] = True

    def end(self, rows: np.ndarray, holder: int) -> None:
        """``holder`` will drop ``rows`` after the round under way."""
        lent = self._lent[holder]
        lent.ending[lent.find(rows)[0]] = True

    def sole(self, holder: int) -> np.ndarray:
        """Return the rows that ``holder`` alone holds, and will not drop."""
        lent = self._lent.get(holder)
        if lent is None:
            return np.empty(0, np.int64)
        return lent.rows[(self.num_holders[lent.rows] == 1) & ~lent.ending]

    def outdated(self, holder: int, exact: bool) -> np.ndarray:
        """Return the rows that ``holder`` should be sent in the round under way, which needs no others."""
        lent = self._lent.get(holder)
        if lent is None:
            return np.empty(0, np.int64)
        old = self._version[lent.rows] > lent.sent
        if exact:
            old |= lent.rounded
        old &= ~lent.ending
        lent.ending[:] = False
        return lent.rows[old]

    def sending(self, rows: np.ndarray, holder: int) -> None:
        """``holder`` is about to be sent current values of ``rows``, which are lent to it."""
        lent = self._lent[holder]
        places, found = lent.find(rows)
        assert found.size == rows.size
        lent.sent[places] = self._version[rows]
        lent.rounded[places] = False
