"""A signal that asks for an end while the ranks are still starting: nothing is lost, as with one that comes later."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from lapse_elmo.mpi.signals import RESUMABLE
from tests import mpi
from tests.training.corpora import TINY, Prepared, checkpoints


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
