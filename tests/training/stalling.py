"""bin/train with a rank that hangs: ``stalling.py PLACE HOW RANK OPTIONS...``.

At PLACE, rank RANK stops in the way HOW: once a checkpoint is there, or at the start, if PLACE is a part of that.
The limit of --stall-minutes holds from then on; until then, on machines that have much else to do, it is a minute.
At ``nowhere`` no rank stops by itself, and the limit holds once a checkpoint is there.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lapse_elmo import checkpoint, parameters, perplexity, train, watchdog
from lapse_elmo.checkpoint import files, restoring
from lapse_elmo.corpus.shards import ShardSet
from lapse_elmo.mpi.launch import launch
from lapse_elmo.mpi.launcher import launcher_rank_and_size
from lapse_elmo.mpi.world import World
from lapse_elmo.step import TrainingStep
from lapse_elmo.watchdog import _Group


def stop() -> None:
    """Stop this process, as a debugger, a batch system or a machine without free memory does."""
    os.kill(os.getpid(), signal.SIGSTOP)


def loop() -> None:
    while True:
        pass


def read() -> None:
    """Read from a file that never answers, as on an unreachable file system."""
    path = Path(tempfile.mkdtemp()) / "fifo"
    os.mkfifo(path)
    path.read_bytes()


def write() -> None:
    """To a launcher that is stopped, and so does not read."""
    Path(os.environ[LAUNCHER]).write_text(str(os.getppid()))
    os.kill(os.getppid(), signal.SIGSTOP)
    while True:
        sys.stderr.write("x" * 1000)


LAUNCHER = "TEST_LAUNCHER"  # environment variable: file for the number of the process that is stopped
WAYS: dict[str, Callable[[], None]] = {"stop": stop, "loop": loop, "read": read, "write": write}
PLACES: dict[str, tuple[Any, str]] = {
    "corpus": (ShardSet, "open_on_all"), "parameters": (parameters, "build_model"),
    "restore": (restoring, "_restore_part"),
    "step": (TrainingStep, "_compute"), "save": (files, "_pwrite_all"), "evaluation": (perplexity, "_joined"),
}
AT_START = ("start", "corpus", "parameters", "restore")


def patient(run_dir: Path, place: str) -> None:
    check = _Group.check

    def later(self: _Group, seconds: float) -> None:
        wanted = self._limit_s
        if not (checkpoint.candidates(run_dir) if place == "nowhere" else hanging(run_dir).exists()):
            self._limit_s = 60.0
        check(self, seconds)
        self._limit_s = wanted

    _Group.check = later  # type: ignore[method-assign]


def hanging(run_dir: Path) -> Path:
    """Return a file that is there once the rank has stopped."""
    return run_dir.with_name("hanging")


def main(argv: list[str], enter: Callable[[], World]) -> int:
    place, how, rank, *options = argv
    run_dir = Path(options[options.index("--run-dir") + 1])
    patient(run_dir, place)
    if how == "write":
        watchdog._ABORT_TIMEOUT_S = 3.0  # it passes once for each rank, since MPI cannot end the job
    if launcher_rank_and_size()[0] != int(rank):
        return train.main(options, enter)

    def hang() -> None:
        if place in AT_START or checkpoint.candidates(run_dir):
            hanging(run_dir).touch()
            WAYS[how]()

    if place == "start":
        hang()
    if place not in PLACES:
        return train.main(options, enter)
    owner, name = PLACES[place]
    once = getattr(owner, name)

    def hanging_once(*args: Any, **kwargs: Any) -> Any:
        hang()
        return once(*args, **kwargs)

    setattr(owner, name, hanging_once)
    return train.main(options, enter)


if __name__ == "__main__":
    launch(main, sys.argv[1:], prog="bin/train")
