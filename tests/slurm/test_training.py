"""Real training and preprocessing under Slurm, on two nodes: it completes, is warned and resumes, fails when it must.

The two slurmd of these tests share a machine, but MPICH takes them for two nodes, as Slurm tells it: their ranks talk
through the network.
"""

from __future__ import annotations

import json
import os
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
END_S = 30  # from a failure to the end of the job


def options(corpus: Prepared, run_dir: Path) -> list[str]:
    return [*corpus.options, *TINY, "--batch-size", "8", "--run-dir", str(run_dir), "--report-every", "5"]


def until(condition: Callable[[], object], cluster: Cluster, number: int, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        job = cluster.job(number)
        assert not job.over and time.monotonic() < deadline, job.output
        time.sleep(0.2)


def trained(run_dir: Path) -> bool:
    """Whether the run has got somewhere."""
    return (run_dir / "metrics.jsonl").exists() and bool(records(run_dir, "train"))


@pytest.fixture(scope="module")
def limited(cluster: Cluster, corpus: Prepared, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """A job that cannot end within its limit: its number and folder. It runs while the other tests do."""
    folder = tmp_path_factory.mktemp("limited")
    (folder / "job.toml").write_text("[training]\nepochs = 1000000\n")
    words = ["--config", str(folder / "job.toml"), *options(corpus, folder / "run")]
    return cluster.submit("--job-name=limited", *LIMIT, TRAIN, *words), folder


@pytest.mark.usefixtures("limited")
def test_two_nodes_train(cluster: Cluster, corpus: Prepared, tmp_path: Path) -> None:
    run_dir = tmp_path / "a run"
    words = [*options(corpus, run_dir), "--epochs", "2", "--sync"]
    job = cluster.wait(cluster.submit("--nodes=2", "--ntasks-per-node=2", TRAIN, *words), 60)
    assert (job.state, job.status) == ("COMPLETED", 0), job.output
    num_tokens = sum(len(sentence.split()) for sentence in corpus.train)
    assert [line["train/epoch_tokens"] for line in records(run_dir, "epoch")] == [num_tokens, num_tokens]
    assert json.loads((checkpoints(run_dir)[-1] / "manifest.json").read_text())["world_size"] == 4


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_fails_the_job(rank: int, cluster: Cluster, corpus: Prepared, tmp_path: Path) -> None:
    number = cluster.submit(*TWO_NODES, TRAIN, *options(corpus, tmp_path / "run"), "--epochs", "1000000")
    until(lambda: trained(tmp_path / "run"), cluster, number, 60)
    os.kill(cluster.ranks(number)[rank], signal.SIGKILL)
    job = cluster.wait(number, END_S)
    assert job.state == "FAILED" and job.status not in (0, 2, 75) and job.restarts == 0, job.output
    assert cluster.ranks(number) == {}


@pytest.mark.usefixtures("limited")
def test_two_nodes_preprocess(cluster: Cluster, corpus: Prepared, tmp_path: Path) -> None:
    text = [str(corpus.shards.parent / "train.txt"), "--heldout", str(corpus.shards.parent / "heldout.txt")]
    words = [*text, "--vocab", str(corpus.vocab), "--output", str(tmp_path / "shards"), "--num-shards", "3"]
    job = cluster.wait(cluster.submit(*TWO_NODES, PREPROCESS, "shards", *words), 60)
    assert (job.state, job.status) == ("COMPLETED", 0), job.output
    assert contents(tmp_path / "shards") == contents(corpus.shards)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_job_near_its_limit_saves_is_requeued_and_completes(cluster: Cluster, limited: tuple[int, Path]) -> None:
    number, folder = limited
    until(lambda: cluster.job(number).restarts, cluster, number, 90)
    before = cluster.job(number)
    log = before.log.read_bytes()
    (saved,) = {json.loads((path / "manifest.json").read_text())["step"] for path in checkpoints(folder / "run")[-1:]}
    (folder / "job.toml").write_text(f"[training]\nepochs = 1000000\nmax_steps = {saved + 20}\n")
    job = cluster.wait(number, 60)
    assert (job.state, job.status, job.restarts) == ("COMPLETED", 0, 1), job.output
    assert job.log.name == f"limited-{number}.log"
    assert job.log.read_bytes().startswith(log) and job.log.stat().st_size > len(log)
    steps = [line["step"] for line in records(folder / "run", "train")]
    assert steps == sorted(set(steps)) and saved in steps and steps[-1] == saved + 20
    assert checkpoints(folder / "run")[-1].name == f"step-{saved + 20:08d}"
