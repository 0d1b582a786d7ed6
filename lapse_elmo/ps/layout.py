"""The only key arithmetic: which segment, and which row of it, a key names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from lapse_elmo.ps.rules import Rule


@dataclass(frozen=True)
class Segment:
    """``num_rows`` rows, whose keys are ``first_key + 0 .. num_rows - 1``.

    ``width`` float32 per row are pulled and pushed. With a ``rule`` its state is stored after them: ``row_width``
    float32 per row in all.
    """

    name: str
    num_rows: int
    width: int
    first_key: int
    rule: Rule | None = None

    @property
    def row_width(self) -> int:
        """Floats stored per row."""
        return self.width + (self.rule.state_width(self.width) if self.rule else 0)

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.row_width * 4

    def keys(self, rows: np.ndarray) -> np.ndarray:
        """Keys (n,) int64 of ``rows`` (n,), which count from 0 inside the segment."""
        return rows + self.first_key


@dataclass(frozen=True)
class Layout:
    """All segments, one after another from key 0 on, in the order in which they were named."""

    segments: tuple[Segment, ...] = field(default=())

    @classmethod
    def of(cls, *shapes: tuple[str, int, int] | tuple[str, int, int, Rule | None]) -> Layout:
        """The layout of segments given as (name, number of rows, width) or (name, number of rows, width, rule)."""
        segments: list[Segment] = []
        first = 0
        for name, num_rows, width, *rule in shapes:
            segments.append(Segment(name, num_rows, width, first, *rule))
            first += num_rows
        return cls(tuple(segments))

    def __getitem__(self, name: str) -> Segment:
        return next(segment for segment in self.segments if segment.name == name)

    @property
    def num_keys(self) -> int:
        return sum(segment.num_rows for segment in self.segments)

    @property
    def num_bytes(self) -> int:
        return sum(segment.num_bytes for segment in self.segments)

    def segment_of(self, first: int, last: int) -> Segment | None:
        """The segment that holds both keys, or None."""
        for segment in self.segments:
            if segment.first_key <= first and last < segment.first_key + segment.num_rows:
                return segment
        return None


def distinct_with_inverse(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """(each of ``keys`` (n,) once, the place of each among them); no inverse where they are distinct already."""
    if np.all(keys[1:] > keys[:-1]):
        return keys, None
    found, inverse = np.unique(keys, return_inverse=True)
    return (keys, None) if found.size == keys.size else (found, inverse)


def distinct(keys: np.ndarray) -> np.ndarray:
    """Each of ``keys`` (n,) once; in their order where they are distinct already."""
    return distinct_with_inverse(keys)[0]


def by_occurrence(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Positions of the first occurrence of each of ``rows`` (n,), of their second ones and so on, ascending."""
    order = np.argsort(rows, kind="stable")
    number = np.arange(rows.size)
    first = np.diff(rows[order], prepend=-1) != 0
    occurrence = np.empty(rows.size, np.int64)
    occurrence[order] = number - np.maximum.accumulate(np.where(first, number, 0))
    for turn in range(int(occurrence.max(initial=-1)) + 1):
        yield np.flatnonzero(occurrence == turn)
