"""Start a native package and end in one of several ways: ``native_program.py PACKAGE END START_S``."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from collections.abc import Callable

import pytest
import torch

from lapse_elmo.errors import ServerError, TrainingError
from lapse_elmo.mpi.launch import launch
from lapse_elmo.mpi.world import World
from lapse_elmo.ps.layout import Layout


def main(argv: list[str], join: Callable[[], World]) -> None:
    package, end, start_s = argv
    world = join()
    node_type = getattr(importlib.import_module(f"lapse_elmo.ps.{package}_package"), f"{package.title()}Node")
    layout = Layout.of(("rows", 100, 3))
    node = node_type(world, layout, "adaptive", float(start_s))
    if end == "closed":
        node.close()
        node.close()
    elif end == "started again":
        node.close()
        with pytest.raises(ServerError, match=f"{package} was started in this process before"):
            node_type(world, layout, "adaptive")
    elif end == "error everywhere":
        raise TrainingError("no more").on_every_rank()
    elif end == "error on a rank" and world.rank == world.size - 1:
        raise TrainingError("no more")
    elif (end == "rank 0 killed" and world.rank == 0) or (end == "last rank killed" and world.rank == world.size - 1):
        os.kill(os.getpid(), signal.SIGKILL)
    elif end == "scheduler dies" and world.rank == 0:
        node.module.say(b"die")
    if end not in ("closed", "started again", "left open"):
        time.sleep(100)


if __name__ == "__main__":
    torch.set_num_threads(1)
    launch(main, sys.argv[1:], prog="native_program.py")
