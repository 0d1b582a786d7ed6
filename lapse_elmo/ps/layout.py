"""The mapping of keys to segments and rows; no other module computes with keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from lapse_elmo.ps.rules import Rule


@dataclass(frozen=True)
class Segment:
    """A named range of keys, ``first_key`` to ``first_key + num_rows - 1``, whose rows have one width.

    ``width`` float32 per row are pulled and pushed. If there is an update ``rule``, its state is stored after them, for
    ``row_width`` float32 per row in total.

    The first ``frequent`` rows have a copy of their own on every node, which a push of this node's workers changes and
    no other: the workers of all nodes must push the same to them. A set is visible on other nodes after a quiesce.
    """

    name: str
    num_rows: int
    width: int
    first_key: int
    rule: Rule | None = None
    frequent: int = 0

    @property
    def row_width(self) -> int:
        """Floats stored per row."""
        return self.width + (self.rule.state_width(self.width) if self.rule else 0)

    @property
    def num_bytes(self) -> int:
        """Size of all rows."""
        return self.num_rows * self.row_width * 4

    def keys(self, rows: np.ndarray) -> np.ndarray:
        """Return the keys (n,) int64 of ``rows`` (n,), which count from 0 within the segment."""
        return rows + self.first_key


@dataclass(frozen=True)
class Layout:
    """All segments, one after another from key 0 on."""

    segments: tuple[Segment, ...] = field(default=())

    @classmethod
    def of(
        cls, *shapes: tuple[str, int, int] | tuple[str, int, int, Rule | None] | tuple[str, int, int, Rule | None, int]
    ) -> Layout:
        """Return the layout of segments given as (name, number of rows, width[, rule[, number of frequent rows]])."""
        segments: list[Segment] = []
        first = 0
        for name, num_rows, width, *more in shapes:
            segments.append(Segment(name, num_rows, width, first, *more))
            first += num_rows
        return cls(tuple(segments))

    def __getitem__(self, name: str) -> Segment:
        return next(segment for segment in self.segments if segment.name == name)

    @property
    def num_keys(self) -> int:
        """Number of rows of all segments."""
        return sum(segment.num_rows for segment in self.segments)

    @property
    def num_bytes(self) -> int:
        """Size of the rows of all segments."""
        return sum(segment.num_bytes for segment in self.segments)

    def bytes_on(self, num_nodes: int) -> int:
        """Return the size of the rows of all segments on ``num_nodes`` nodes together, without replicas."""
        copies = sum(segment.frequent * segment.row_width * 4 for segment in self.segments)
        return self.num_bytes + copies * (num_nodes - 1)

    def segment_of(self, first: int, last: int) -> Segment | None:
        """Return the segment that both keys belong to, or None."""
        for segment in self.segments:
            if segment.first_key <= first and last < segment.first_key + segment.num_rows:
                return segment
        return None


def distinct_with_inverse(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Return (distinct keys, inverse), or (``keys``, None) if they are distinct already.

    Like ``np.unique``, the inverse (n,) holds the index of each of ``keys`` (n,) among the distinct ones.
    """
    if np.all(keys[1:] > keys[:-1]):
        return keys, None
    found, inverse = np.unique(keys, return_inverse=True)
    return (keys, None) if found.size == keys.size else (found, inverse)


def distinct(keys: np.ndarray) -> np.ndarray:
    """Return each of ``keys`` (n,) once: unchanged if they are distinct already, else ascending."""
    return distinct_with_inverse(keys)[0]


def by_occurrence(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the indices of the first occurrences of all ``rows`` (n,), of their second ones and so on, ascending."""
    order = np.argsort(rows, kind="stable")
    number = np.arange(rows.size)
    first = np.diff(rows[order], prepend=-1) != 0
    occurrence = np.empty(rows.size, np.int64)
    occurrence[order] = number - np.maximum.accumulate(np.where(first, number, 0))
    for turn in range(int(occurrence.max(initial=-1)) + 1):
        yield np.flatnonzero(occurrence == turn)
