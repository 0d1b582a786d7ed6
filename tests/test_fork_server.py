"""Programs started by the fork server behave as if they had been started by themselves."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests import mpi
from tests.fork_server import command

PROGRAM = """
import os, sys
print(sys.argv, os.getcwd(), os.environ["GIVEN"], "torch" in sys.modules, "mpi4py.MPI" in sys.modules, sys.stdin.read())
os.write(int(sys.argv[1]), b"to the file")
print("error", file=sys.stderr)
sys.exit(3)
"""


@pytest.mark.parametrize("how", ["file", "-c", "-m"])
def test_a_program_gets_what_its_client_has(tmp_path: Path, how: str) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    words = {"file": ["program.py"], "-c": ["-c", PROGRAM], "-m": ["-m", "program"]}[how]
    with open(tmp_path / "file", "wb") as file:
        number = file.fileno()
        done = subprocess.run(
            command(*words, str(number), "two"), cwd=tmp_path, env={"GIVEN": "variable"}, input="typed", text=True,
            capture_output=True, pass_fds=[number], check=False,
        )
    name = str(tmp_path / "program.py") if how == "-m" else words[0]
    assert done.stdout == f"{[name, str(number), 'two']} {tmp_path} variable True False typed\n"
    assert (done.stderr, done.returncode) == ("error\n", 3)
    assert (tmp_path / "file").read_bytes() == b"to the file"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_a_signal_that_ends_the_program_ends_its_client(number: signal.Signals) -> None:
    done = subprocess.run(command("-c", f"import os; os.kill(os.getpid(), {int(number)})"), check=False)
    assert done.returncode == -number


def test_signals_to_the_client_reach_the_program() -> None:
    handler = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(5)); "
    client = subprocess.Popen(command("-c", handler + "print(1, flush=True); signal.pause()"), stdout=subprocess.PIPE)
    assert client.stdout is not None and client.stdout.readline() == b"1\n"
    client.terminate()
    assert client.wait(20) == 5
    client.stdout.close()


def test_a_program_dies_with_its_client() -> None:
    client = subprocess.Popen(
        command("-c", "import os, signal; print(os.getpid(), flush=True); signal.pause()"), stdout=subprocess.PIPE
    )
    assert client.stdout is not None
    pid = int(client.stdout.readline())
    client.kill()
    client.wait(20)
    assert client.stdout.read() == b""  # returns once the program, which has the other end, has ended
    client.stdout.close()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_is_read_at_the_start_of_python_needs_a_process_of_its_own() -> None:
    program = "import sys; print('tests.fork_client' in sys.modules, sys.flags.optimize)"
    assert mpi.mpirun(1, ["-c", program]).stdout == "True 0\n"
    assert mpi.mpirun(1, ["-c", program], env={"PYTHONOPTIMIZE": "1"}).stdout == "False 1\n"
    assert mpi.mpirun(1, ["-c", program], fork=False).stdout == "False 0\n"


def test_a_forked_rank_that_stays_behind_is_found() -> None:
    """A rank that outlives its job is found; look while the job runs, since the rank ends with its client."""
    with mpi.start(2, ["-c", "import time; print(1, flush=True); time.sleep(60)"], fork=True) as job:
        while job.text()[0] != "1\n1\n":
            assert job.running(), job.text()
            time.sleep(0.02)
        forked = [pid for pid in job.rank_pids() if Path(f"/proc/{pid}/comm").read_text() != "python\n"]
        assert len(forked) >= 2
        job.kill()
        assert not job.wait(20).survivors
