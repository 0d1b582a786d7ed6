"""Runs of two nodes with ``--local-steps``: when they save and evaluate, and that they resume to the bit."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from lapse_elmo import checkpoint
from lapse_elmo.config.training import parse_train
from lapse_elmo.errors import ConfigError
from lapse_elmo.mpi.signals import RESUMABLE
from lapse_elmo.mpi.world import solo
from tests.training.conftest import Drive
from tests.training.corpora import (
    TINY,
    Prepared,
    assert_same_run,
    checkpoints,
    records,
    saved_arrays,
    train_alone,
    train_job,
)

LIMIT_S = 90
NODES = (  # 13 steps per epoch; --sync for equal bits of the rows
    *("--nodes", "2", "--sync", "--epochs", "2", "--batch-size", "8", "--report-every", "3", "--dense-average", "0.9"),
    *("--num-samples", "20"),
)
LOCAL = (*NODES, "--local-steps", "4", "--save-every-steps", "5", "--evaluate-every", "6")
KEPT = (*LOCAL, "--keep-checkpoints", "20", "--save-at-tokens", "300")


@pytest.fixture(scope="module")
def undisturbed(small: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    with train_job(2, small, run_dir, *KEPT) as job:
        ended = job.wait(LIMIT_S)
    assert ended.returncode == 0, ended.output
    return run_dir


def test_what_is_due_waits_for_the_next_average(undisturbed: Path) -> None:
    """Nodes average at each fourth step and at the ends of epochs, 13 and 26; only then they save and evaluate."""
    assert [line["step"] for line in records(undisturbed, "epoch")] == [8, 12, 13, 20, 24, 26]
    saved = [int(path.name.removeprefix("step-")) for path in checkpoints(undisturbed)]
    (passed,) = checkpoint.read_manifest(checkpoints(undisturbed)[-1])["milestones"]["reached"]
    assert passed[0] == 300 and passed[1] in (4, 8)  # after 3 or 6 steps of 100 tokens
    assert saved == sorted({passed[1], 8, 12, 13, 16, 20, 24, 26})
    assert [line["step"] for line in records(undisturbed, "train")] == [3, 6, 9, 12, 15, 18, 21, 24, 26]


@pytest.mark.parametrize("number", [1, 3])  # of the first checkpoint after which the signal may come
def test_a_signal_waits_for_the_next_average_and_the_run_resumes_to_the_bit(
    small: Prepared, undisturbed: Path, tmp_path: Path, number: int
) -> None:
    run_dir = tmp_path / "run"
    with train_job(2, small, run_dir, *KEPT) as job:
        deadline = time.monotonic() + LIMIT_S
        while len(checkpoint.candidates(run_dir)) < number:
            assert job.running() and time.monotonic() < deadline, job.text()
            time.sleep(0.01)
        os.kill(job.rank_pids()[-1], signal.SIGUSR1)
        ended = job.wait(LIMIT_S)
    assert ended.returncode == RESUMABLE, ended.output
    assert checkpoint.read_manifest(checkpoints(run_dir)[-1])["step"] in (8, 12, 13, 16, 20, 24)
    with train_job(2, small, run_dir, *KEPT) as job:
        ended = job.wait(LIMIT_S)
    assert ended.returncode == 0, ended.output
    assert_same_run(undisturbed, run_dir)


def test_it_learns_otherwise_than_by_sums_at_each_step(small: Prepared, undisturbed: Path, tmp_path: Path) -> None:
    """Nearly as well, and with fewer bytes between the nodes: a sample, and three arrays at each fourth step."""
    run_dir = tmp_path / "run"
    with train_job(2, small, run_dir, *NODES) as job:
        ended = job.wait(LIMIT_S)
    assert ended.returncode == 0, ended.output
    local, exact = (records(run, "epoch")[-1]["heldout/mean_perplexity"] for run in (undisturbed, run_dir))
    assert local != exact and local == pytest.approx(exact, rel=0.1)
    numbers = sum(v.size for n, v in saved_arrays(checkpoints(run_dir)[-1]).items() if n.startswith("parameters/"))
    dense = 2 * 4 * numbers  # bytes of two nodes; the others are of frequent rows
    exact_bytes = records(run_dir, "train")[0]["train/sums_bytes"]
    bytes_of_3, bytes_of_6 = (line["train/sums_bytes"] for line in records(undisturbed, "train")[:2])
    assert exact_bytes > dense
    assert exact_bytes - bytes_of_3 == pytest.approx(dense * (1 - 1 / 61), rel=0.02)
    assert bytes_of_6 - bytes_of_3 == pytest.approx(dense * 3 / 3, rel=0.02)  # one average in three steps


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_node_is_not_changed(small: Prepared, drive: Drive, tmp_path: Path, ranks: int) -> None:
    options = ("--epochs", "1", "--batch-size", "8", "--save-every-steps", "5")
    for name, more in (("plain", []), ("local", ["--local-steps", "4"])):
        if ranks == 1:
            train_alone(small, tmp_path / name, *options, *more)
        else:
            drive(ranks, [("train", [*small.options, *TINY, *options, *more, "--run-dir", str(tmp_path / name)])])
    plain, local = (checkpoints(tmp_path / name) for name in ("plain", "local"))
    assert [path.name for path in plain] == [path.name for path in local]
    arrays, others = saved_arrays(plain[-1]), saved_arrays(local[-1])
    assert arrays.keys() == others.keys()
    for name, values in arrays.items():
        np.testing.assert_array_equal(values, others[name], err_msg=name)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--local-steps", "0"], "--local-steps is 0, expected a number above 0"),
        (["--local-steps", "20000"], "--local-steps is 20000, expected at most 10,000"),
        (["--local-steps", "4", "--dense", "ps"], "--local-steps averages .* needs --dense allreduce"),
    ],
)
def test_what_cannot_be_averaged_is_refused(options: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_train(options)


def test_what_only_training_needs_is_left_out(small: Prepared, tmp_path: Path) -> None:
    """Local steps and sums in bfloat16 need ranks on CPUs; to evaluate a model that was trained with them does not."""
    run_dir = train_alone(small, tmp_path / "run", "--max-steps", "1", "--local-steps", "3", "--node-sums", "bf16")
    opened = checkpoint.SavedModel.open(str(run_dir), "", solo())
    opened.files.close()
    assert (opened.config.training.local_steps, opened.config.training.node_sums) == (1, "fp32")
