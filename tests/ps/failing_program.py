"""One rank fails while all have requests pending: ``failing_program.py KIND RANK NODES FOLDER``."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lapse_elmo.mpi.launch import launch
from lapse_elmo.mpi.world import World
from lapse_elmo.ps.embedded import EmbeddedServer
from lapse_elmo.ps.layout import Layout
from tests.mpi import mpirun

RANKS = 4
ENDS_S = 10  # far more than ending takes, even on a busy machine
_STEPS_BEFORE = 10
_LAYOUT = Layout.of(("rows", 4000, 64))


def _raise(*_: Any) -> None:
    raise RuntimeError("this breaks")


def _break_manager(server: EmbeddedServer) -> None:
    """Make the node's manager fail at its next step."""
    assert server._manager is not None
    server._manager.mailbox.receive = _raise  # type: ignore[method-assign]


def _fill_memory(server: EmbeddedServer) -> None:
    """Let the node's manager need memory for more rows, and /dev/shm have none left."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert server._manager is not None
    os.posix_fallocate = full
    for state in server._manager.states:
        state._replica_slots._capacity += 1
        state._replica_slots._chunk = 1 << 40


FAILURES: dict[str, Callable[[EmbeddedServer], object]] = {
    "exception": _raise,
    "exit": lambda _: sys.exit(0),
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "manager": _break_manager,
    "full-memory": _fill_memory,
}


def main(argv: list[str], join: Callable[[], World]) -> None:
    kind, rank, nodes, folder = argv
    world = join()
    if int(nodes) > 1:
        world.split(int(nodes))
    server = EmbeddedServer(world, _LAYOUT)
    rng, out = np.random.default_rng(world.rank), np.empty((500, 64), np.float32)
    world.barrier()
    for clock in range(10**6):
        if clock == _STEPS_BEFORE and world.rank == int(rank):
            Path(folder, "failed").write_text(str(time.time()))
            FAILURES[kind](server)
        keys = rng.integers(0, 4000, 500)
        server.intent(rng.integers(0, 4000, 500), clock + 1, clock + 3)
        server.push_async(keys, np.ones((500, 64), np.float32))
        server.localize_async(keys[:100])
        server.pull(keys, out)
        server.wait_all()
        server.advance_clock()


def run_and_check(kind: str, rank: int, nodes: int, folder: Path, ranks: int = RANKS, **job: Any) -> None:
    """Run a failing job; check that it ends within seconds, with a failure status and without leftovers."""
    words = [__file__, kind, str(rank), str(nodes), str(folder)]
    ended = mpirun(ranks, words, timeout=60, **job)
    seconds = time.time() - float((folder / "failed").read_text())
    assert ended.returncode != 0, ended.output
    assert seconds < ENDS_S, ended.output
    assert ended.survivors == ()
    if kind in ("exception", "manager"):
        assert f"[rank {rank}/{ranks} " in ended.stderr and "this breaks" in ended.stderr, ended.output
    if kind == "full-memory":
        lines = [line for line in ended.stderr.splitlines() if "failing_program.py" in line]
        assert ended.returncode == 2 and len(lines) == 1 and "Traceback" not in ended.stderr, ended.output
        assert f"[rank {rank}/{ranks} " in lines[0] and "of shared memory but /dev/shm has" in lines[0], ended.output


if __name__ == "__main__":
    launch(main, sys.argv[1:], prog="failing_program.py")
