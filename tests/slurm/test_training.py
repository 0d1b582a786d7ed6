"""Real training and preprocessing under Slurm, on two nodes: it completes, is warned and resumes, fails when it must.

The two slurmd of these tests share a machine, but MPICH takes them for two nodes, as Slurm tells it: their ranks talk
through the network.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mpi import ROOT
from tests.slurm.cluster import Cluster
from tests.training.corpora import TINY, Prepared, checkpoints, records

TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
TRAIN, PREPROCESS = (str(ROOT / "slurm" / f"{name}.sbatch") for name in ("train", "preprocess"))
# Slurm looks for jobs to warn every 30 s, and then for those whose warning is due in the next 30 s. So this job is
# warned between 8 and 38 s after its start: when it trains, and long before the shortest limit, one minute, is over.
LIMIT = ("--time=1", "--signal=B:USR1@22")
EVERY = 5
LONG_S = 150  # for a job, on a machine that has much else to do
END_S = 30  # from a failure to the end of the job


def options(corpus: Prepared, run_dir: Path) -> list[str]:
    return [*corpus.options, *TINY, "--batch-size", "8", "--run-dir", str(run_dir), "--report-every", str(EVERY)]


def until(condition: Callable[[], object], cluster: Cluster, number: int) -> None:
    deadline = time.monotonic() + LONG_S
    while not condition():
        job = cluster.job(number)
        assert not job.over and time.monotonic() < deadline, job.output
        time.sleep(0.2)


def trained(run_dir: Path) -> bool:
    """Whether the run has got somewhere."""
    return (run_dir / "metrics.jsonl").exists() and bool(records(run_dir, "train"))


# Of the limited job. Once requeued it is to train 20 steps more, so that neither a fast nor a slow machine decides.
SITE = """\
if [[ -n ${SLURM_RESTART_COUNT:-} && ! -e first.log ]]; then
  cp "$LIMITED_LOGS/limited-$SLURM_JOB_ID.log" first.log
  newest=$(ls run/checkpoints | sort | tail -n 1)
  echo "max_steps = $((10#${newest#step-} + 20))" >> job.toml
fi
"""


@pytest.fixture(scope="module")
def limited(cluster: Cluster, corpus: Prepared, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """A job too long for its limit: its number and root. It runs while the other tests do."""
    root = tmp_path_factory.mktemp("limited")
    (root / "bin").symlink_to(ROOT / "bin")
    shutil.copytree(ROOT / "slurm", root / "slurm")
    (root / "slurm" / "site.sh").write_text(f"LIMITED_LOGS={cluster.folder}\n{SITE}")
    (root / "job.toml").write_text("[training]\nepochs = 1000000\n")
    words = ["--config", "job.toml", *options(corpus, root / "run")]
    return cluster.submit(f"--chdir={root}", "--job-name=limited", *LIMIT, TRAIN, *words), root


@pytest.mark.usefixtures("limited")
def test_two_nodes_train(cluster: Cluster, corpus: Prepared, tmp_path: Path) -> None:
    run_dir = tmp_path / "a run"
    words = [*options(corpus, run_dir), "--epochs", "2", "--sync"]
    job = cluster.wait(cluster.submit("--nodes=2", "--ntasks-per-node=2", TRAIN, *words), LONG_S)
    assert (job.state, job.status) == ("COMPLETED", 0), job.output
    num_tokens = sum(len(sentence.split()) for sentence in corpus.train)
    assert [line["train/epoch_tokens"] for line in records(run_dir, "epoch")] == [num_tokens, num_tokens]
    assert json.loads((checkpoints(run_dir)[-1] / "manifest.json").read_text())["world_size"] == 4


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_fails_the_job(rank: int, cluster: Cluster, corpus: Prepared, tmp_path: Path) -> None:
    number = cluster.submit(*TWO_NODES, TRAIN, *options(corpus, tmp_path / "run"), "--epochs", "100000")
    until(lambda: trained(tmp_path / "run"), cluster, number)
    os.kill(cluster.ranks(number)[rank], signal.SIGKILL)
    job = cluster.wait(number, END_S)
    assert job.state == "FAILED" and job.status not in (0, 2, 75) and job.restarts == 0, job.output
    assert cluster.ranks(number) == {}


@pytest.mark.usefixtures("limited")
def test_two_nodes_preprocess(cluster: Cluster, corpus: Prepared, tmp_path: Path) -> None:
    text = [str(corpus.shards.parent / "train.txt"), "--heldout", str(corpus.shards.parent / "heldout.txt")]
    words = [*text, "--vocab", str(corpus.vocab), "--output", str(tmp_path / "shards"), "--num-shards", "3"]
    job = cluster.wait(cluster.submit(*TWO_NODES, PREPROCESS, "shards", *words), LONG_S)
    assert (job.state, job.status) == ("COMPLETED", 0), job.output
    assert contents(tmp_path / "shards") == contents(corpus.shards)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_job_near_its_limit_saves_is_requeued_and_completes(cluster: Cluster, limited: tuple[int, Path]) -> None:
    number, root = limited
    job = cluster.wait(number, LONG_S)
    assert (job.state, job.status) == ("COMPLETED", 0), job.output
    assert job.restarts >= 1, job.output  # more on a machine that takes the limit to start up
    assert job.log.name == f"limited-{number}.log"
    first = (root / "first.log").read_bytes()
    assert first and job.log.read_bytes().startswith(first) and job.log.stat().st_size > len(first)
    *_, max_steps = (root / "job.toml").read_text().split()
    last = int(max_steps)
    assert checkpoints(root / "run")[-1].name == f"step-{last:08d}"
    steps = [line["step"] for line in records(root / "run", "train")]
    assert steps == sorted(set(steps)), "steps were trained twice"
    assert {*range(EVERY, last, EVERY), last} <= set(steps)
