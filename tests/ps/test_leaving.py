"""Under srun too, an error on all ranks ends the job in order, however busy the managers of its nodes are."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.mpi import mpirun

PROGRAM = Path(__file__).parent / "leaving_program.py"
# mpirun neither reports statuses as srun does nor waits for rank 0 once another rank has left: so each rank is a child
# in a session of its own that mpirun does not end, and its parent there writes its status down.
NOTE = """
import os, runpy, sys
_, folder, *sys.argv = sys.argv
parent = os.fork()
if parent:
    os.waitpid(parent, 0)
else:
    os.setsid()
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        path = os.path.join(folder, os.environ["PMI_RANK"])
        open(path + ".new", "w").write(str(status))
        os.rename(path + ".new", path)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
"""
STATUS_S = 30.0  # from the end of mpirun to that of the last rank


def ended(folder: Path, ranks: int, nodes: int, level: str = "THREAD_MULTIPLE", how: str = "together") -> list[str]:
    """Return the error lines of the job; under srun rank 0 must exit with 2 and the others with 0."""
    folder.mkdir(exist_ok=True)
    job = mpirun(ranks, ["-c", NOTE, folder, PROGRAM, str(nodes), level, how], timeout=120)
    paths, deadline = [folder / str(rank) for rank in range(ranks)], time.monotonic() + STATUS_S
    while not all(path.exists() for path in paths) and time.monotonic() < deadline:
        time.sleep(0.05)
    statuses = [path.read_text() if path.exists() else "none" for path in paths]
    assert statuses == ["2", *["0"] * (ranks - 1)], job.output
    assert not job.survivors
    return job.stderr.splitlines()


@pytest.mark.parametrize(
    ("ranks", "nodes", "how"), [(2, 1, "together"), (2, 2, "together"), (4, 2, "together"), (2, 2, "apart")]
)
def test_status_below_srun(ranks: int, nodes: int, how: str, tmp_path: Path) -> None:
    """Repeat the job, since whether a manager calls MPI after its end is a matter of timing."""
    for attempt in range(2 if how == "together" else 1):
        assert ended(tmp_path / str(attempt), ranks, nodes, how=how) == ["leaving_program.py: error: no more"]


def test_several_nodes_need_an_mpi_library_for_threads(tmp_path: Path) -> None:
    (line,) = ended(tmp_path, 2, 2, "THREAD_SERIALIZED")
    assert "error: a parameter server of several nodes needs MPI_THREAD_MULTIPLE" in line


def test_one_node_needs_no_threads_in_mpi(tmp_path: Path) -> None:
    assert ended(tmp_path, 2, 1, "THREAD_SINGLE") == ["leaving_program.py: error: no more"]
