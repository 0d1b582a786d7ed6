"""A run that diverges ends with one line and without a table; good checkpoints are kept, and it can be resumed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lapse_elmo.divergence import Watch
from lapse_elmo.errors import TrainingError
from tests.training.corpora import Prepared, checkpoints, records, train_alone, train_job


def test_a_diverging_job_says_so_in_one_line(small: Prepared, tmp_path: Path) -> None:
    """A job that diverges prints one line, although all ranks raise the error, and its status is not 0."""
    with train_job(2, small, tmp_path / "run", "--learning-rate", "3", "--epochs", "6", "--batch-size", "4") as job:
        ended = job.wait(90)
    assert ended.returncode == 2, ended.output
    lines = [line for line in ended.output.splitlines() if "diverges" in line]
    assert len(lines) == 1, ended.output
    assert re.search(
        r"training diverges at step \d+: .*(unigram's|word frequencies).*; no evaluated checkpoint is saved yet; lower "
        r"--learning-rate \(now 3\)", lines[0],
    )
    assert "unigram  " not in ended.output and not checkpoints(tmp_path / "run")


def test_training_losses_end_a_run_before_its_first_evaluation(small: Prepared, tmp_path: Path) -> None:
    """An epoch may take days, so the losses of some steps must do; here it has 102 steps."""
    options = ("--learning-rate", "30", "--epochs", "1", "--batch-size", "2", "--report-every", "1")
    with pytest.raises(TrainingError, match=r"diverges at step \d+: the training loss of the last 30 steps was above"):
        train_alone(small, tmp_path / "run", *options)
    assert not records(tmp_path / "run", "epoch") and 29 <= len(records(tmp_path / "run", "train")) < 101


def test_the_best_checkpoint_is_kept(small: Prepared, tmp_path: Path) -> None:
    """Checkpoints of a diverging model do not replace the best one, from which a run can be resumed."""
    run_dir = train_alone(small, tmp_path / "run", "--epochs", "1", "--batch-size", "4")
    (good,) = checkpoints(run_dir)
    options = ("--epochs", "20", "--batch-size", "4", "--save-every-steps", "1")
    with pytest.raises(TrainingError, match=f"the best checkpoint is .*{good.name} ") as caught:
        train_alone(small, run_dir, *options, "--learning-rate", "30")
    assert caught.value.everywhere and "(now 30)" in str(caught.value)
    assert good in checkpoints(run_dir) and len(checkpoints(run_dir)) <= 3
    train_alone(small, run_dir, "--epochs", "2", "--batch-size", "4", "--resume", str(good), "--overwrite")
    assert records(run_dir, "epoch")[-1]["heldout/mean_perplexity"] < 43


def test_a_save_waits_for_a_good_step(small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is due at a step that looks bad is saved after the next good one, and kept if it was to be kept."""
    monkeypatch.setattr(Watch, "suspicious", property(lambda self: self.steps <= 3 or self.steps == 6))
    options = ("--max-steps", "12", "--save-every-steps", "6", "--save-at-tokens", "1", "--keep-checkpoints", "2")
    run_dir = train_alone(small, tmp_path / "run", "--batch-size", "4", *options)
    assert [path.name for path in checkpoints(run_dir)] == ["step-00000004", "step-00000007", "step-00000012"]
    resumed = train_alone(small, tmp_path / "resumed", "--batch-size", "4", *options, "--max-steps", "3")
    train_alone(small, resumed, "--batch-size", "4", *options)
    assert [path.name for path in checkpoints(resumed)] == ["step-00000004", "step-00000007", "step-00000012"]
