"""A lock-free queue in shared memory from one worker to its node's manager: one writer, one reader.

A record is a message's block, whose second int64 is its size. Each record is contiguous. A record that does not fit
between the last one and the end of the memory starts at the beginning, and a size of 0 in its place tells the reader to
skip to there.
"""

from __future__ import annotations

import numpy as np

from lapse_elmo.ps.ordering import fence

RING_BYTES = 1 << 18  # per worker
_WRITTEN, _READ, _COUNTERS = 0, 8, 16  # indices of int64; each counter has its own cache line
_HEADER_BYTES = 16  # of a record: its kind and its size


def ring_shapes(num_workers: int) -> dict[str, tuple[tuple[int, ...], type]]:
    """Return the (shape, dtype) by name of the arrays that the rings of a node's workers need in shared memory."""
    return {"ring counters": ((num_workers, _COUNTERS), np.int64), "rings": ((num_workers, RING_BYTES), np.uint8)}


class Ring:
    """One end of a ring; the writer uses :meth:`try_write` only, the reader :meth:`read` only.

    Args:
        counters: (16,) int64 in shared memory, two of which count the bytes ever written and read.
        data: (capacity,) uint8 in shared memory.
    """

    def __init__(self, counters: np.ndarray, data: np.ndarray) -> None:
        self._counters, self._data = counters, data
        self._capacity = data.size
        self._fence = fence()
        self.largest_record = data.size // 4  # bytes

    def try_write(self, block: np.ndarray) -> bool:
        """Append a message of at most ``largest_record`` bytes; return False if there is no room yet."""
        assert block.size <= self.largest_record and block.size % 8 == 0
        written = int(self._counters[_WRITTEN])
        at = written % self._capacity
        skipped = self._capacity - at if at + block.size > self._capacity else 0
        if written + skipped + block.size - int(self._counters[_READ]) > self._capacity:
            return False
        self._fence()  # the reader copied the old record before it counted it as read: only now overwrite it
        if skipped:
            if skipped >= _HEADER_BYTES:
                self._data[at : at + _HEADER_BYTES] = 0
            at = 0
        self._data[at : at + block.size] = block
        self._fence()  # the record is visible before the counter that announces it
        self._counters[_WRITTEN] = written + skipped + block.size
        return True

    def read(self) -> np.ndarray | None:
        """Return a copy of the next message's block, or None if there is none."""
        read = int(self._counters[_READ])
        if read == int(self._counters[_WRITTEN]):
            return None
        self._fence()  # read the record only after the counter that announces it
        at = read % self._capacity
        size = self._size_at(at)
        if not size:
            read += self._capacity - at
            at = 0
            size = self._size_at(at)
        block = self._data[at : at + size].copy()
        self._fence()  # finish the copy before the writer may overwrite the record
        self._counters[_READ] = read + size
        return block

    def _size_at(self, at: int) -> int:
        """Return the size of the record at ``at``, or 0 if the next record is at the beginning."""
        if at + _HEADER_BYTES > self._capacity:
            return 0
        return int(self._data[at + 8 : at + 16].view(np.int64)[0])
