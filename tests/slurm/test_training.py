"""Real training and preprocessing on several nodes of Slurm: it completes, is warned and resumes, or fails as it must.

The four slurmd of these tests share a machine, but the MPI takes them for four nodes, as Slurm tells it: their ranks
talk through the network. Most jobs start their ranks by the fork server: Slurm and the MPI see its clients, which pass
signals on to the ranks, and their ends and statuses back. With each MPI one job starts them as users do.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import fork_server, open_mpi
from tests.mpi import ROOT
from tests.slurm.cluster import Cluster, SlurmJob
from tests.training.corpora import TINY, Prepared, checkpoints, records

TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
TRAIN, PREPROCESS = (str(ROOT / "slurm" / f"{name}.sbatch") for name in ("train", "preprocess"))
# Slurm looks for jobs to warn every 30 s, and then for those whose warning is due in the next 30 s. So this job is
# warned between 8 and 38 s after its start: when it trains, and long before the shortest limit, one minute, is over.
LIMIT = ("--time=1", "--signal=B:USR1@22")
LONG_S = 150  # for a job, on a machine that has much else to do
END_S = 30  # from a failure to the end of the job


def options(corpus: Prepared, run_dir: Path) -> list[str]:
    return [*corpus.options, *TINY, "--batch-size", "8", "--run-dir", str(run_dir), "--report-every", "1"]


# Of an endless job. Once requeued it is to train one step more, so that neither a fast nor a slow machine decides.
SITE = """\
if [[ -n ${SLURM_RESTART_COUNT:-} && ! -e first.log ]]; then
  cp "$LOGS/$SLURM_JOB_NAME-$SLURM_JOB_ID.log" first.log
  newest=$(ls run/checkpoints | sort | tail -n 1)
  echo "max_steps = $((10#${newest#step-} + 1))" >> job.toml
fi
"""


# In the place of bin/train, for a job that trains until Slurm warns it: a step sleeps for half a second.
SLOW = f"""\
#!/usr/bin/env python3
import sys, time
sys.path.insert(0, {str(ROOT / "bin")!r})
import _venv
from lapse_elmo.commands import run
from lapse_elmo.step import TrainingStep
step = TrainingStep.__call__
TrainingStep.__call__ = lambda *arguments: (time.sleep(0.5), step(*arguments))[1]
run("train", sys.argv[1:])
"""


def own_root(root: Path, site: str, program: str = "") -> None:
    """Make ``root`` a repository with this slurm/site.sh, and with ``program`` as bin/train if it is given."""
    (root / ".venv").symlink_to(ROOT / ".venv")
    (root / "bin").mkdir()
    for path in (ROOT / "bin").iterdir():
        (root / "bin" / path.name).symlink_to(path)
    shutil.copytree(ROOT / "slurm", root / "slurm")
    (root / "slurm" / "site.sh").write_text(site)
    if program:
        path = root / "bin" / "train"
        path.unlink()
        path.write_text(program)
        path.chmod(0o755)


def forked() -> str:
    """Return a program that starts bin/train by the fork server; the ranks have the job's number as name."""
    words = fork_server.command(str(ROOT / "bin" / "train"))
    return f'#!/bin/sh\nexport {fork_server.NAME}=$SLURM_JOB_ID\nexec {" ".join(words)} "$@"\n'


class Endless:
    """A job that trains until it has been requeued once, in a root of its own."""

    def __init__(
        self, cluster: Cluster, corpus: Prepared, root: Path, *words: str, stall_minutes: float = 20.0, site: str = "",
        program: str = "",
    ) -> None:
        self.cluster, self.root, self.run_dir = cluster, root, root / "run"
        own_root(root, f"LOGS={cluster.folder}\n{SITE}{site}", program or forked())
        (root / "job.toml").write_text(f"[run]\nstall_minutes = {stall_minutes}\n[training]\nepochs = 100000\n")
        own = ["--config", "job.toml", "--save-every-steps", "10", *options(corpus, self.run_dir)]
        self.number = cluster.submit(f"--chdir={root}", *words, TRAIN, *own)

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + LONG_S
        while not condition():
            job = self.cluster.job(self.number)
            assert not job.over and time.monotonic() < deadline, job.output
            time.sleep(0.1)

    def completes(self) -> SlurmJob:
        """The job at its end, which every step has led to once and none twice, and whose log is complete."""
        job = self.cluster.wait(self.number, LONG_S)
        assert (job.state, job.status) == ("COMPLETED", 0) and job.restarts, job.output
        first = (self.root / "first.log").read_bytes()
        assert first and job.log.read_bytes().startswith(first) and job.log.stat().st_size > len(first)
        last = int((self.root / "job.toml").read_text().split()[-1])
        assert checkpoints(self.run_dir)[-1].name == f"step-{last:08d}"
        assert [line["step"] for line in records(self.run_dir, "train")] == [*range(1, last + 1)]
        return job


