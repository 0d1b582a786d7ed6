"""The end of a job: all ranks stop, and the launcher reports the intended exit status."""

from __future__ import annotations

import os
import threading
import time

from lapse_elmo.mpi.launcher import highest_status_counts
from lapse_elmo.mpi.signals import ignore_stop_signals
from lapse_elmo.mpi.stdio import flush_to_launcher
from lapse_elmo.mpi.world import World

_ABORT_S = 30.0  # how long a rank waits for rank 0, which may be busy and has yet to report the error, to end the job
_LAST_S = 0.5  # how long rank 0 lets the others exit first, where the highest status counts
_ARRIVE_S = 60.0  # how long ranks that finalise MPI together wait for each other
_POLL_S = 0.001


def abort(world: World, status: int, *, quietly: bool = False) -> None:
    """End every rank of the job at once with ``status``; ``quietly`` hides the MPI library's line about it."""
    flush_to_launcher()
    if world.comm is not None and world.size > 1:
        if quietly:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        world.comm.Abort(status)
    os._exit(status)


def leave(world: World, status: int) -> None:
    """End the job in order with ``status``, which must not be 0 (collective).

    Ranks must not exit one by one: a launcher kills the others at the first bad status, and may then report their
    death instead. mpirun reports the status of an abort faithfully, so rank 0 aborts. srun and Flux report
    the highest status of all ranks, so there MPI is finalised and the other ranks exit first, with 0.
    """
    ignore_stop_signals()  # the status is decided
    flush_to_launcher()
    if world.size == 1:
        os._exit(status)
    if highest_status_counts():
        _finalise(world, status)
        time.sleep(0 if world.rank else _LAST_S)
        os._exit(0 if world.rank else status)
    if world.rank:
        time.sleep(_ABORT_S)  # rank 0's abort ends this rank
    abort(world, status, quietly=True)


def _finalise(world: World, status: int) -> None:
    """Finalise MPI once no rank sends any more; abort with ``status`` if a rank does not arrive in time."""
    from mpi4py import MPI

    assert world.comm is not None
    # In a thread, so that the join below can time out: a callback may depend on a rank that has stopped already.
    stopper = threading.Thread(target=lambda: [stop() for stop in reversed(world.exit_callbacks)], daemon=True)
    stopper.start()
    stopper.join(_ARRIVE_S)
    if stopper.is_alive():
        abort(world, status, quietly=True)
    arrived, deadline = world.comm.Ibarrier(), time.monotonic() + _ARRIVE_S
    while not arrived.Test():
        if time.monotonic() > deadline:
            abort(world, status, quietly=True)
        time.sleep(_POLL_S)
    MPI.Finalize()
