"""Real MPI jobs for tests: started by the environment's mpirun, with a hard time limit, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import fork_server

ROOT = Path(__file__).resolve().parent.parent
MPIRUN = Path(sys.prefix) / "bin" / "mpirun"
LAUNCHER_PREFIXES = ("PMI_", "PMIX_", "OMPI_", "MPI_", "MPIR_", "HYDRA_", "SLURM_", "FLUX_", "JSM_")
MARK = "LAPSE_ELMO_TEST_JOB"
CMA_OFF = {"MPIR_CVAR_CH4_CMA_ENABLE": "0"}  # MPICH without access to other processes' memory, as in many containers
_PATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # the latter: native packages
# Variables with an effect when Python, the dynamic linker or torch start.
_READ_AT_START = ("LD_", "PYTHON", "OMP_", "KMP_", "MKL_", "OPENBLAS_", "TORCH_", "ATEN_", "DNNL_", "ONEDNN_", "CUDA_")
_GRACE_S = 3.0  # for the processes of a job that has ended, before they count as left behind


@dataclass(frozen=True)
class Job:
    """A job that has ended. ``survivors``: processes that outlived it and had to be killed."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float
    survivors: tuple[int, ...] = ()

    @property
    def output(self) -> str:
        """Standard output and standard error, for messages of assertions."""
        return f"status {self.returncode} after {self.seconds:.1f} s\n{_shown(self.stdout, self.stderr)}"


