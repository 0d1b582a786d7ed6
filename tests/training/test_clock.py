"""A clock that is set back or forward while a run trains, saves and resumes changes only the dates in its log."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import pytest

from lapse_elmo import checkpoint
from tests.training.corpora import Prepared, records, train_alone

DAY_S = 86_400
# Limits of minutes that a day exceeds, if the clock of the day had a say in them.
OPTIONS = (
    *("--sync", "--epochs", "1", "--batch-size", "8", "--save-every-steps", "7", "--report-every", "1"),
    *("--keep-checkpoints", "2", "--save-every-minutes", "600", "--max-minutes", "600"),
)


def test_a_clock_that_jumps(small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steady, jumping = tmp_path / "steady", tmp_path / "jumping"
    train_alone(small, steady, *OPTIONS)
    once, jumps = time.time, itertools.cycle([DAY_S, -DAY_S, 0, 400 * DAY_S, -20_000 * DAY_S])
    monkeypatch.setattr(time, "time", lambda: once() + next(jumps))
    train_alone(small, jumping, *OPTIONS, "--max-steps", "20")
    for age, path in enumerate(checkpoint.candidates(jumping)):  # the newest one gets the oldest date
        os.utime(path, (age * DAY_S, age * DAY_S))
    train_alone(small, jumping, *OPTIONS)
    assert [path.name for path in checkpoint.candidates(jumping)] == [
        path.name for path in checkpoint.candidates(steady)
    ]
    expected, got = (
        [(line["step"], line["train/loss_nats"]) for line in records(run, "train")] for run in (steady, jumping)
    )
    assert got == expected and len(got) > 20
    dates = [line["time_s"] for line in records(jumping, "train")]
    assert max(dates) - min(dates) > 20_000 * DAY_S, "the clock did not jump"
    assert all(line["train/tokens_per_s"] > 0 for line in records(jumping, "train"))
    assert all(0 < line["heldout/evaluation_s"] < DAY_S for line in records(jumping, "epoch"))
