"""A rank that dies while all ranks have requests pending ends the job within seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.mpi import ROOT, mpirun
from tests.ps import failing_program

# Rank 0 has an error of MPI, as if in a transfer, a moment before rank 1 tells why it ends.
BROKEN_TRANSFER = """
import sys, time
from lapse_elmo.errors import TrainingError
from lapse_elmo.mpi.launch import launch

def main(argv, join):
    world = join()
    if world.rank == 0:
        from mpi4py import MPI
        raise MPI.Exception(MPI.ERR_OTHER)
    time.sleep(0.5 if argv == ["cause"] else 60)
    raise TrainingError("the cause")

launch(main, sys.argv[1:], prog="program")
"""


@pytest.mark.parametrize(
    ("kind", "rank"),  # ranks 0 and 2 run the managers of the two nodes
    [(kind, rank) for kind in ("exception", "exit", "kill") for rank in (1, 2)] + [("manager", 0), ("manager", 2)]
    + [("full-memory", 2)],
)
def test_a_failing_rank_ends_the_job(kind: str, rank: int, tmp_path: Path) -> None:
    failing_program.run_and_check(kind, rank, 2, tmp_path)


def test_the_rank_with_the_cause_is_heard_before_those_whose_transfers_it_broke() -> None:
    job = mpirun(2, ["-c", BROKEN_TRANSFER, "cause"], timeout=60)
    assert job.returncode == 2 and "program: [rank 1/2 " in job.stderr and "error: the cause" in job.stderr, job.output
    assert "Traceback" not in job.stderr


def test_an_error_of_mpi_alone_has_a_traceback() -> None:
    job = mpirun(2, ["-c", BROKEN_TRANSFER, "alone"], timeout=60)
    assert job.returncode == 1 and "mpi4py.MPI.Exception: " in job.stderr, job.output


def test_a_gpu_without_room_is_reported_in_one_line() -> None:
    program = (
        "import torch; from lapse_elmo.mpi.launch import launch\n"
        "def main(argv, join): raise torch.OutOfMemoryError('CUDA out of memory. Tried 2 GiB.\\nGPU 0 has ...')\n"
        "launch(main, [], prog='program')"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    line = "program: error: CUDA out of memory. Tried 2 GiB.; lower --batch-size, or give --device cpu\n"
    assert (ended.returncode, ended.stderr) == (2, line)
