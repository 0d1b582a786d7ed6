"""A requeued job on a node where its first start was killed while MPI started."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from lapse_elmo.mpi import left_files
from lapse_elmo.mpi.left_files import mpich_number, remove_left_files, step_start_s
from tests.mpi import ROOT
from tests.slurm.cluster import Cluster

# Ranks that exchange a message and leave another one unread, and are killed before any of them has left MPI.
KILLED = """\
import os, signal, time
from mpi4py import MPI
other = 1 - MPI.COMM_WORLD.rank
MPI.COMM_WORLD.sendrecv(1, other, source=other)
MPI.COMM_WORLD.isend(2, other)
time.sleep(0.5)
os.kill(os.getpid(), signal.SIGKILL)
"""
JOB = """\
#!/bin/bash
#SBATCH --ntasks=2 --nodes=1 --requeue --open-mode=append
if [[ -z ${SLURM_RESTART_COUNT:-} ]]; then
  srun --mpi=pmi2 --kill-on-bad-exit=1 python killed.py
  scontrol requeue "$SLURM_JOB_ID"
else
  ls /dev/shm
  timeout 30 srun --mpi=pmi2 --kill-on-bad-exit=1 python %s/bin/_probe world 2
fi
"""


def test_a_job_whose_start_was_killed_starts_again(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    (tmp_path / "job").write_text(JOB % ROOT)
    number = cluster.submit(f"--chdir={tmp_path}", str(tmp_path / "job"))
    job = cluster.wait(number, 180)
    name = f"mpich_shm_{mpich_number(f'{number}.0'):x}_0"
    left = Path("/dev/shm", name)
    try:
        assert (job.restarts, name in job.output.split()) == (1, True), job.output
        assert job.status == 0, job.output
        assert not left.exists()
    finally:
        left.unlink(missing_ok=True)


@pytest.fixture
def requeued(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in (("JOB_ID", "9989018"), ("STEP_ID", "0"), ("RESTART_COUNT", "1")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(left_files, "step_start_s", lambda: time.time() - 60)
    return monkeypatch


def files(folder: Path) -> tuple[Path, Path, Path]:
    """Make MPICH's file of this step as an earlier start left it, one of this start, and an old one of another job."""
    old, new, foreign = (folder / f"mpich_shm_{name}" for name in ("9171453_0", "9171453_1", "9171454_0"))
    for path in (old, new, foreign):
        path.touch()
    for path in (old, foreign):
        os.utime(path, (time.time() - 600,) * 2)
    return old, new, foreign


def test_only_older_files_of_the_same_step_are_removed(requeued: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, new, foreign = files(tmp_path)
    remove_left_files(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([new, foreign])


@pytest.mark.parametrize("missing", ["SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"])
def test_nothing_is_removed_outside_a_requeued_job(
    missing: str, requeued: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = files(tmp_path)
    requeued.delenv(missing)
    remove_left_files(tmp_path)
    assert all(path.exists() for path in kept)


def test_without_slurmstepd_the_start_of_the_step_is_unknown() -> None:
    assert step_start_s() is None
