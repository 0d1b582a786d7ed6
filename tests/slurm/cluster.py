"""A private Slurm on this machine: slurmctld and four slurmd in a temporary folder, on free ports, without systemd.

Nothing outside the folder is read or written; every daemon and every process of a job carries a mark in its environment
by which :meth:`Cluster.stop` finds what is left.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from tests.mpi import LAUNCHER_PREFIXES, MARK, ROOT, end_marked, forked_ranks, marked_processes

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "squeue", "scancel")
NODES = ("n1", "n2", "n3", "n4")
_CPUS = 16  # a node claims to have: as many tasks fit
_KILL_WAIT_S = 5  # between a job's SIGTERM and its SIGKILL
_GRACE_S = 20  # from the SIGTERM of a job that is preempted to its end
_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
# Waits until these tests have ended in any way, and then ends the processes that they left.
_WATCHDOG = "import sys; sys.stdin.read()\nfrom tests.mpi import end_marked\nwhile end_marked(sys.argv[1]): pass"

# MPICH names its shared memory by the job's number, and what a killed job left may still be there: each Slurm counts
# from another one. JobRequeue=0 is what many sites set. A requeued job waits until its credentials expire, where less
# than 5 s stands for the default of two minutes. The memory is a claim as well: no test is about it.
_CONFIG = """\
ClusterName=test
FirstJobId={first_job}
GresTypes=gpu
SlurmctldHost=localhost
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
TmpFS={folder}
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
JobRequeue=0
KillWait={kill_wait_s}
MessageTimeout=30
ReturnToService=2
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={grace_s}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""
_NODE = "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=100000 Gres=gpu:2"
# Slurm numbers the "GPUs" and tells each task which are its own; whether they are GPUs it does not ask.
_GPUS = """\
Name=gpu File=/dev/null Flags=nvidia_gpu_env
Name=gpu File=/dev/zero Flags=nvidia_gpu_env
"""


@dataclass(frozen=True)
class SlurmJob:
    """Slurm's record of a job: ``status`` is the batch script's exit status, ``restarts`` counts its requeues."""

    number: int
    state: str
    status: int
    restarts: int
    log: Path

    @property
    def over(self) -> bool:
        return self.state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")

    @property
    def output(self) -> str:
        """The job's log, for messages of assertions."""
        text = self.log.read_text(errors="replace") if self.log.exists() else "(no log)"
        return f"job {self.number} {self.state}, status {self.status}, {self.restarts} restarts\n{text}"


def missing() -> str:
    """Return why Slurm cannot run here; empty if it can."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=_PATH) is None]
    return f"not installed: {', '.join(absent)} (Debian: apt-get install slurm-wlm)" if absent else ""


class Cluster:
    """A context: the daemons run inside it.

    :ivar left: processes that had to be killed at the end.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.left: tuple[int, ...] = ()
        self._mark = uuid.uuid4().hex
        self._daemons: list[subprocess.Popen[bytes]] = []
        foreign = (*LAUNCHER_PREFIXES, "SBATCH_", "PYTEST_")
        self._env = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        self._env |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _PATH, MARK: self._mark, "OMP_NUM_THREADS": "1"}

    def __enter__(self) -> Cluster:
        (self.folder / "state").mkdir(parents=True)
        for node in NODES:
            (self.folder / f"spool-{node}").mkdir()
        control, *ports = _free_ports(1 + len(NODES))
        nodes = [_NODE.format(name=name, port=port, cpus=_CPUS) for name, port in zip(NODES, ports, strict=True)]
        config = _CONFIG.format(
            folder=self.folder, port=control, user=getpass.getuser(), nodes="\n".join(nodes),
            kill_wait_s=_KILL_WAIT_S, grace_s=_GRACE_S, first_job=secrets.randbelow(10_000_000) + 1,
        )
        (self.folder / "slurm.conf").write_text(config)
        (self.folder / "gres.conf").write_text(_GPUS)
        watchdog = [sys.executable, "-c", _WATCHDOG, self._mark]
        self._watchdog = subprocess.Popen(watchdog, stdin=subprocess.PIPE, cwd=ROOT, start_new_session=True)
        try:
            self._daemon("slurmctld", "-D")
            for node in NODES:
                self._daemon("slurmd", "-D", "-N", node)
            self._until_idle(timeout=30)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _daemon(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}.out", "ab") as out:
            self._daemons.append(
                subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self._env, cwd=self.folder,
                    start_new_session=True,
                )
            )

    def _until_idle(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while self.run("sinfo", "-h", "-o", "%D", "-t", "idle", check=False).strip() != str(len(NODES)):
            dead = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            if dead or time.monotonic() > deadline:
                logs = "".join(f"--- {p.name}\n{p.read_text()}" for p in sorted(self.folder.glob("*.log")))
                raise RuntimeError(f"Slurm did not come up; ended: {dead}\n{logs}")
            time.sleep(0.1)

    def run(self, *command: str, check: bool = True) -> str:
        """Run one of Slurm's commands; return its output."""
        done = subprocess.run(command, env=self._env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, *command: str) -> int:
        """Run ``sbatch *command`` from the repository's root, with the log in this folder; return the job's number."""
        output = f"--output={self.folder}/%x-%j.log"
        return int(self.run("sbatch", "--parsable", output, *command).strip())

    def job(self, number: int) -> SlurmJob:
        """Return the current state of the job."""
        text = self.run("scontrol", "show", "job", str(number))
        fields = dict(re.findall(r"^ *(JobState|StdOut)=(\S+)", text, re.MULTILINE))
        restarts, status = re.search(r"Restarts=(\d+)", text), re.search(r"ExitCode=(\d+):", text)
        assert restarts and status, text
        return SlurmJob(number, fields["JobState"], int(status[1]), int(restarts[1]), Path(fields["StdOut"]))

    def wait(self, number: int, timeout: float) -> SlurmJob:
        """Wait until the job has ended; return its record.

        :raises TimeoutError: with its log, if that takes longer; it is cancelled then.
        """
        deadline = time.monotonic() + timeout
        while not (job := self.job(number)).over:
            if time.monotonic() > deadline:
                self.run("scancel", str(number), check=False)
                raise TimeoutError(f"ran past {timeout} s: {job.output}")
            time.sleep(0.2)
        return job

    def ranks(self, number: int) -> dict[int, int]:
        """Return the process ids of the job's running ranks, by rank; forked ranks have the job's number as name."""
        found = {}
        for pid in marked_processes(self._mark):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
                values = dict(word.partition("=")[::2] for word in words)
                rank = values.get("PMI_RANK", values.get("OMPI_COMM_WORLD_RANK"))
                if values.get("SLURM_JOB_ID") == str(number) and rank is not None:
                    found[int(rank)] = pid
        return found | forked_ranks(str(number))

    def stop(self) -> None:
        """End all jobs and daemons."""
        try:
            if self._daemons and self._daemons[0].poll() is None:
                self._end_jobs()
        finally:
            for daemon in reversed(self._daemons):
                daemon.terminate()
            for daemon in self._daemons:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    daemon.wait(10)
            self.left = end_marked(self._mark)
            self._watchdog.communicate()
            for daemon in self._daemons:
                daemon.wait()

    def _end_jobs(self) -> None:
        self.run("scancel", "--user", getpass.getuser(), check=False)
        deadline = time.monotonic() + 2 * _KILL_WAIT_S
        while self.run("squeue", "--noheader", check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]
