"""How many cores the ranks of a machine have: by affinity, cgroup, Slurm and the launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest

from lapse_elmo.mpi import host
from lapse_elmo.mpi.host import usable_cores
from lapse_elmo.mpi.launcher import oversubscribed
from tests.mpi import LAUNCHER_PREFIXES, mpirun


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(LAUNCHER_PREFIXES)]:
        monkeypatch.delenv(name)


def test_usable_cores_follow_the_affinity() -> None:
    one = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, [{one}]); from lapse_elmo.mpi.host import *; print(usable_cores())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "1"


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 64), ("200000 100000", 2), ("50000 100000", 1), ("6400000 100000", 64), ("9900000 100000", 64)],
)
def test_usable_cores_follow_the_quota(monkeypatch: pytest.MonkeyPatch, quota: str, expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(host, "open", lambda *_, **__: StringIO(quota), raising=False)
    assert usable_cores() == expected


def test_usable_cores_without_a_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(host, "open", missing, raising=False)
    assert usable_cores() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("allotted", "expected"), [("3", 3), ("64", 8), ("", 8)])
def test_usable_cores_follow_the_allocation(monkeypatch: pytest.MonkeyPatch, allotted: str, expected: int) -> None:
    monkeypatch.setattr(host, "open", lambda *_, **__: StringIO("max 100000"), raising=False)
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", allotted)
    assert usable_cores(range(8)) == expected


def slurm(cores: int, node: int, tasks: str) -> dict[str, str]:
    return {"SLURM_CPUS_ON_NODE": str(cores), "SLURM_NODEID": str(node), "SLURM_STEP_TASKS_PER_NODE": tasks}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"MPI_LOCALNRANKS": "4"}, False),
        ({"MPI_LOCALNRANKS": "5"}, True),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "5"}, True),
        (slurm(6, 1, "6(x2),7"), False),
        (slurm(6, 2, "6(x2),7"), True),
        (slurm(99, 0, "9"), True),
        ({**slurm(6, 0, "1"), "MPI_LOCALNRANKS": "7"}, True),
    ],
)
def test_oversubscribed(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: bool) -> None:
    """On a machine of 8 cores, 4 of which this process is bound to."""
    monkeypatch.setattr(host, "open", lambda *_, **__: StringIO("max 100000"), raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert oversubscribed() == expected


def test_ranks_bound_to_cores_of_their_own_have_all_of_them(tmp_path: Path) -> None:
    mine = sorted(os.sched_getaffinity(0))[:2]
    program = tmp_path / "program.py"
    program.write_text(
        "import os\nfrom lapse_elmo.mpi.launch import enter\n"
        f"cores = {mine}\nos.sched_setaffinity(0, [cores[int(os.environ['PMI_RANK']) % len(cores)]])\n"
        f"world = enter()\nassert world.cores == {min(len(mine), usable_cores())}, world.cores\n"
        "assert world.oversubscribed == (world.cores < 2)\n"
    )
    job = mpirun(2, program, timeout=60)
    assert job.returncode == 0, job.output