class RunningJob:
    """A job under way; a context that leaves no process behind.

    :ivar pid: of the launcher.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], cwd: Path) -> None:
        self.command = list(command)
        self._stdout = tempfile.TemporaryFile()  # noqa: SIM115 (files, not pipes: nobody needs to drain them)
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self._mark = uuid.uuid4().hex
        self._start = time.monotonic()
        self._process = subprocess.Popen(
            self.command, stdin=subprocess.DEVNULL, stdout=self._stdout, stderr=self._stderr, cwd=cwd,
            env={**env, MARK: self._mark, fork_server.NAME: _name(self._mark)}, start_new_session=True,
        )
        self.pid = self._process.pid

    def rank_pids(self) -> list[int]:
        """Return the processes of the job that run Python: the ranks, in their order if they are forked."""
        pids = marked_processes(self._mark)
        if str(fork_server.CLIENT) in self.command:
            names = {pid: _comm(pid) for pid in pids}
            return sorted((pid for pid in pids if names[pid].startswith(_name(self._mark))), key=lambda pid: names[pid])
        return [pid for pid in pids if _executable(pid) == os.path.realpath(sys.executable)]

    def running(self) -> bool:
        return self._process.poll() is None

    def text(self) -> tuple[str, str]:
        """Return what has been written so far, (stdout, stderr)."""
        texts = []
        for file in (self._stdout, self._stderr):
            size = os.fstat(file.fileno()).st_size
            texts.append(os.pread(file.fileno(), size, 0).decode(errors="replace"))
        return texts[0], texts[1]

    def kill(self) -> None:
        """Send SIGKILL to every process of the job."""
        for pid in marked_processes(self._mark):
            _kill(pid)

    def wait(self, timeout: float) -> Job:
        """Wait until the job has ended; return how.

        Raises:
            TimeoutError: The job has not ended within ``timeout`` seconds. It is killed; the message has its output.
        """
        if self.running():
            end = os.pidfd_open(self.pid)
            select.select([end], [], [], timeout)  # (Popen.wait with a timeout sleeps 0.05 s at a time)
            os.close(end)
        if self.running():
            stdout, stderr = self.text()
            self.close()
            command = " ".join(self.command)
            raise TimeoutError(f"{command}\nran past {timeout} s\n{_shown(stdout, stderr)}")
        status, seconds = self._process.wait(), time.monotonic() - self._start
        survivors = end_marked(self._mark)
        return Job(status, *self.text(), seconds, survivors)

    def close(self) -> None:
        self.kill()
        self._process.wait()
        end_marked(self._mark)

    def __enter__(self) -> RunningJob:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start(
    num_ranks: int, arguments: Sequence[str | os.PathLike[str]] | str | os.PathLike[str], *,
    env: Mapping[str, str] | None = None, cwd: Path = ROOT, launcher: bool | Sequence[str] = True, fork: bool = False,
) -> RunningJob:
    """Start ``mpirun -n num_ranks python arguments...``.

    Args:
        num_ranks: The number of ranks.
        arguments: A program with its arguments (``["bin/train", "--epochs", "1"]``), a path alone, or other arguments
            of Python (``["-c", "..."]``, ``["-m", "module"]``).
        env: Variables in addition to this process's environment, from which those of launchers and pytest are removed.
        cwd: The working directory.
        launcher: False starts Python without mpirun; a command replaces mpirun.
        fork: Whether to start Python by the fork server, if its arguments and ``env`` permit it.
    """
    words = [os.fspath(word) for word in ([arguments] if isinstance(arguments, str | os.PathLike) else arguments)]
    command = [str(MPIRUN)] if isinstance(launcher, bool) else list(launcher)
    prefix = [*command, "-n", str(num_ranks)] if launcher else []
    clean = {k: v for k, v in os.environ.items() if not k.startswith((*LAUNCHER_PREFIXES, "PYTEST_"))}
    clean |= {"PYTHONPATH": _PATH, "OMP_NUM_THREADS": "1", **(env or {})}
    forked = fork and _can_be_forked(words[0], env or {})
    return RunningJob([*prefix, *(fork_server.command(*words) if forked else [sys.executable, *words])], clean, cwd)


def mpirun(
    num_ranks: int, arguments: Sequence[str | os.PathLike[str]] | str | os.PathLike[str], *, timeout: float = 60,
    env: Mapping[str, str] | None = None, cwd: Path = ROOT, launcher: bool | Sequence[str] = True, fork: bool = True,
) -> Job:
    """Run a job as :func:`start` does, to its end.

    Raises:
        TimeoutError: The job takes longer than ``timeout`` seconds. It is killed; the message has its output.
    """
    with start(num_ranks, arguments, env=env, cwd=cwd, launcher=launcher, fork=fork) as job:
        return job.wait(timeout)


def _can_be_forked(first: str, env: Mapping[str, str]) -> bool:
    """Return whether a fork of a running Python can do what Python would with these arguments and variables."""
    known = first in ("-c", "-m") or not first.startswith("-")
    return known and not any(name.startswith(_READ_AT_START) and name != "PYTHONPATH" for name in env)


def _shown(stdout: str, stderr: str) -> str:
    return f"--- stdout\n{stdout}\n--- stderr\n{stderr}"


def marked_processes(mark: str) -> list[int]:
    """Return the job's living processes.

    Launchers put each rank in its own session, so they are found by their environment or, if forked, by their name.
    """
    entry, name = f"{MARK}={mark}".encode(), _name(mark)
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                environment = (folder / "environ").read_bytes().split(b"\0")
                if entry in environment or _comm(int(folder.name)).startswith(name):
                    found.append(int(folder.name))
    return found


def forked_ranks(name: str) -> dict[int, int]:
    """Return the process ids of the forked ranks with this name, by rank."""
    pids = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]
    found = ((re.fullmatch(rf"{name}(\d{{4}})\n", _comm(pid)), pid) for pid in pids)
    return {int(match[1]): pid for match, pid in found if match}


def _name(mark: str) -> str:
    """Return what the names of a job's forked processes begin with; their rank follows."""
    return mark[:11]


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


def end_marked(mark: str) -> tuple[int, ...]:
    """Give the remaining processes of a job a moment to end, then kill them; return those that had to be killed."""
    deadline = time.monotonic() + _GRACE_S
    while (left := marked_processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in left:
        _kill(pid)
    return tuple(left)


def _executable(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return ""


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
