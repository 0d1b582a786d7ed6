"""The MPI world: collective calls in worlds of 1 to 4, and an end for every job, after any failure of any rank."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lapse_elmo.errors import ConfigError
from lapse_elmo.mpi.launch import launch
from lapse_elmo.mpi.launcher import launcher_rank_and_size
from lapse_elmo.mpi.stdio import flush_to_launcher
from lapse_elmo.mpi.world import solo
from tests import collective, world_program
from tests.mpi import ROOT, mpirun

PROGRAM = Path(world_program.__file__)
SIZES = (1, 2, 3, 4)
END_S = 20  # far above the start of a job on a busy machine, far below the minute that the other ranks wait for
STATUS = {"exception": 1, "user-error": 2, "exit-0": 1, "exit-text": 1, "thread": 1, "full-disk": 2, "interrupt": 130}
CAUSE = {
    "exception": "RuntimeError: this breaks", "user-error": "error: this file is bad", "exit-0": "sys.exit(0)",
    "exit-text": "parting words", "thread": "RuntimeError: thread breaks", "interrupt": "",
    "full-disk": "error: cannot write a file: No space left on device; free some space",
}


@pytest.fixture(scope="module", params=SIZES)
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return collective.report_of(PROGRAM, ["checks"], request.param, tmp_path_factory.mktemp("world"), timeout=60)


@pytest.mark.parametrize("name", world_program.names())
def test_collective(report: dict[str, str], name: str) -> None:
    collective.expect(report, name)


@pytest.mark.parametrize(
    ("kind", "size", "rank"), [(kind, 2, rank) for kind in STATUS for rank in range(2)] + [("exception", 4, 3)]
)
def test_failure_of_one_rank_ends_the_job(kind: str, size: int, rank: int) -> None:
    job = mpirun(size, [PROGRAM, "fail", kind, str(rank)], timeout=END_S)
    assert job.returncode == STATUS[kind], job.output
    assert job.survivors == ()
    # An interrupt is the user's doing, and with Ctrl-C every rank gets one: nothing is said about it.
    assert kind == "interrupt" or f"[rank {rank}/{size} " in job.stderr, job.output
    assert CAUSE[kind] in job.stderr, job.output
    assert ("Traceback" in job.stderr) == (kind in ("exception", "thread")), job.output


@pytest.mark.parametrize("rank", range(2))
def test_killed_rank_ends_the_job(rank: int) -> None:
    """If a rank is killed, the job ends; the launcher reports the signal, since the rank cannot."""
    job = mpirun(2, [PROGRAM, "fail", "kill", str(rank)], timeout=END_S)
    assert job.returncode not in (0, 2), job.output
    assert job.survivors == ()


@pytest.mark.parametrize(
    ("command", "line"), [("before", "unknown option '--what'"), ("agreed", "the shards are gone")]
)
@pytest.mark.parametrize("size", [1, 3])
def test_mistake_that_all_ranks_see_is_printed_once(command: str, line: str, size: int) -> None:
    job = mpirun(size, [PROGRAM, command], timeout=END_S)
    assert job.returncode == 2, job.output
    assert job.stderr.count(line) == 1, job.output
    assert f"bin/test: error: {line}" in job.stderr, job.output
    assert "rank" not in job.stderr, job.output


@pytest.mark.parametrize("rank", [0, 2])
def test_launcher_of_another_mpi_family(rank: int) -> None:
    """A launcher of another MPI family is refused: each rank would be alone and overwrite the others' files."""
    env = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": str(rank)}
    job = mpirun(1, [PROGRAM, "hello"], env=env, launcher=False, timeout=END_S)
    assert job.returncode == 2, job.output
    assert ("launcher started 4 processes" in job.stderr) == (rank == 0), job.output
    assert "says" not in job.stdout


@pytest.mark.parametrize("size", [1, 2, 4])
def test_status_of_an_orderly_end(size: int) -> None:
    """Repeat the orderly end: if ranks left one by one, the launcher would sometimes report a killed one."""
    for _ in range(3):
        job = mpirun(size, [PROGRAM, "leave", "75"], timeout=END_S)
        assert job.returncode == 75, job.output
        assert not job.stderr and not job.survivors


def test_without_launcher() -> None:
    job = mpirun(1, [PROGRAM, "hello"], launcher=False, timeout=END_S)
    assert job.returncode == 0, job.output
    assert job.stdout.startswith("rank 0/1 ")


def test_no_usable_mpi_library() -> None:
    job = mpirun(1, [PROGRAM, "hello"], launcher=False, timeout=END_S, env={"MPI4PY_LIBMPI": "/no/such/libmpi.so"})
    assert job.returncode == 2, job.output
    assert "no MPI library can be loaded" in job.stderr, job.output
    assert "Traceback" not in job.stderr


def test_exit_status_of_a_single_process_is_its_own() -> None:
    def leave(argv: list[str], _: object) -> None:
        sys.exit(int(argv[0]))

    for status in (0, 3):
        with pytest.raises(SystemExit) as stop:
            launch(leave, [str(status)], prog="bin/test")
        assert stop.value.code == status


def test_user_error_without_a_world(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: object) -> None:
        raise ConfigError("--x is 0, expected a number above 0")

    with pytest.raises(SystemExit) as stop:
        launch(refuse, [], prog="bin/test")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "bin/test: error: --x is 0, expected a number above 0\n"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"PMI_RANK": "3", "PMI_SIZE": "8"}, (3, 8)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, (1, 2)),
        ({"PMIX_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, (1, 2)),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6"}, (5, 6)),
        ({"SLURM_PROCID": "0"}, (0, 1)),  # a batch script that starts Python itself
    ],
)
def test_what_launchers_tell(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: tuple[int, int]
) -> None:
    for name in list(os.environ):
        if name.startswith(("PMI", "OMPI", "SLURM")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launcher_rank_and_size() == expected


def test_solo_needs_no_mpi() -> None:
    code = "import sys; from lapse_elmo.mpi.world import solo; solo().barrier(); print('mpi4py' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
    assert solo().allgather("x") == ["x"]


def test_an_interrupt_that_arrives_twice_ends_the_program_quietly(tmp_path: Path) -> None:
    """From the terminal, and from the launcher a moment later, while the program waits for the reader of its output."""
    program = tmp_path / "program.py"
    program.write_text(
        f"import os, signal, sys, threading, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from lapse_elmo.mpi.launch import launch\n"
        "def main(argv, enter):\n"
        "    print('unread', flush=True)\n"
        "    threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(10)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "launch(main, [], 'program')\n"
    )
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.wait(60) == 130
        assert process.stderr is not None and process.stderr.read() == b""


def test_a_write_that_a_signal_interrupts_can_be_flushed_by_its_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a second Ctrl-C while the terminal takes no output."""
    flushed = []

    class Raw(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            flush_to_launcher()
            flushed.append(bytes(data))
            return len(data)

    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Raw())))
        print("text", flush=True)
    assert flushed == [b"text\n"]


def test_reader_that_leaves_ends_the_program_quietly(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from lapse_elmo.mpi.launch import launch\n"
        "launch(lambda argv, enter: [print('x' * 1000, flush=True) for _ in range(10_000)], [], 'program')\n"
    )
    done = subprocess.run(
        f"{sys.executable} {program} | head -1; exit ${{PIPESTATUS[0]}}", shell=True, executable="/bin/bash",
        capture_output=True, text=True, timeout=60, check=False,
    )
    assert done.returncode == 141
    assert done.stderr == ""
