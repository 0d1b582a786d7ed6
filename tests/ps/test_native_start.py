"""Jobs with a native package start and end in order or fail within seconds, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.mpi import ROOT, Job, mpirun
from tests.ps.native_engines import installed

PROGRAM = Path(__file__).parent / "native_program.py"
FAKES = str(Path(__file__).parent / "fakes")


def fake(fault: str) -> dict[str, str]:
    """Return the environment of a job that finds the stand-in for lapse, with ``fault``."""
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), FAKES]), "FAKE_LAPSE": fault}


def job(package: str, end: str, env: dict[str, str] | None = None, start_s: float = 30.0) -> Job:
    return mpirun(2, [PROGRAM, package, end, str(start_s)], timeout=90, env=env)


ENDS = {
    "closed": 0, "left open": 0, "started again": 0, "error everywhere": 2, "error on a rank": None,
    "rank 0 killed": None, "last rank killed": None,
}


@pytest.mark.parametrize(
    ("package", "end"),
    [(package, end) for package in ("stand-in", "lapse", "adapm") if package == "stand-in" or installed(package)
     for end in ENDS],
)
def test_ends(package: str, end: str) -> None:
    """Check the end of a job. (An absent package is skipped here; test_contract.py reports the skip.)"""
    result = job("lapse", end, fake("")) if package == "stand-in" else job(package, end)
    expected = ENDS[end]
    assert result.returncode == expected if expected is not None else result.returncode != 0, result.output
    assert not result.survivors, result.output


@pytest.mark.parametrize("fault", ["absent", "of another torch", "another package", "no scheduler"])
def test_what_can_be_known_before_the_start_is_an_error_of_the_user(fault: str) -> None:
    result = job("lapse", "closed", fake(fault))
    assert result.returncode == 2, result.output
    assert result.stderr.startswith("native_program.py: error: ") and result.stderr.count("\n") == 1, result.output
    assert not result.survivors


@pytest.mark.parametrize("fault", ["never up", "never answers"])
def test_nodes_that_do_not_come_up_or_answer_in_time_end_the_job(fault: str) -> None:
    result = job("lapse", "closed", fake(fault), start_s=10)
    assert result.returncode != 0
    assert "not all nodes of the parameter server came up" in result.stderr, result.output
    assert not result.survivors


def test_a_start_ends_in_time_although_the_rank_has_a_handler_for_signals() -> None:
    """As in bin/train, which saves after SIGTERM: blocked in C++, it would neither do that nor end."""
    program = """
        import os, signal, time
        from lapse_elmo.ps import scheduler
        signal.signal(signal.SIGTERM, lambda *_: None)
        parent, letters, living = os.getpid(), os.pipe(), os.pipe()
        if not os.fork():
            os.dup2(letters[0], 0)
            os.write(letters[1], scheduler.STARTS)
            os._exit(scheduler._watch(0, living[0], 0.1, parent))
        end = time.monotonic() + 10
        while time.monotonic() < end:
            time.sleep(0.1)
    """
    words = [sys.executable, "-c", textwrap.dedent(program)]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert "not all nodes of the parameter server came up" in ended.stderr


def test_a_package_that_crashes_at_its_start_is_named() -> None:
    result = job("lapse", "closed", fake("crashes"))
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("lapse-elmo: error: ")]
    assert len(lines) == 1 and "[rank 1/2 " in lines[0], result.output
    assert "the package lapse died at its start (Segmentation fault)" in lines[0]
    assert not result.survivors


def test_the_death_of_the_scheduler_ends_the_job() -> None:
    result = job("lapse", "scheduler dies", fake(""))
    assert result.returncode != 0
    assert not result.survivors


def test_an_address_that_is_not_of_this_host() -> None:
    result = job("lapse", "closed", fake("") | {"DMLC_PS_ROOT_URI": "203.0.113.1"})
    assert result.returncode == 2, result.output
    assert "DMLC_PS_ROOT_URI" in result.stderr
