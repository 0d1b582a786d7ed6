"""The batch scripts with a stand-in for bin/train, which needs no seconds to start: what they pass on and decide."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.mpi import MPIRUN, ROOT
from tests.slurm.cluster import Cluster, SlurmJob

END_S = 30
SAVED = 75
# Writes down what each rank sees, then does as its first option says; SIGUSR1 makes it save, SIGTERM as well.
STAND_IN = """\
#!/usr/bin/env python3
import json, os, signal, sys, time
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda *_: (time.sleep(0.5), sys.exit(75)))  # as ranks do that wait for all to have saved
seen = {"argv": sys.argv[1:], "env": dict(os.environ)}
name = f"{os.environ.get('SLURM_RESTART_COUNT', 0)}-{os.environ['PMI_RANK']}"
with open(f"{name}.tmp", "w") as file:
    json.dump(seen, file)
os.rename(f"{name}.tmp", f"{name}.json")
print("a rank starts", flush=True)
what = sys.argv[-1]
if what.startswith("exit"):
    sys.exit(int(what.removeprefix("exit")))
if what == "wait" and "SLURM_RESTART_COUNT" not in os.environ:
    time.sleep(60)
"""
# In the place of bin/_probe: the MPI is an MPICH, and the first launcher that is tried fits.
PROBE = "#!/bin/sh\n[ $1 = world ] || echo mpich\n"

# For arrays: makes a file named by task and restart, and waits at its first start.
TASK = """\
#!/bin/bash
trap 'exit 75' USR1
: >"$SLURM_ARRAY_TASK_ID-${SLURM_RESTART_COUNT:-0}"
if [[ -z ${SLURM_RESTART_COUNT:-} ]]; then for _ in {1..600}; do sleep 0.1; done; fi
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Make a repository with the batch scripts and a stand-in for bin/train."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    (tmp_path / "bin").mkdir()
    for name, text in (("train", STAND_IN), ("preprocess", STAND_IN), ("_probe", PROBE)):
        program = tmp_path / "bin" / name
        program.write_text(text)
        program.chmod(0o755)
    return tmp_path


def submit(cluster: Cluster, root: Path, *words: str, script: str = "train") -> int:
    """Submit a script; ``words`` are options of sbatch, ``--``, and options of the program."""
    split = words.index("--")
    return cluster.submit(f"--chdir={root}", *words[:split], str(root / f"slurm/{script}.sbatch"), *words[split + 1 :])


def ranks(root: Path, restart: int = 0) -> list[dict]:
    """Return what each rank saw; call this after the ranks have written it."""
    paths = sorted(root.glob(f"{restart}-*.json"), key=lambda path: int(path.stem.partition("-")[2]))
    return [json.loads(path.read_text()) for path in paths]


def until_started(cluster: Cluster, number: int, root: Path, count: int = 2) -> None:
    deadline = time.monotonic() + END_S
    while len(ranks(root)) < count:
        assert time.monotonic() < deadline, cluster.job(number).output
        time.sleep(0.05)


def until_exists(path: Path) -> None:
    deadline = time.monotonic() + END_S
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


def ended(cluster: Cluster, number: int, state: str, status: int, restarts: int = 0) -> SlurmJob:
    job = cluster.wait(number, END_S)
    assert (job.state, job.status, job.restarts) == (state, status, restarts), job.output
    return job


def test_options_and_the_run_directory(cluster: Cluster, root: Path) -> None:
    number = submit(cluster, root, "--job-name=named", "--", "--config", "two words.toml", "--shards", "*", "")
    job = ended(cluster, number, "COMPLETED", 0)
    own = ["--run-dir", f"runs/named-{number}", "--resume", "auto"]
    assert [rank["argv"] for rank in ranks(root)] == [[*own, "--config", "two words.toml", "--shards", "*", ""]] * 2
    assert job.log.name == f"named-{number}.log"


