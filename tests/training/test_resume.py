"""A stopped and resumed run equals an uninterrupted one; with other ranks it still trains each sentence once."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from lapse_elmo import checkpoint, step
from lapse_elmo.batches import Batch
from lapse_elmo.checkpoint.manifest import encode
from lapse_elmo.corpus.shards import ShardSet
from lapse_elmo.cursor import Cursor
from lapse_elmo.errors import CheckpointError, OutputError
from lapse_elmo.mpi.signals import RESUMABLE
from lapse_elmo.mpi.world import solo
from lapse_elmo.run_folder import RunLock
from lapse_elmo.schedule import Rates
from tests import mpi
from tests.training.conftest import Drive
from tests.training.corpora import (
    TINY,
    Prepared,
    assert_same_run,
    checkpoints,
    evaluate_alone,
    prepare,
    random_sentences,
    records,
    saved_arrays,
    train_alone,
    train_job,
)

LIMIT_S = 90
OPTIONS = (
    "--sync", "--epochs", "2", "--batch-size", "8", "--report-every", "3", "--save-every-steps", "5",
    "--dense-average", "0.9", "--num-samples", "20",  # of 43 classes: a resumed run must draw the same ones
)


def wait_until(reached: Callable[[], bool], job: mpi.RunningJob) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not reached():
        assert job.running() and time.monotonic() < deadline, job.text()
        time.sleep(0.01)


def has_checkpoint(run_dir: Path, step: int) -> Callable[[], bool]:
    return lambda: bool(checkpoint.candidates(run_dir)) and int(checkpoint.candidates(run_dir)[0].name[5:]) >= step


@pytest.fixture(scope="module")
def undisturbed(small: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train 26 steps on two ranks without interruption."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    with train_job(2, small, run_dir, *OPTIONS) as job:
        assert job.wait(LIMIT_S).returncode == 0
    return run_dir


@pytest.mark.parametrize(
    ("number", "receiver"), [(signal.SIGTERM, "mpirun"), (signal.SIGINT, "mpirun"), (signal.SIGUSR1, "rank")]
)
def test_a_signal_saves_and_the_run_goes_on(
    small: Prepared, undisturbed: Path, tmp_path: Path, number: signal.Signals, receiver: str
) -> None:
    run_dir = tmp_path / "run"
    with train_job(2, small, run_dir, *OPTIONS) as job:
        wait_until(has_checkpoint(run_dir, 5), job)
        os.kill(job.pid if receiver == "mpirun" else job.rank_pids()[-1], number)
        ended = job.wait(30)
    assert ended.returncode == RESUMABLE, ended.output
    assert not ended.survivors
    manifest = checkpoint.read_manifest(checkpoints(run_dir)[-1])
    assert 5 <= manifest["step"] < 26 and len(checkpoints(run_dir)) <= 3
    with train_job(2, small, run_dir, *OPTIONS) as job:
        ended = job.wait(LIMIT_S)
    assert ended.returncode == 0, ended.output
    assert_same_run(undisturbed, run_dir)


def test_a_run_needs_its_shards_only_at_the_start(small: Prepared, undisturbed: Path, tmp_path: Path) -> None:
    shards, run_dir = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(small.shards, shards)
    with train_job(2, dataclasses.replace(small, shards=shards), run_dir, *OPTIONS) as job:
        wait_until(has_checkpoint(run_dir, 5), job)
        shutil.rmtree(shards)
        ended = job.wait(LIMIT_S)
    assert ended.returncode == 0, ended.output
    assert_same_run(undisturbed, run_dir)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_run_goes_on(small: Prepared, undisturbed: Path, tmp_path: Path, rank: int) -> None:
    run_dir = tmp_path / "run"
    with train_job(2, small, run_dir, *OPTIONS) as job:
        wait_until(has_checkpoint(run_dir, 10), job)
        os.kill(sorted(job.rank_pids())[rank], signal.SIGKILL)
        ended = job.wait(30)
    assert ended.returncode not in (0, 2, RESUMABLE) and not ended.survivors, ended.output
    with train_job(2, small, run_dir, *OPTIONS) as job:
        ended = job.wait(LIMIT_S)
    assert ended.returncode == 0, ended.output
    assert_same_run(undisturbed, run_dir)


def test_a_second_interrupt_stops_at_once(small: Prepared, tmp_path: Path) -> None:
    """A second interrupt ends the job at once; the first cannot, since a stopped rank never reaches the vote."""
    run_dir = tmp_path / "run"
    with train_job(2, small, run_dir, *OPTIONS) as job:
        wait_until(has_checkpoint(run_dir, 5), job)
        stopped, interrupted = job.rank_pids()
        os.kill(stopped, signal.SIGSTOP)
        os.kill(interrupted, signal.SIGINT)
        time.sleep(1)
        assert job.running()
        os.kill(interrupted, signal.SIGINT)
        ended = job.wait(10)
    assert ended.returncode not in (0, RESUMABLE), ended.output
    assert not ended.survivors


def test_a_complete_run_has_nothing_left_to_do(small: Prepared, undisturbed: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(undisturbed, tmp_path / "run", symlinks=True)
    before = [path.stat().st_mtime_ns for path in checkpoints(run_dir)]
    with train_job(2, small, run_dir, *OPTIONS) as job:
        assert job.wait(LIMIT_S).returncode == 0
    assert [path.stat().st_mtime_ns for path in checkpoints(run_dir)] == before
    assert_same_run(undisturbed, run_dir)


def test_averages_are_the_model_and_training_resumes_from_the_last_values(
    small: Prepared, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = shutil.copytree(undisturbed, tmp_path / "run", symlinks=True)
    saved = saved_arrays(checkpoints(run_dir)[-1])
    names = [name for name in saved if name.startswith("parameters/")]
    assert not any(np.array_equal(saved[name], saved[f"trained_{name}"]) for name in names)
    (result, logged) = evaluate_alone(run_dir, tmp_path / "result.json"), records(run_dir, "epoch")[-1]
    assert result["mean_perplexity"] == pytest.approx(logged["heldout/mean_perplexity"], rel=1e-6)
    train_alone(small, run_dir, "--epochs", "3", "--dense-average", "0", "--learning-rate", "1e-30")
    after = saved_arrays(checkpoints(run_dir)[-1])
    assert [name for name in after if name.startswith("trained_")] == []
    for name in names:  # at this rate weights stay
        np.testing.assert_array_equal(after[name], saved[f"trained_{name}"], err_msg=name)


def sentences_of(batches: Sequence[Batch]) -> list[int]:
    return [number for batch in batches for number in batch.sentences.tolist()]


class Recorded:
    """Records the sentences of every batch that is trained in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sentences: list[int] = []
        trained = Cursor.trained

        def note(cursor: Cursor, batches: Sequence[Batch]) -> bool:
            self.sentences += sentences_of(batches)
            return trained(cursor, batches)

        monkeypatch.setattr(Cursor, "trained", note)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_another_number_of_ranks_trains_what_is_left(
    small: Prepared, tmp_path: Path, num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    with train_job(num_ranks, small, run_dir, *OPTIONS, "--max-steps", "5") as job:
        assert job.wait(LIMIT_S).returncode == 0
    trained = records(run_dir, "epoch")[0]["train/epoch_tokens"]
    recorded = Recorded(monkeypatch)
    train_alone(small, run_dir, *OPTIONS, "--epochs", "1")
    with ShardSet.open(small.shards) as shards:
        lengths = np.diff(shards.read(np.arange(203))[1])
    assert len(set(recorded.sentences)) == len(recorded.sentences) == 203 - num_ranks * 5 * 8
    assert lengths[recorded.sentences].sum() == lengths.sum() - trained
    (_, epoch) = records(run_dir, "epoch")
    assert epoch["train/epoch_tokens"] == lengths.sum()
    assert epoch["step"] == 5 + -(-len(recorded.sentences) // 8)


def test_a_growing_run_that_a_signal_stopped_resumes_to_the_bit(
    small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A growing run with a schedule and parts resumes to the bit, with the same learning rates and batches."""
    options = (
        *OPTIONS, "--first-batch", "4", "--growth-tokens", "200", "--accumulate", "2", "--warmup-tokens", "300",
        "--schedule", "cosine",
    )
    whole = train_alone(small, tmp_path / "whole", *options)
    told = records(whole, "train")
    rates = [line["train/learning_rate"] for line in told]
    assert rates[0] < max(rates) > 10 * rates[-1], "warm-up, then nearly zero"
    assert told[0]["train/global_batch_sentences"] < told[-1]["train/global_batch_sentences"]
    once = step.TrainingStep.__call__

    def interrupted(
        self: step.TrainingStep, announced: Sequence[step.AnnouncedBatch], number: int, rates: Rates, last: bool
    ) -> step.StepResult:
        if number == 17:
            signal.raise_signal(signal.SIGUSR1)
        return once(self, announced, number, rates, last)

    monkeypatch.setattr(step.TrainingStep, "__call__", interrupted)
    run_dir = train_alone(small, tmp_path / "run", *options)
    monkeypatch.undo()
    train_alone(small, run_dir, *options)
    assert_same_run(whole, run_dir)


def test_damaged_checkpoints_are_skipped(
    small: Prepared, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = train_alone(small, tmp_path / "run", *OPTIONS, "--max-steps", "16")
    reference = shutil.copytree(run_dir, tmp_path / "reference", symlinks=True)
    older, newest = checkpoints(run_dir)[-2:]
    assert (older.name, newest.name) == ("step-00000015", "step-00000016")
    data = bytearray((newest / "dense.h5").read_bytes())
    data[len(data) // 2] ^= 1
    (newest / "dense.h5").write_bytes(data)
    capfd.readouterr()
    train_alone(small, run_dir, *OPTIONS, "--max-steps", "16", "--progress", "lines")
    said = capfd.readouterr().err
    assert "skipped step-00000016" in said and "dense.h5 is damaged" in said and "step-00000015" in said
    assert_same_run(reference, run_dir)


def test_nothing_whole_is_refused(small: Prepared, tmp_path: Path) -> None:
    run_dir = train_alone(small, tmp_path / "run", *OPTIONS, "--max-steps", "2")
    for path in checkpoints(run_dir):
        (path / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints .* is intact .*--overwrite"):
        train_alone(small, run_dir, *OPTIONS, "--max-steps", "4")
    train_alone(small, run_dir, *OPTIONS, "--max-steps", "4", "--overwrite")
    assert [path.name for path in checkpoints(run_dir)] == ["step-00000004"]


def test_another_model_is_refused(small: Prepared, tmp_path: Path) -> None:
    run_dir = train_alone(small, tmp_path / "run", "--max-steps", "1")
    other = prepare(tmp_path / "other", random_sentences(8, 60, 20, (3, 5)), random_sentences(9, 5, 20, (3, 5)))
    text = prepare(tmp_path / "text", small.train[1:], small.heldout)
    shutil.copy(small.vocab, text.vocab)
    refused = {
        r"--cell-size 32 \(now 64\)": ["--cell-size", "64"],
        r"--num-layers 2 \(now 1\), --optimizer adagrad \(now sgd\)": ["--num-layers", "1", "--optimizer", "sgd"],
        r"--no-boundaries|--boundaries True \(now False\)": ["--no-boundaries"],
        r"vocabulary of SHA-256 .*43 classes": other.options,
        r"other training shards \(set [0-9a-f]{16}": ["--shards", str(text.shards)],
    }
    for says, options in refused.items():
        with pytest.raises(CheckpointError, match=says):
            train_alone(small, run_dir, "--max-steps", "2", *options)
    assert len(records(run_dir, "epoch")) == 1


def test_other_options_are_told(small: Prepared, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = train_alone(small, tmp_path / "run", "--max-steps", "1")
    capfd.readouterr()
    train_alone(small, run_dir, "--max-steps", "2", "--learning-rate", "0.1", "--progress", "lines")
    assert "options changed since the checkpoint: --learning-rate 0.2 (now 0.1)\n" in capfd.readouterr().err
    falling = ("--schedule", "linear", "--learning-rate", "0.1", "--progress", "lines", "--max-steps")
    train_alone(small, run_dir, *falling, "3")
    capfd.readouterr()
    train_alone(small, run_dir, *falling, "4")
    assert "options changed since the checkpoint: --max-steps 3 (now 4)\n" in capfd.readouterr().err
    train_alone(small, run_dir, *falling, "5", "--decay-tokens", "9000")
    assert "options changed since the checkpoint: --decay-tokens 0 (now 9000)\n" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "how"),
    [("element", "row", "one accumulator per row, "), ("row", "element", "one accumulator per element, ")],
)
def test_other_accumulators_are_converted(
    small: Prepared, tmp_path: Path, capfd: pytest.CaptureFixture[str], old: str, new: str, how: str
) -> None:
    run_dir = train_alone(small, tmp_path / "run", "--max-steps", "1", "--row-accumulators", old)
    before = saved_arrays(checkpoints(run_dir)[0])["embedding"]
    capfd.readouterr()
    options = ["--row-accumulators", new, "--learning-rate", "1e-30", "--progress", "lines"]
    train_alone(small, run_dir, "--max-steps", "2", *options)
    assert f"the checkpoint's accumulators are converted: {how}" in capfd.readouterr().err
    after = saved_arrays(checkpoints(run_dir)[-1])["embedding"]
    size = min(before.shape[1], after.shape[1]) - 1
    assert {before.shape[1], after.shape[1]} == {size + 1, 2 * size}
    np.testing.assert_array_equal(after[:, :size], before[:, :size])  # at this rate weights stay
    assert (after[:, size:].mean(1) >= before[:, size:].mean(1) * (1 - 1e-6)).all()


def test_another_dense_optimizer_starts_anew(
    small: Prepared, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = train_alone(small, tmp_path / "run", "--max-steps", "1", "--dense-optimizer", "adagrad")
    before = saved_arrays(checkpoints(run_dir)[0])
    capfd.readouterr()
    train_alone(small, run_dir, "--max-steps", "2", "--learning-rate", "1e-30", "--progress", "lines")
    assert "the LSTM's optimizer is reset: it was adagrad, now it is adam" in capfd.readouterr().err
    after = saved_arrays(checkpoints(run_dir)[-1])
    for name in (name for name in before if name.startswith("parameters/")):  # at this rate weights stay
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    assert after["num_steps"] == 1 and not any(name.startswith("accumulators/") for name in after)


def test_a_checkpoint_from_before_accumulators_per_row(small: Prepared, tmp_path: Path) -> None:
    """A config without the option means accumulators per element, regardless of the current default."""
    run_dir = train_alone(small, tmp_path / "run", "--max-steps", "1", "--row-accumulators", "element")
    (path,) = checkpoints(run_dir)
    manifest = checkpoint.read_manifest(path)
    del manifest["config"]["optimizer"]["row_accumulators"]
    (path / "manifest.json").write_bytes(encode(manifest))
    assert checkpoint.config_of(checkpoint.read_manifest(path), path).optimizer.row_accumulators == "element"
    train_alone(small, run_dir, "--max-steps", "2", "--row-accumulators", "element")
    assert len(records(run_dir, "epoch")) == 2


def test_from_an_older_checkpoint(small: Prepared, tmp_path: Path) -> None:
    run_dir = train_alone(small, tmp_path / "run", *OPTIONS, "--max-steps", "11")
    reference = shutil.copytree(run_dir, tmp_path / "reference", symlinks=True)
    older = checkpoints(run_dir)[-2]
    assert older.name == "step-00000010"
    with pytest.raises(CheckpointError, match=r"has checkpoints after step-00000010.*--run-dir"):
        train_alone(small, run_dir, *OPTIONS, "--max-steps", "11", "--resume", str(older))
    fork = train_alone(small, tmp_path / "fork", *OPTIONS, "--max-steps", "11", "--resume", str(older))
    assert [path.name for path in checkpoints(fork)] == ["step-00000011"]
    train_alone(small, run_dir, *OPTIONS, "--max-steps", "11", "--resume", str(older), "--overwrite")
    assert_same_run(reference, run_dir)


def test_an_evaluation_that_a_signal_put_off(
    small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation that was due when a signal came, in the epoch's last step, is made by the resumed run."""
    whole = train_alone(small, tmp_path / "whole", *OPTIONS)
    once = step.TrainingStep.__call__

    def interrupted(
        self: step.TrainingStep, announced: Sequence[step.AnnouncedBatch], number: int, rates: Rates, last: bool
    ) -> step.StepResult:
        if number == 26:
            signal.raise_signal(signal.SIGUSR1)
        return once(self, announced, number, rates, last)

    monkeypatch.setattr(step.TrainingStep, "__call__", interrupted)
    run_dir = train_alone(small, tmp_path / "run", *OPTIONS)
    assert json.loads((checkpoints(run_dir)[-1] / "manifest.json").read_text())["state"]["evaluation_due"]
    assert not records(run_dir, "epoch")
    monkeypatch.undo()
    train_alone(small, run_dir, *OPTIONS)
    assert_same_run(whole, run_dir)


def test_one_job_at_a_time_trains_in_a_folder(small: Prepared, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with RunLock(run_dir, solo()), pytest.raises(OutputError, match="another job is training in"):
        train_alone(small, run_dir, "--max-steps", "1")
    assert not run_dir.exists()
    train_alone(small, run_dir, "--max-steps", "1")


def test_minutes_count_over_all_parts(small: Prepared, tmp_path: Path) -> None:
    options = ("--epochs", "1000", "--batch-size", "64", "--max-minutes", "0.02")
    run_dir = train_alone(small, tmp_path / "run", *options)
    steps = [line["step"] for line in records(run_dir)]
    train_alone(small, run_dir, *options)
    assert [line["step"] for line in records(run_dir)] == steps


def test_ranks_whose_clocks_differ_agree_that_the_minutes_are_over(
    small: Prepared, drive: Drive, tmp_path: Path
) -> None:
    argv = [*small.options, *TINY, "--batch-size", "8", "--run-dir", str(tmp_path / "run")]
    longer = [*argv, "--max-steps", "9", "--max-minutes", "1"]
    first, resumed = drive(2, [("train", [*argv, "--max-steps", "3"]), ("unequal clocks", longer)], timeout=60)
    assert [result["error"] for result in (*first, *resumed)] == [None] * 4
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000003"]
