"""The progress of a rank, for the watchdog: a few numbers that the rank's own threads write and others read.

Everything that takes long reports here: each collective call (:mod:`lapse_elmo.mpi.collectives`), each phase of a step,
each piece of an evaluation, of a checkpoint, of a restored table. A rank that reports nothing for long is stuck.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np

T = TypeVar("T")

PID, DONE, WAITING, BEAT = range(4)
NUM_FIELDS = 4
PHASE_TYPE = np.dtype("S64")


class Progress:
    """The progress of this rank. Writing takes well below a microsecond and is not locked.

    Attributes:
        numbers: (NUM_FIELDS,) int64, indexed by ``PID`` (the process), ``DONE`` (pieces of work done), ``WAITING``
            (whether it waits for other ranks) and ``BEAT`` (heartbeats of the watchdog's thread).
        phase: (1,) ``PHASE_TYPE``, the current phase in words.
    """

    def __init__(self) -> None:
        self.numbers = np.array([os.getpid(), 0, 0, 0], np.int64)
        self.phase = np.array([b"start"], PHASE_TYPE)

    def move_to(self, numbers: np.ndarray, phase: np.ndarray) -> None:
        """Write to ``numbers`` and ``phase``, which have the same shapes, from now on (to share them)."""
        numbers[:], phase[:] = self.numbers, self.phase
        self.numbers, self.phase = numbers, phase

    def enter(self, phase: str) -> None:
        """Report that ``phase`` (ASCII) begins."""
        self.phase[0] = phase
        self.work_done()

    def work_done(self) -> None:
        """Report that a piece of work is done; for the main thread."""
        self.numbers[DONE] += 1
        self.numbers[WAITING] = 0

    def work_done_in_thread(self) -> None:
        """Report that a thread other than the main one has done a piece of work."""
        self.numbers[DONE] += 1

    def counted(self, items: Iterable[T]) -> Iterator[T]:
        """Yield ``items``; each is reported as a piece of work when the next one is requested."""
        for item in items:
            yield item
            self.work_done()

    def waiting(self) -> None:
        """Report that this rank waits for others until its next call of :meth:`work_done`."""
        self.numbers[WAITING] = 1
