"""Corpora and jobs that several tests look at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import mpi
from tests.training.corpora import Prepared, prepare, random_sentences

Drive = Callable[..., list[list[dict[str, Any]]]]


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Return a corpus of 40 words: 203 sentences, not divisible by 2, 3 or 4 ranks, and 41 held-out ones."""
    return prepare(
        tmp_path_factory.mktemp("small"), random_sentences(1, 203, 40, (1, 12)), random_sentences(2, 41, 40, (1, 12))
    )


@pytest.fixture(scope="session")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Drive:
    """Return ``drive(num_ranks, cases)``, which runs cases ``(program, argv)`` in one job and returns the reports."""

    def run(num_ranks: int, cases: list[tuple[str, list[str]]], timeout: float = 300) -> list[list[dict[str, Any]]]:
        folder = tmp_path_factory.mktemp("drive")
        listed = [{"program": program, "argv": argv} for program, argv in cases]
        (folder / "cases.json").write_text(json.dumps(listed))
        script = Path(__file__).with_name("driver.py")
        job = mpi.mpirun(num_ranks, [script, folder / "cases.json", folder / "results.json"], timeout=timeout)
        assert job.returncode == 0, job.output
        return json.loads((folder / "results.json").read_text())

    return run
