"""The owner's directory of replicas: which nodes hold replicas of its rows, and which replicas are out of date.

Each main copy has a version, which increases when its value changes. For each holder, the owner stores the rows that it
holds and the version of each that was last sent. Deltas of the holder itself need not be sent back: its replica already
includes them, perhaps rounded differently, so only an exact round sends them. Memory is O(rows + replicas), never
O(nodes x rows).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class _HeldRows:
    """The rows that one node holds replicas of, ascending."""

    rows: np.ndarray  # (n,) int64
    sent_version: np.ndarray  # (n,) int64: version of the replica
    rounded: np.ndarray  # (n,) bool: whether the replica may differ from its version by rounding
    expiring: np.ndarray  # (n,) bool: whether the holder will drop it after the current round

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Return all arrays, in the order of the fields."""
        return self.rows, self.sent_version, self.rounded, self.expiring

    def find(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which of ``rows`` are held: their indices in the arrays, and in ``rows``."""
        indices = np.searchsorted(self.rows, rows)
        indices[indices == self.rows.size] = 0
        found = self.rows[indices] == rows if self.rows.size else np.zeros(rows.size, bool)
        return indices[found], np.flatnonzero(found)


class Holders:
    """The replicas of one segment's main copies on one node.

    Attributes:
        num_holders: (num_rows,) uint16, the number of nodes that hold a replica of each row.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_holders = np.zeros(num_rows, np.uint16)
        self._version = np.zeros(num_rows, np.int64)
        self._newest_version = 0
        self._held: dict[int, _HeldRows] = {}

    @property
    def num_bytes(self) -> int:
        """Memory taken by this directory."""
        return self.num_holders.nbytes + self._version.nbytes + 18 * sum(held.rows.size for held in self._held.values())

    def rows_of(self, holder: int) -> np.ndarray:
        """Return the rows held by ``holder``, ascending."""
        held = self._held.get(holder)
        return np.empty(0, np.int64) if held is None else held.rows

    def is_held_by(self, rows: np.ndarray, holder: int) -> np.ndarray:
        """Return which of ``rows`` (n,) are held by ``holder``, (n,) bool."""
        held = self._held.get(holder)
        result = np.zeros(rows.size, bool)
        if held is not None:
            result[held.find(rows)[1]] = True
        return result

    def add(self, rows: np.ndarray, holder: int) -> None:
        """Register ``holder`` for the distinct ``rows``, none of which it holds; it must be sent their values next."""
        held = self._held.get(holder)
        new = _HeldRows(rows, self._version[rows], *np.zeros((2, rows.size), bool))
        if held is not None:
            assert not held.find(rows)[0].size, "a node is to hold a second replica of a row"
            new = _HeldRows(*(np.concatenate(pair) for pair in zip(held.arrays(), new.arrays(), strict=True)))
        order = np.argsort(new.rows, kind="stable")
        self._held[holder] = _HeldRows(*(array[order] for array in new.arrays()))
        self.num_holders[rows] += 1

    def remove(self, rows: np.ndarray, holder: int) -> None:
        """Remove ``holder`` from the holders of ``rows``, all of which it holds."""
        held = self._held[holder]
        indices, found = held.find(rows)
        assert found.size == rows.size, "a node drops replicas that it does not hold"
        kept = np.ones(held.rows.size, bool)
        kept[indices] = False
        if kept.any():
            self._held[holder] = _HeldRows(*(array[kept] for array in held.arrays()))
        else:
            del self._held[holder]
        self.num_holders[rows] -= 1

    def mark_changed(self, rows: np.ndarray) -> None:
        """Give the distinct ``rows`` a new version, which no holder has."""
        if rows.size:
            self._newest_version += 1
            self._version[rows] = self._newest_version

    def mark_changed_by(self, rows: np.ndarray, holder: int) -> None:
        """Give the distinct ``rows`` a new version due to deltas of ``holder``, whose replicas include them."""
        before = self._version[rows]
        self.mark_changed(rows)
        held = self._held.get(holder)
        if held is not None:
            indices, which = held.find(rows)
            # A replica that was current before remains so, up to rounding; an older one still lacks others' changes.
            current = held.sent_version[indices] == before[which]
            held.sent_version[indices[current]] = self._newest_version
            held.rounded[indices[current]] = True

    def mark_expiring(self, rows: np.ndarray, holder: int) -> None:
        """Note that ``holder`` will drop its replicas of ``rows`` after the current round."""
        held = self._held[holder]
        held.expiring[held.find(rows)[0]] = True

    def sole_rows_of(self, holder: int) -> np.ndarray:
        """Return the rows of which ``holder`` has the only replica, without those that it will drop."""
        held = self._held.get(holder)
        if held is None:
            return np.empty(0, np.int64)
        return held.rows[(self.num_holders[held.rows] == 1) & ~held.expiring]

    def outdated(self, holder: int, exact: bool) -> np.ndarray:
        """Return the rows to refresh for ``holder`` in the current round, and forget which of them were expiring.

        Args:
            holder: A node.
            exact: Whether to include replicas that differ by rounding at most.
        """
        held = self._held.get(holder)
        if held is None:
            return np.empty(0, np.int64)
        old = self._version[held.rows] > held.sent_version
        if exact:
            old |= held.rounded
        old &= ~held.expiring
        held.expiring[:] = False
        return held.rows[old]

    def mark_sent(self, rows: np.ndarray, holder: int) -> None:
        """Note that ``holder`` is sent the current values of ``rows``, all of which it holds."""
        held = self._held[holder]
        indices, found = held.find(rows)
        assert found.size == rows.size
        held.sent_version[indices] = self._version[rows]
        held.rounded[indices] = False