def test_ranks_see_what_the_site_exports(cluster: Cluster, root: Path) -> None:
    """With --export=NONE, srun by itself would give the ranks nothing but Slurm's own variables."""
    (root / "slurm" / "site.sh").write_text("export MPI4PY_MPIABI=mpich\n")
    number = submit(cluster, root, "--export=NONE", "--", "exit0")
    ended(cluster, number, "COMPLETED", 0)
    assert [rank["env"].get("MPI4PY_MPIABI") for rank in ranks(root)] == ["mpich"] * 2
    assert all("LAPSE_ELMO_STALLS" in rank["env"] for rank in ranks(root))
    assert [rank["env"].get("LAPSE_ELMO_JOB") for rank in ranks(root)] == [f"slurm-{number}"] * 2


def test_tasks_and_cores_are_those_of_the_allocation(cluster: Cluster, root: Path) -> None:
    options = ["--nodes=2", "--ntasks-per-node=3", "--cpus-per-task=4"]
    number = submit(cluster, root, *options, "--", "wait")
    until_started(cluster, number, root, 6)
    step = cluster.run("scontrol", "show", "step", f"{number}.1")
    cluster.run("scancel", str(number))
    assert re.search(r"Nodes=2 CPUs=24 Tasks=6 ", step), step
    seen = [rank["env"] for rank in ranks(root)]
    assert [(env["PMI_RANK"], env["SLURMD_NODENAME"]) for env in seen] == [(str(r), f"n{r // 3 + 1}") for r in range(6)]
    assert {(env["PMI_SIZE"], env["SLURM_CPUS_ON_NODE"]) for env in seen} == {("6", "12")}
    # Of this alone srun learns it if slurm/site.sh names a launcher without --cpus-per-task.
    assert {env["SRUN_CPUS_PER_TASK"] for env in seen} == {"4"}


@pytest.mark.parametrize(
    ("option", "visible"), [("--gpus-per-node=2", ["0,1", "0,1"]), ("--gpus-per-task=1", ["0", "1"])]
)
def test_gpus_are_those_of_the_allocation(cluster: Cluster, root: Path, option: str, visible: list[str]) -> None:
    """A rank sees the GPUs of its allocation, which bin/train shares out among the ranks of the node."""
    ended(cluster, submit(cluster, root, option, "--", "x"), "COMPLETED", 0)
    assert [rank["env"]["CUDA_VISIBLE_DEVICES"] for rank in ranks(root)] == visible


@pytest.mark.parametrize("status", [1, 2, SAVED])
def test_status_of_the_program_is_that_of_the_job(cluster: Cluster, root: Path, status: int) -> None:
    """This holds for SAVED, too, unless Slurm sent a warning: the sender of any other signal decides what follows."""
    ended(cluster, submit(cluster, root, "--", f"exit{status}"), "FAILED", status)


def test_warned_job_goes_back_into_the_queue(cluster: Cluster, root: Path) -> None:
    """A job of two nodes that is warned is requeued. (test_training.py waits for a real time limit.)"""
    number = submit(cluster, root, "--nodes=2", "--ntasks-per-node=1", "--", "wait")
    until_started(cluster, number, root)
    cluster.run("scancel", "--batch", "--signal=USR1", str(number))
    job = ended(cluster, number, "COMPLETED", 0, restarts=1)
    assert job.log.read_text().count("a rank starts") == 4, "the log was not appended to"
    assert [len(ranks(root, restart)) for restart in (0, 1)] == [2, 2]
    assert ranks(root, 0)[0]["argv"] == ranks(root, 1)[0]["argv"]


def test_a_task_of_an_array_goes_back_into_the_queue_alone(cluster: Cluster, root: Path) -> None:
    """The number of one task is that of the array, too."""
    (root / "bin" / "train").write_text(TASK)
    number = submit(cluster, root, "--array=0-1", "--ntasks-per-node=1", "--", "x")
    until_exists(root / "0-0")
    until_exists(root / "1-0")
    tasks = cluster.run("squeue", "--noheader", f"--jobs={number}", "--format=%A %K").splitlines()
    (warned,) = (task for job, task in map(str.split, tasks) if job == str(number))
    cluster.run("scancel", "--batch", "--signal=USR1", f"{number}_{warned}")
    until_exists(root / f"{warned}-1")
    other = 1 - int(warned)
    left = cluster.run("squeue", "--noheader", f"--jobs={number}_{other}", "--format=%T").split()
    cluster.run("scancel", str(number))
    assert left == ["RUNNING"] and not (root / f"{other}-1").exists()


