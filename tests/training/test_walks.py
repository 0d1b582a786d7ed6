"""The pictures of walks in docs/architecture.md show the modules that a traced object passes through, and no others."""

from __future__ import annotations

import json
import re
from pathlib import Path

import h5py
import pytest

from lapse_elmo import native
from lapse_elmo.checkpoint import Saver, restore
from lapse_elmo.corpus.node_sentences import keep_sentences
from lapse_elmo.cursor import Cursor
from lapse_elmo.model.lstm_steps import STEPS_SOURCE
from lapse_elmo.model.softmax import sampled_softmax_nll
from lapse_elmo.run_folder import find_resume_point
from lapse_elmo.step import TrainingStep
from tests import mpi, walks
from tests.training.corpora import Prepared, train_alone
from tests.walks import Trace

BY_PROCESSOR = {"model/prepacked", "model/lstm_steps"}  # some processors multiply some matrices by torch instead

pytestmark = pytest.mark.skipif(native.load(STEPS_SOURCE) is None, reason="there is no C compiler")


def picture(walk: int) -> set[str]:
    """Return the modules in the flowchart of a walk."""
    text = (mpi.ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", text.split(f"## Walk {walk}:")[1], flags=re.M)[0]
    (chart,) = re.findall(r"^```mermaid\nflowchart .*?^```", section, re.M | re.S)
    return set(re.findall(r'\["([\w/]+)"\]', chart))


def test_walk_of_a_sentence(small: Prepared, tmp_path: Path) -> None:
    roots = (keep_sentences, TrainingStep.announce, TrainingStep.__call__)
    with Trace(roots, threads=["reader"], end=sampled_softmax_nll) as trace:
        train_alone(small, tmp_path / "run", "--max-steps", "2", "--num-samples", "8", "--batch-size", "8")
    assert trace.modules | BY_PROCESSOR == picture(1)


def test_walk_of_a_row(tmp_path: Path) -> None:
    job = mpi.mpirun(2, [walks.__file__, tmp_path])
    assert job.returncode == 0, job.output
    modules = {module for rank in (0, 1) for module in json.loads((tmp_path / f"{rank}.json").read_text())}
    assert modules == picture(2)


def test_walk_of_a_checkpoint(small: Prepared, tmp_path: Path) -> None:
    """Saved and resumed within an epoch."""
    roots = (Saver.start, Saver.poll, Saver.finish, find_resume_point, restore, Cursor.__init__)
    with Trace(roots, threads=["checkpoint"], data=(Path, h5py.File, bytes, memoryview)) as trace:
        for steps in ("2", "3"):
            train_alone(small, tmp_path / "run", "--max-steps", steps, "--batch-size", "8")
    assert trace.modules == picture(3)
