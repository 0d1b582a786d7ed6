"""bin/train with a fault: ``failing.py KIND RANK OPTIONS...``; once a checkpoint is there, rank ``RANK`` meets it."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lapse_elmo import checkpoint, train
from lapse_elmo.checkpoint import files, saver
from lapse_elmo.mpi.launch import launch
from lapse_elmo.mpi.world import World
from lapse_elmo.row_update import _SharedGradients
from lapse_elmo.schedule import Rates
from lapse_elmo.step import AnnouncedBatch, TrainingStep
from lapse_elmo.step_report import StepResult


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(*_: Any) -> None:
    raise RuntimeError("this breaks")


def leave(*_: Any) -> None:
    sys.exit(0)


def in_thread(*_: Any) -> None:
    threading.Thread(target=fail).start()
    threading.Event().wait(60)


def full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def full_memory() -> None:
    """Let this rank need more shared memory than before, and /dev/shm have none left."""
    once = _SharedGradients._reserve

    def again(self: _SharedGradients, number: int) -> None:
        self._reserved = 0
        once(self, number)

    _SharedGradients._reserve = again  # type: ignore[method-assign]
    os.posix_fallocate = full


AT_STEP: dict[str, Callable[..., None]] = {
    "exception": fail, "exit-0": leave, "kill": die, "thread": in_thread, "full-memory": full_memory,
}
IN_SAVE: dict[str, Callable[..., None]] = {"kill-in-save": die, "full-disk": full}


def main(argv: list[str], enter: Callable[[], World]) -> int:
    kind, rank, *options = argv
    run_dir = Path(options[options.index("--run-dir") + 1])
    once = TrainingStep.__call__

    def faulty(
        self: TrainingStep, announced: Sequence[AnnouncedBatch], number: int, rates: Rates, last: bool
    ) -> StepResult:
        if self.world.rank == int(rank) and checkpoint.candidates(run_dir):
            if kind in IN_SAVE:
                files._pwrite_all = IN_SAVE[kind]
            elif kind == "kill-in-layout":
                saver.lay_out = die  # type: ignore[assignment]
            elif kind == "kill-in-rename":
                saver.publish = die  # type: ignore[assignment]
            elif kind == "not-finite":
                for parameter in self.model.parameters():
                    parameter.register_hook(lambda gradient: gradient * math.nan)
            else:
                AT_STEP[kind]()
        return once(self, announced, number, rates, last)

    TrainingStep.__call__ = faulty  # type: ignore[method-assign, assignment]
    return train.main(options, enter)


if __name__ == "__main__":
    launch(main, sys.argv[1:], prog="bin/train")
