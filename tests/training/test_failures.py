"""A job ends soon after any failure of any rank and reports it, and the last checkpoint is complete."""

from __future__ import annotations

import shutil
import socket
import time
from pathlib import Path

import pytest

from lapse_elmo import checkpoint
from lapse_elmo.checkpoint import Manifest
from tests import mpi
from tests.training.corpora import TINY, Prepared, checkpoints, train_alone, train_job
from tests.training.failing import IN_SAVE
from tests.training.test_bad_input import damage_tokens

PROGRAM = Path(__file__).with_name("failing.py")
START_S, END_S = 60, 30
OPTIONS = ("--sync", "--epochs", "2", "--batch-size", "8", "--save-every-steps", "4")
ALONE = ("exception", "exit-0", "thread", "full-memory")  # errors of one rank; all ranks learn of the others together
STATUS = {"exception": 1, "exit-0": 1, "thread": 1, "full-disk": 2, "full-memory": 2, "not-finite": 2}
CAUSE = {
    "exception": "RuntimeError: this breaks", "exit-0": "left the job: sys.exit(0)",
    "thread": "RuntimeError: this breaks", "full-disk": "No space left on device",
    "full-memory": "GB of shared memory but /dev/shm has", "not-finite": "is not finite at step",
}


def newest_whole(run_dir: Path) -> Manifest:
    """Check that every checkpoint is complete; return the manifest of the newest."""
    manifests = [checkpoint.read_manifest(path) for path in checkpoint.candidates(run_dir)]
    for path, manifest in zip(checkpoint.candidates(run_dir), manifests, strict=True):
        checkpoint.check_files(path, manifest)
    return manifests[0]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", [*STATUS, "kill", "kill-in-layout", "kill-in-save", "kill-in-rename"])
def test_failure_of_one_rank(small: Prepared, tmp_path: Path, kind: str, rank: int) -> None:
    if kind in ("kill-in-layout", "kill-in-rename") and rank:
        pytest.skip("rank 0 alone lays out the files of its node, and gives a checkpoint its name")
    run_dir = tmp_path / "run"
    argv = [str(PROGRAM), kind, str(rank), *small.options, *TINY, "--run-dir", str(run_dir), *OPTIONS]
    job = mpi.mpirun(2, argv, timeout=START_S + END_S)
    assert job.returncode not in (0, 75), job.output
    assert not job.survivors, job.output
    if kind in STATUS:
        assert job.returncode == STATUS[kind], job.output
        assert f"[rank {rank}/2 {socket.gethostname()}]" in job.stderr and CAUSE[kind] in job.stderr, job.output
        assert STATUS[kind] == 1 or "Traceback" not in job.stderr, job.output
    assert newest_whole(run_dir)["step"] >= 4
    left = [path.name for path in checkpoints(run_dir) if path.name.startswith(".")]
    # An error of one rank alone ends the others too, which may be saving; the next start clears away what is left.
    assert not left or kind.startswith("kill") or kind in ALONE, left
    if kind.startswith("kill-in"):
        with train_job(2, small, run_dir, *OPTIONS) as again:
            ended = again.wait(START_S + END_S)
        assert ended.returncode == 0, ended.output
        assert not [path for path in checkpoints(run_dir) if path.name.startswith(".")]


def test_kinds_are_all_here() -> None:
    assert set(IN_SAVE) <= {*STATUS, "kill", "kill-in-save"}


def test_no_shared_memory_stays_behind(small: Prepared, tmp_path: Path) -> None:
    """Ranks that die without cleaning up leave no shared memory. Other jobs may run: look at this job's files only."""
    run_dir = tmp_path / "run"
    with train_job(2, small, run_dir, *OPTIONS) as job:
        while not checkpoint.candidates(run_dir):
            assert job.running(), job.text()
            time.sleep(0.01)
        maps = [line for pid in job.rank_pids() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
        mapped = {line.split(None, 5)[5] for line in maps if "/dev/shm/" in line}
        job.kill()
        job.wait(END_S)
    assert mapped and not [path for path in mapped if not path.endswith("(deleted)")]


@pytest.mark.parametrize("rank", [0, 2])
def test_a_shard_that_becomes_unreadable(small: Prepared, tmp_path: Path, rank: int) -> None:
    run_dir = tmp_path / "run"
    shards = shutil.copytree(small.shards, tmp_path / "shards")
    train_alone(small, run_dir, *OPTIONS, "--shards", str(shards), "--max-steps", "4")
    damage_tokens(shards / f"train-0000{rank}-of-00003.h5")
    with train_job(3, small, run_dir, *OPTIONS, "--shards", str(shards)) as job:
        ended = job.wait(START_S + END_S)
    assert ended.returncode == 2 and not ended.survivors, ended.output
    assert f"train-0000{rank}-of-00003.h5 is damaged" in ended.stderr, ended.output
    assert newest_whole(run_dir)["step"] == 4
