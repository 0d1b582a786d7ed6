"""A signal that asks for an end while the ranks are still starting, or in an evaluation: nothing is lost."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from lapse_elmo.checkpoint import read_manifest
from lapse_elmo.mpi.signals import RESUMABLE
from tests import mpi
from tests.training.conftest import Drive
from tests.training.corpora import TINY, Prepared, checkpoints, records


def holds_back(pid: int, number: int) -> bool:
    """Return whether the process blocks the signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigBlk"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_usr1_while_torch_is_imported(small: Prepared, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    argv = ["bin/train", *small.options, *TINY, "--epochs", "1000", "--run-dir", str(run_dir)]
    with mpi.start(2, argv) as job:
        pids: list[int] = []
        while len(pids) < 2:
            assert job.running(), job.text()
            time.sleep(0.005)
            pids = [pid for pid in job.rank_pids() if holds_back(pid, signal.SIGUSR1)]
        assert not run_dir.exists()
        for pid in pids:
            os.kill(pid, signal.SIGUSR1)
        ended = job.wait(120)
    assert ended.returncode == RESUMABLE, ended.output
    assert [path.name for path in checkpoints(run_dir)] == ["step-00000001"]


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_signal_ends_an_evaluation(small: Prepared, drive: Drive, tmp_path: Path, nodes: int) -> None:
    """The run is saved at once, and a resumed one makes up for the evaluation, also if that is interrupted again."""
    argv = [*small.options, *TINY, "--epochs", "1", "--batch-size", "51", "--nodes", str(nodes), "--sync", "--run-dir"]
    stopped, again, whole = (str(tmp_path / name) for name in ("stopped", "again", "whole"))
    twice = 2 * [("signal in evaluation", [*argv, again])]
    cases = [("signal in evaluation", [*argv, stopped]), *twice, ("train", [*argv, again]), ("train", [*argv, whole])]
    assert all(rank["error"] is None for case in drive(2, cases, timeout=120) for rank in case)
    (path,) = checkpoints(Path(stopped))
    assert read_manifest(path)["state"]["evaluation_due"] and not records(Path(stopped), "epoch")
    (made_up,), (wanted,) = records(Path(again), "epoch"), records(Path(whole), "epoch")
    name = "heldout/mean_perplexity"
    assert (made_up["step"], made_up[name]) == (wanted["step"], wanted[name])