def test_job_warned_before_it_starts_goes_back_into_the_queue(cluster: Cluster, root: Path) -> None:
    """A job is requeued also if the warning comes while the script still looks for a launcher."""
    (root / "slurm" / "site.sh").write_text("[[ -n ${SLURM_RESTART_COUNT:-} ]] || kill -USR1 $$\n")
    job = ended(cluster, submit(cluster, root, "--", "x"), "COMPLETED", 0, restarts=1)
    assert job.log.read_text().count("a rank starts") == 2
    assert [len(ranks(root, restart)) for restart in (0, 1)] == [0, 2]


def test_a_warning_between_the_start_and_the_trap_that_forwards_it(root: Path) -> None:
    """Without Slurm: bash calls the trap of DEBUG at the very command before which the warning must come."""
    script = """
        SLURM_JOB_NAME=name SLURM_JOB_ID=1
        launcher=(bash -c 'trap "exit 75" USR1; for _ in {1..200}; do sleep 0.05; done; exit 3')
        source slurm/launch.sh
        set -o functrace
        trap 'if [[ $BASH_COMMAND == step=* ]]; then trap - DEBUG; sleep 0.5; kill -USR1 $$; fi' DEBUG
        launch program
    """
    assert subprocess.run(["bash", "-c", script], cwd=root, timeout=60, check=False).returncode == 75


def test_job_whose_ranks_cannot_handle_the_warning_yet_goes_back_into_the_queue(cluster: Cluster, root: Path) -> None:
    """A job is requeued also if the warning kills ranks, which happens while Python starts."""
    program = root / "bin" / "train"
    program.write_text(program.read_text().replace("(signal.SIGUSR1, signal.SIGTERM)", "(signal.SIGTERM,)"))
    number = submit(cluster, root, "--", "wait")
    until_started(cluster, number, root)
    cluster.run("scancel", "--batch", "--signal=USR1", str(number))
    ended(cluster, number, "COMPLETED", 0, restarts=1)


def test_warned_job_that_completes_stays_complete(cluster: Cluster, root: Path) -> None:
    program = root / "bin" / "train"
    program.write_text(program.read_text().replace("sys.exit(75)", "sys.exit(0)"))
    number = submit(cluster, root, "--", "wait")
    until_started(cluster, number, root)
    cluster.run("scancel", "--batch", "--signal=USR1", str(number))
    ended(cluster, number, "COMPLETED", 0)


def test_cancelled_job_saves_and_does_not_come_back(cluster: Cluster, root: Path) -> None:
    number = submit(cluster, root, "--", "wait")
    until_started(cluster, number, root)
    cluster.run("scancel", str(number))
    ended(cluster, number, "CANCELLED", SAVED)
    time.sleep(1)
    assert cluster.job(number).state == "CANCELLED"
    assert cluster.ranks(number) == {}


@pytest.mark.parametrize("handled", [True, False])
def test_preempted_job_comes_back_if_it_ends_in_its_grace_time(cluster: Cluster, root: Path, handled: bool) -> None:
    """Whether its ranks save, or SIGTERM kills them, as while Python starts."""
    program = root / "bin" / "train"
    if not handled:
        program.write_text(program.read_text().replace("signal.signal(number", "signal.getsignal(number) #"))
    number = submit(cluster, root, "--nodelist=n1", "--cpus-per-task=8", "--", "wait")  # all of the node
    until_started(cluster, number, root)
    urgent = cluster.submit("--partition=urgent", "--nodelist=n1", "--wrap=true")
    assert cluster.wait(urgent, END_S).state == "COMPLETED"
    job = ended(cluster, number, "COMPLETED", 0, restarts=1)
    assert f"job {number} is preempted, and is requeued" in job.output


