"""The README's example runs in a directory as the first ``make train`` leaves it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lapse_elmo import train
from lapse_elmo.mpi.world import solo
from lapse_elmo.trained import SentenceScore
from tests.command_lines import fenced
from tests.mpi import ROOT
from tests.training.corpora import TINY, prepare

SENTENCES = ["the words of a sentence", "and of another", "a word list", "time people the list", "words and people"] * 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory as `make train` leaves it, except that text and model are tiny."""
    folder = tmp_path_factory.mktemp("made")
    prepare(folder / "data", SENTENCES, SENTENCES)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main(arguments_of_make_train(folder, *TINY, "--max-steps", "2"), solo)
    return folder


def arguments_of_make_train(folder: Path, *options: str) -> list[str]:
    """Return what `make train` in ``folder`` passes to bin/train, with ``options`` instead of a limit of minutes."""
    make = ["make", "--dry-run", "--old-file=.venv/.installed", f"--file={ROOT / 'Makefile'}"]
    command = [*make, "train", f"TRAIN_OPTIONS={' '.join(options)}"]
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "RUN_DIR"))}
    done = subprocess.run(command, cwd=folder, env=plain, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.splitlines()[-1].partition(" bin/train ")[2].split()


def test_the_example_of_the_readme(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    blocks = fenced((ROOT / "README.md").read_text(encoding="utf-8"), "python")
    found: dict[str, Any] = {}
    exec(compile("".join(blocks), "README.md", "exec"), found)
    vectors = found["vectors"][0]
    assert vectors.shape[::2] == (3, 32) and vectors.dtype == np.float32 and vectors.any()
    (score,) = found["scores"]
    assert isinstance(score, SentenceScore) and not score.unknown.any()
    assert (score.forward < 0).all() and (score.backward < 0).all()
    neighbours, cosines = zip(*found["neighbours"], strict=True)
    assert "words" not in neighbours and set(neighbours) < set(" ".join(SENTENCES).split())
    assert sorted(cosines, reverse=True) == list(cosines) and -1 <= cosines[-1] < cosines[0] <= 1


def test_make_train_leaves_an_earlier_run_alone(made: Path, tmp_path: Path) -> None:
    assert arguments_of_make_train(made, "--epochs", "1") == ["--epochs", "1"]
    (tmp_path / "runs" / "first" / "checkpoints").mkdir(parents=True)  # of a run that ended before its first save
    assert arguments_of_make_train(tmp_path, "--epochs", "1")[:2] == ["--run-dir", "runs/first"]
