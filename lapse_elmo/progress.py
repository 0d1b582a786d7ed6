"""How far a rank has come, for a watchdog to see: a few numbers that its own threads write and others read.

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

    :ivar numbers: (NUM_FIELDS,) int64: the process, pieces of work done, whether it waits for other ranks, and signs of
        life of the watchdog's thread. :ivar phase: (1,) ``PHASE_TYPE``, what is being done.
    """

    def __init__(self) -> None:
        self.numbers = np.array([os.getpid(), 0, 0, 0], np.int64)
        self.phase = np.array([b"start"], PHASE_TYPE)

    def move_to(self, numbers: np.ndarray, phase: np.ndarray) -> None:
        """Write to ``numbers`` and ``phase``, of the same shapes, from now on."""
        numbers[:], phase[:] = self.numbers, self.phase
        self.numbers, self.phase = numbers, phase

    def enter(self, phase: str) -> None:
        """Say what is being done from now on, in ASCII."""
        self.phase[0] = phase
        self.made()

    def made(self) -> None:
        """Say that a piece of work is done; for the main thread."""
        self.numbers[DONE] += 1
        self.numbers[WAITING] = 0

    def made_aside(self) -> None:
        """Say that another thread than the main one has done a piece of work."""
        self.numbers[DONE] += 1

    def counted(self, items: Iterable[T]) -> Iterator[T]:
        """Yield ``items``; each is a piece of work, done when the next one is asked for."""
        for item in items:
            yield item
            self.made()

    def waits(self) -> None:
        """Say that this rank waits for others until it next calls :meth:`made`."""
        self.numbers[WAITING] = 1
