"""A start that repeats the command of an earlier one, as that of a requeued job: nothing that is saved is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lapse_elmo import run_folder, train
from lapse_elmo.config.training import RunConfig, parse_train
from lapse_elmo.errors import OutputError
from lapse_elmo.metrics.run_log import RunLog
from lapse_elmo.mpi.world import solo
from lapse_elmo.run_folder import JOB, JOB_VARIABLE, RunLock
from lapse_elmo.summary import stop_message
from tests.training.corpora import Prepared, checkpoints, records, train_alone

OPTIONS = ("--batch-size", "8", "--report-every", "3")


def reported(run_dir: Path) -> list[int]:
    return [record["step"] for record in records(run_dir, "train")]


def until(small: Prepared, run_dir: Path, step: int, *options: str) -> list[int]:
    """Train until a step, and return the steps of the reports; the last one shows where a start has ended."""
    train_alone(small, run_dir, *OPTIONS, "--max-steps", str(step), *options)
    return reported(run_dir)


def test_a_requeued_job_does_not_overwrite_what_it_has_saved(
    small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert until(small, run_dir, 2) == [2]
    monkeypatch.setenv(JOB_VARIABLE, "slurm-7")
    assert until(small, run_dir, 4, "--overwrite") == [3, 4], "its first start replaces the run"
    capfd.readouterr()
    assert until(small, run_dir, 7, "--overwrite", "--progress", "lines") == [3, 4, 6, 7]
    assert "this job has begun the run already" in capfd.readouterr().err
    monkeypatch.setenv(JOB_VARIABLE, "slurm-8")
    assert until(small, run_dir, 2, "--overwrite") == [2], "another job is another command"
    monkeypatch.delenv(JOB_VARIABLE)
    assert until(small, run_dir, 1, "--overwrite") == [1]
    assert not (run_dir / JOB).exists()


@pytest.mark.parametrize("resume", ["older checkpoint", "never"])
def test_a_requeued_job_resumes_where_it_has_saved(
    small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: str
) -> None:
    original = train_alone(small, tmp_path / "original", *OPTIONS, "--max-steps", "2")
    options = ["--resume", str(checkpoints(original)[-1]) if resume != "never" else "never"]
    run_dir = tmp_path / "run"
    monkeypatch.setenv(JOB_VARIABLE, "slurm-7")
    first = until(small, run_dir, 4, *options)
    assert until(small, run_dir, 7, *options) == [*first, 6, 7]
    for path in checkpoints(run_dir):  # as if it had been killed before its first save
        path.rename(tmp_path / path.name)
    assert until(small, run_dir, 4, *options) == first
    monkeypatch.setenv(JOB_VARIABLE, "slurm-8")
    with pytest.raises(OutputError, match="holds a run already"):
        until(small, run_dir, 7, *options)


def test_the_config_of_a_run_does_not_overwrite_it(small: Prepared, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    until(small, run_dir, 4, "--overwrite")
    config = str(run_dir / "config.toml")
    assert parse_train(["--config", config]).run.run_dir == str(run_dir)
    train_alone(small, run_dir, "--config", config, "--max-steps", "7")
    assert reported(run_dir) == [3, 4, 6, 7]


def test_the_message_of_a_stopped_run_names_what_must_not_be_repeated() -> None:
    said = {
        options: stop_message("SIGTERM", 5, RunConfig(run_dir="runs/a", **dict(options)))  # type: ignore[arg-type]
        for options in ((), (("overwrite", True),), (("overwrite", True), ("resume", "old")))
    }
    assert [text.partition("the same command ")[2] for text in said.values()] == [
        "with --run-dir runs/a resumes from it",
        "with --run-dir runs/a and without --overwrite resumes from it",
        "with --run-dir runs/a and without --overwrite and --resume old resumes from it",
    ]
    quoted = stop_message("SIGTERM", 5, RunConfig(run_dir="runs/a", resume="runs/a b"))
    assert "without --resume 'runs/a b' resumes" in quoted
    assert "--run-dir 'runs/a b' resumes" in stop_message("SIGTERM", 5, RunConfig(run_dir="runs/a b"))


def test_what_is_left_of_the_minutes(small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit counts the minutes of all starts, so the ETA of a resumed run must not begin with all of them."""
    left = []

    class Noting(RunLog):
        def __init__(self, *arguments: Any) -> None:
            left.append(arguments[4])
            super().__init__(*arguments)

    monkeypatch.setattr(train, "RunLog", Noting)
    for step in (2, 3):
        until(small, tmp_path / "run", step, "--max-minutes", "60")
    assert left[0] == 3600 and left[1] < 3600


def test_files_that_are_not_of_a_run_are_not_replaced(small: Prepared, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    own = run_dir / "config.toml"
    own.write_text("# written by hand\n[training]\nmax_steps = 2\n")
    before = own.read_text()
    with pytest.raises(OutputError, match=r"would replace .*config.toml, which is not of a run"):
        train_alone(small, run_dir, "--config", str(own))
    assert own.read_text() == before and [path.name for path in run_dir.iterdir()] == ["config.toml"]
    own.rename(tmp_path / "config.toml")
    vocab = run_dir / "vocab.txt"
    vocab.write_bytes(small.vocab.read_bytes())  # the run's own copy would be the same
    train_alone(small, run_dir, "--config", str(tmp_path / "config.toml"), "--vocab", str(vocab))
    assert reported(run_dir) == [2]


def test_initial_values_that_come_too_late_are_told(
    small: Prepared, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = train_alone(small, tmp_path / "run", "--max-steps", "1")
    other = train_alone(small, tmp_path / "other", "--max-steps", "1")
    capfd.readouterr()
    train_alone(small, run_dir, "--max-steps", "2", "--init-from", str(other), "--progress", "lines")
    assert f"options changed since the checkpoint: --init-from '' (now {other})\n" in capfd.readouterr().err


def test_one_job_at_a_time_trains_in_a_directory_of_a_file_server(
    small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS and Lustre lock a directory on one machine alone. A job may have left its own lock on one that failed."""
    lock = run_folder.lock_at_once
    monkeypatch.setattr(run_folder, "lock_at_once", lambda file: None if isinstance(file, int) else lock(file))
    run_dir = tmp_path / "run"
    monkeypatch.setenv(JOB_VARIABLE, "slurm-7")
    with RunLock(run_dir, solo()), pytest.raises(OutputError, match="another job is training in"):
        until(small, run_dir, 1)
    assert not run_dir.exists()
    assert until(small, run_dir, 1) == [1]
    with RunLock(run_dir, solo()):
        assert until(small, run_dir, 2) == [1, 2]
        monkeypatch.setenv(JOB_VARIABLE, "slurm-8")
        with pytest.raises(OutputError, match="another job is training in"):
            until(small, run_dir, 3)
    assert until(small, run_dir, 3) == [1, 2, 3]