def test_job_cancelled_while_it_saves_for_its_limit_does_not_come_back(cluster: Cluster, root: Path) -> None:
    program = root / "bin" / "train"
    slow = 'lambda *_: (signal.signal(signal.SIGTERM, signal.SIG_IGN), print("saves", flush=True), time.sleep(2)) and '
    program.write_text(program.read_text().replace("lambda *_: ", slow))
    number = submit(cluster, root, "--", "wait")
    until_started(cluster, number, root)
    cluster.run("scancel", "--batch", "--signal=USR1", str(number))
    deadline = time.monotonic() + END_S
    while "saves" not in cluster.job(number).log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    cluster.run("scancel", str(number))
    ended(cluster, number, "CANCELLED", SAVED)
    time.sleep(1)
    assert cluster.job(number).state == "CANCELLED"


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_killed_rank_ends_the_job(launcher: str, cluster: Cluster, root: Path) -> None:
    if launcher == "mpirun":
        use_mpirun(root)
    number = submit(cluster, root, "--nodes=2", "--ntasks-per-node=1", "--", "wait")
    until_started(cluster, number, root)
    os.kill(cluster.ranks(number)[1], signal.SIGKILL)
    assert cluster.wait(number, END_S).state == "FAILED"
    assert cluster.ranks(number) == {}


def test_mpirun_inside_the_allocation(cluster: Cluster, root: Path) -> None:
    """If site.sh asks for mpirun, it finds the tasks of the allocation and forwards the warning."""
    use_mpirun(root)
    number = submit(cluster, root, "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=3", "--", "wait")
    until_started(cluster, number, root, 4)
    cluster.run("scancel", "--batch", "--signal=USR1", str(number))
    deadline = time.monotonic() + END_S
    while cluster.job(number).restarts == 0:
        assert time.monotonic() < deadline, cluster.job(number).output
        time.sleep(0.1)
    cluster.run("scancel", str(number))
    hosts = [(rank["env"]["PMI_SIZE"], rank["env"]["SLURMD_NODENAME"]) for rank in ranks(root)]
    assert hosts == [("4", "n1"), ("4", "n1"), ("4", "n2"), ("4", "n2")]
    assert {rank["env"]["SLURM_CPUS_ON_NODE"] for rank in ranks(root)} == {"6"}, "of all tasks of the node"


def test_make_train_in_a_shell_of_a_job(cluster: Cluster, root: Path) -> None:
    """In a step, as of `srun --pty bash`: a step that mpirun asks for would wait for its end, as it has all cores."""
    (root / "Makefile").symlink_to(ROOT / "Makefile")
    (root / ".venv").symlink_to(ROOT / ".venv")
    made = ("--old-file=.venv/.installed", "--old-file=data/shards")
    make = ("make", f"--directory={root}", *made, "train", "RANKS=2", "TRAIN_OPTIONS=exit0")
    cluster.run("srun", "--ntasks=1", "--cpus-per-task=2", "timeout", "--signal=KILL", "20", *make)
    assert [rank["env"]["PMI_SIZE"] for rank in ranks(root)] == ["2", "2"]


def test_programs_of_one_rank_in_a_shell_of_a_job(cluster: Cluster) -> None:
    """Where the site's default is PMI-2, a shell of `srun --pty` has a connection that only one program can use."""
    probe = f"{sys.executable} {ROOT}/bin/_probe world 1"
    cluster.run("srun", "--mpi=pmi2", "--ntasks=1", "bash", "-c", f"{probe} && {probe}")


def use_mpirun(root: Path) -> None:
    (root / "slurm" / "site.sh").write_text(f"launcher=({MPIRUN})\n")


def test_preprocess_passes_its_options_on(cluster: Cluster, root: Path) -> None:
    ended(cluster, submit(cluster, root, "--", "shards", "a b", script="preprocess"), "COMPLETED", 0)
    assert [rank["argv"] for rank in ranks(root)] == [["shards", "a b"]] * 2


def test_from_another_folder(cluster: Cluster, root: Path) -> None:
    (root / "elsewhere").mkdir()
    number = cluster.submit(f"--chdir={root}/elsewhere", str(root / "slurm" / "train.sbatch"))
    ended(cluster, number, "FAILED", 2)
