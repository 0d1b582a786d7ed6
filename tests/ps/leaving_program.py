"""Raise an error on all ranks while the managers are busy: ``leaving_program.py NODES LEVEL [together|apart]``.

srun's variables are emulated. LEVEL is the MPI thread level to ask for instead of MPI_THREAD_MULTIPLE.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

import mpi4py
import numpy as np

from lapse_elmo.errors import TrainingError
from lapse_elmo.mpi.launch import launch
from lapse_elmo.mpi.launcher import LOCAL_SIZE_VARIABLES
from lapse_elmo.mpi.world import World
from lapse_elmo.ps.embedded import EmbeddedServer
from lapse_elmo.ps.layout import Layout

ROWS, WIDTH, CLOCKS = 4000, 64, 10


def main(argv: list[str], join: Callable[[], World]) -> None:
    nodes, level, how = int(argv[0]), argv[1], argv[2]
    mpi4py.rc.thread_level = level.removeprefix("THREAD_").lower()
    world = join()
    world.split(nodes)
    for name in LOCAL_SIZE_VARIABLES:  # mpirun sets them, srun does not
        os.environ.pop(name, None)
    os.environ["SLURM_PROCID"] = str(world.rank)
    server = EmbeddedServer(world, Layout.of(("rows", ROWS, WIDTH)), technique="adaptive")
    out, rng = np.empty((500, WIDTH), np.float32), np.random.default_rng(world.rank)
    for clock in range(CLOCKS):
        keys = np.unique(rng.integers(0, ROWS, 500))
        server.intent(keys, clock, clock + 3)
        server.pull(keys, out[: keys.size])
        server.push(keys, out[: keys.size])
        server.advance_clock()
    server.intent(np.arange(ROWS), CLOCKS, CLOCKS + 10)  # so that rows are in transit when the error is raised
    world.barrier()
    if how == "apart":
        time.sleep(world.rank)
    raise TrainingError("no more").on_every_rank()


if __name__ == "__main__":
    launch(main, sys.argv[1:], prog="leaving_program.py")
