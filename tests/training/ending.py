"""bin/train that ends early: ``ending.py HOW OPTIONS...``, by a signal, or an error of all ranks or one, at ``STEP``.

The last rank is slow to write its files, as on a busy file server.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence

from lapse_elmo import train
from lapse_elmo.errors import TrainingError
from lapse_elmo.mpi.launch import launch
from lapse_elmo.mpi.launcher import launcher_rank_and_size
from lapse_elmo.ps.trace import _Log
from lapse_elmo.schedule import Rates
from lapse_elmo.step import AnnouncedBatch, TrainingStep
from lapse_elmo.step_report import StepResult

STEP, SLOW_S = 4, 1.0
SIGNAL, ERROR, ERROR_OF_ONE = "signal", "error", "error of one"


def main(how: str, options: list[str]) -> None:
    once, close, flush = TrainingStep.__call__, _Log.close, _Log.flush
    rank, size = launcher_rank_and_size()

    def ending(
        self: TrainingStep, announced: Sequence[AnnouncedBatch], number: int, rates: Rates, last: bool
    ) -> StepResult:
        if number == STEP and how == SIGNAL:
            signal.raise_signal(signal.SIGUSR1)
        if number == STEP and how == ERROR:
            raise TrainingError("no more").on_every_rank()
        if number == STEP and how == ERROR_OF_ONE and rank == size - 1:
            raise TrainingError("no more")
        return once(self, announced, number, rates, last)

    def slow_close(self: _Log) -> None:
        time.sleep(SLOW_S if rank == size - 1 else 0)
        close(self)

    def slow_flush(self: _Log) -> None:
        time.sleep(SLOW_S if rank == size - 1 else 0)
        flush(self)

    TrainingStep.__call__ = ending  # type: ignore[assignment]
    _Log.close, _Log.flush = slow_close, slow_flush  # type: ignore[method-assign]
    launch(train.main, options, prog="bin/train")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
