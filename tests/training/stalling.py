"""bin/train with a rank that hangs: ``stalling.py PLACE HOW RANK OPTIONS...``.

At PLACE, once a checkpoint is there (but for ``start``, before it joins the others), rank RANK stops in the way HOW.
The limit of --stall-minutes holds from then on; until then, on machines that have much else to do, it is a minute.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lapse_elmo import checkpoint, perplexity, train
from lapse_elmo.checkpoint import files
from lapse_elmo.mpi.launch import launch
from lapse_elmo.mpi.launcher import launcher_rank_and_size
from lapse_elmo.mpi.world import World
from lapse_elmo.step import TrainingStep
from lapse_elmo.watchdog import _Group


def stop() -> None:
    """As a debugger, a batch system or a machine that is out of memory does."""
    os.kill(os.getpid(), signal.SIGSTOP)


def loop() -> None:
    while True:
        pass


def read() -> None:
    """From a file that never answers, as on a file system that is away."""
    path = Path(tempfile.mkdtemp()) / "fifo"
    os.mkfifo(path)
    path.read_bytes()


WAYS: dict[str, Callable[[], None]] = {"stop": stop, "loop": loop, "read": read}
PLACES: dict[str, tuple[Any, str]] = {
    "step": (TrainingStep, "_compute"), "save": (files, "_pwrite_all"), "evaluation": (perplexity, "context_vectors"),
}


def patient(run_dir: Path) -> None:
    check = _Group.check

    def later(self: _Group, seconds: float) -> None:
        wanted = self._limit_s
        if not checkpoint.candidates(run_dir):
            self._limit_s = 60.0
        check(self, seconds)
        self._limit_s = wanted

    _Group.check = later  # type: ignore[method-assign]


def main(argv: list[str], enter: Callable[[], World]) -> int:
    place, how, rank, *options = argv
    run_dir = Path(options[options.index("--run-dir") + 1])
    patient(run_dir)
    if launcher_rank_and_size()[0] != int(rank):
        return train.main(options, enter)

    def hang() -> None:
        if place == "start" or checkpoint.candidates(run_dir):
            WAYS[how]()

    if place == "start":
        hang()
    if place not in PLACES:
        return train.main(options, enter)
    owner, name = PLACES[place]
    once = getattr(owner, name)

    def hanging(*args: Any, **kwargs: Any) -> Any:
        hang()
        return once(*args, **kwargs)

    setattr(owner, name, hanging)
    return train.main(options, enter)


if __name__ == "__main__":
    launch(main, sys.argv[1:], prog="bin/train")