@pytest.fixture(scope="module")
def limited(cluster: Cluster, corpus: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Endless:
    """Start a job that reaches its time limit while the other tests run."""
    return Endless(cluster, corpus, tmp_path_factory.mktemp("limited"), "--job-name=limited", *LIMIT, program=SLOW)


@pytest.fixture(params=["mpich", "openmpi"])
def site(request: pytest.FixtureRequest) -> str:
    """Return the content of slurm/site.sh for an MPI family."""
    if request.param == "mpich":
        return ""
    if reason := open_mpi.why_not():
        pytest.skip(reason)
    return open_mpi.site()


@pytest.mark.usefixtures("limited")
def test_four_nodes_train(cluster: Cluster, corpus: Prepared, tmp_path: Path, site: str) -> None:
    own_root(tmp_path, site, "" if site else forked())  # ranks of MPICH start as users start them in the job `limited`
    words = [*options(corpus, tmp_path / "a run"), "--epochs", "2", "--sync"]
    number = cluster.submit(f"--chdir={tmp_path}", "--nodes=4", "--ntasks-per-node=1", TRAIN, *words)
    job = cluster.wait(number, LONG_S)
    assert (job.state, job.status) == ("COMPLETED", 0), job.output
    num_tokens = sum(len(sentence.split()) for sentence in corpus.train)
    assert [line["train/epoch_tokens"] for line in records(tmp_path / "a run", "epoch")] == [num_tokens, num_tokens]
    assert json.loads((checkpoints(tmp_path / "a run")[-1] / "manifest.json").read_text())["world_size"] == 4
    assert re.findall(r"^ *[0-3] +\S+ +\d+ +(\d) ", job.output, re.MULTILINE) == ["0", "1", "2", "3"], job.output
    assert ("MPI family: openmpi" if site else "MPI family: mpich") in job.output, job.output


@pytest.mark.usefixtures("limited")
def test_open_mpi_passes_the_warning_on(cluster: Cluster, corpus: Prepared, tmp_path: Path) -> None:
    """Its mpirun starts the ranks here, and has to forward the signal: the job saves, is requeued and completes."""
    if reason := open_mpi.why_not():
        pytest.skip(reason)
    job = Endless(cluster, corpus, tmp_path, *TWO_NODES, "--job-name=warned", site=open_mpi.site())
    job.until(lambda: list(job.run_dir.glob("checkpoints/step-*")))
    cluster.run("scancel", "--batch", "--signal=USR1", str(job.number))
    assert job.completes().restarts == 1


@pytest.mark.usefixtures("limited")
def test_an_error_on_all_ranks_has_its_status(cluster: Cluster, corpus: Prepared, tmp_path: Path, site: str) -> None:
    """The loss is soon not finite: every rank leaves MPI while its node's manager could still be calling it."""
    words = [*options(corpus, tmp_path / "run"), "--learning-rate", "1e38", "--clip-norm", "0"]
    own_root(tmp_path, site, forked())
    number = cluster.submit(f"--chdir={tmp_path}", "--nodes=2", "--ntasks-per-node=2", TRAIN, *words)
    job = cluster.wait(number, LONG_S)
    assert (job.state, job.status) == ("FAILED", 2), job.output
    assert job.output.count("is not finite at step") == 1 and "Traceback" not in job.output, job.output


@pytest.mark.usefixtures("limited")
def test_killed_rank_fails_the_job_and_it_can_go_on(
    cluster: Cluster, corpus: Prepared, tmp_path: Path, site: str
) -> None:
    job = Endless(cluster, corpus, tmp_path, *TWO_NODES, site=site)
    job.until(lambda: list(job.run_dir.glob("checkpoints/step-*")))
    os.kill(cluster.ranks(job.number)[1], signal.SIGKILL)
    killed = cluster.wait(job.number, END_S)
    assert killed.state == "FAILED" and killed.status not in (0, 2, 75) and killed.restarts == 0, killed.output
    deadline = time.monotonic() + END_S
    while cluster.ranks(job.number):
        assert time.monotonic() < deadline, "ranks outlived their job"
        time.sleep(0.1)
    cluster.run("scontrol", "requeue", str(job.number))  # as Slurm does after a node has failed
    job.completes()


@pytest.mark.usefixtures("limited")
def test_a_rank_that_hangs_ends_the_job_which_is_requeued_and_completes(
    cluster: Cluster, corpus: Prepared, tmp_path: Path, site: str
) -> None:
    rank = 1
    job = Endless(cluster, corpus, tmp_path, *TWO_NODES, "--job-name=hung", stall_minutes=0.15, site=site)
    job.until(lambda: list(job.run_dir.glob("checkpoints/step-*")))
    os.kill(cluster.ranks(job.number)[rank], signal.SIGSTOP)
    ended = job.completes()
    assert f"  silent: rank {rank}/2 " in ended.output, ended.output
    assert "is requeued to resume from its last checkpoint" in ended.output, ended.output
    (notes,) = job.root.glob("*.stalls")
    assert f"  silent: rank {rank}/2 " in notes.read_text()


@pytest.mark.usefixtures("limited")
def test_two_nodes_preprocess(cluster: Cluster, corpus: Prepared, tmp_path: Path) -> None:
    text = [str(corpus.shards.parent / "train.txt"), "--heldout", str(corpus.shards.parent / "heldout.txt")]
    words = [*text, "--vocab", str(corpus.vocab), "--output", str(tmp_path / "shards"), "--num-shards", "3"]
    job = cluster.wait(cluster.submit(*TWO_NODES, PREPROCESS, "shards", *words), LONG_S)
    assert (job.state, job.status) == ("COMPLETED", 0), job.output
    assert contents(tmp_path / "shards") == contents(corpus.shards)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_job_near_its_limit_saves_is_requeued_and_completes(limited: Endless) -> None:
    job = limited.completes()
    assert job.log.name == f"limited-{limited.number}.log"
