"""Saved models: a folder of its name is whole, a save that fails leaves nothing, old ones go but the best."""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lapse_elmo import checkpoint, train
from lapse_elmo.checkpoint import Progress
from lapse_elmo.config.cli import as_tables
from lapse_elmo.config.training import Config, parse_train
from lapse_elmo.corpus.vocabulary import Vocabulary
from lapse_elmo.errors import CheckpointError, OutputError
from lapse_elmo.evaluate import Perplexity
from lapse_elmo.parameters import Parameters
from lapse_elmo.world import solo
from tests import mpi
from tests.training.corpora import TINY, Prepared, checkpoints, records, train_alone


@pytest.fixture(scope="module")
def config(small: Prepared) -> Config:
    return parse_train([*small.options, *TINY])


@pytest.fixture(scope="module")
def vocabulary(small: Prepared) -> Vocabulary:
    return Vocabulary.load(small.vocab)


@pytest.fixture(scope="module")
def parameters(config: Config, vocabulary: Vocabulary) -> Iterator[Parameters]:
    made = Parameters(config, vocabulary.size, solo(), torch.device("cpu"))
    made.initialise()
    yield made
    made.server.close()


def save(folder: Path, parameters: Parameters, vocabulary: Vocabulary, step: int = 12) -> Path:
    return checkpoint.save(folder, parameters, vocabulary, Progress(step, 1, 2), {"score": 3.5}, solo())


def test_the_manifest_tells_everything(
    config: Config, parameters: Parameters, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    folder = save(tmp_path, parameters, vocabulary)
    assert folder == tmp_path / "checkpoints" / "step-00000012"
    manifest = json.loads((folder / "manifest.json").read_text())
    files = manifest.pop("files")
    assert files.keys() == {"dense.h5", "rows-00000-of-00001.h5"}
    for name, entry in files.items():
        data = (folder / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    versions = manifest.pop("versions")
    assert versions["torch"] == torch.__version__
    assert manifest == {
        "format": "lapse-elmo checkpoint", "version": 1, "step": 12, "epoch": 1, "step_in_epoch": 2, "world_size": 1,
        "vocabulary_sha256": vocabulary.sha256, "num_classes": 43, "config": as_tables(config),
        "results": {"score": 3.5},
    }
    assert checkpoint.config_of(checkpoint.read_manifest(folder), folder) == config


@pytest.mark.parametrize("step", ["_write_rows", "_write_dense", "_write_flushed", "_entry"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unable to flush file")])
def test_a_save_that_fails_leaves_the_older_one_alone(
    parameters: Parameters, vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str,
    error: Exception,
) -> None:
    older = save(tmp_path, parameters, vocabulary, step=3)

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoint, step, fail)
    with pytest.raises(OutputError, match=r"step-00000012: (No space left|unable to flush).*--run-dir"):
        save(tmp_path, parameters, vocabulary)
    assert checkpoints(tmp_path) == [older]
    monkeypatch.undo()
    assert checkpoint.read_manifest(older)["step"] == 3


def test_an_interrupted_save_does_not_count(
    parameters: Parameters, vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle: what lies there has no name that anything reads, and the next save clears it away."""

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_write_flushed", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, parameters, vocabulary)
    monkeypatch.undo()
    assert not list((tmp_path / "checkpoints").glob("step-*"))
    with pytest.raises(CheckpointError, match="holds no saved model"):
        checkpoint.find(tmp_path)
    whole = save(tmp_path, parameters, vocabulary)
    assert checkpoint.find(tmp_path) == whole
    assert checkpoints(tmp_path) == [whole]


def test_a_file_size_limit_is_reported(parameters: Parameters, vocabulary: Vocabulary, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OutputError, match="cannot write checkpoint"):
            save(tmp_path, parameters, vocabulary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not checkpoints(tmp_path)


def test_the_newest_and_the_best_are_kept(
    small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four epochs of two steps, of which the second measures best."""
    measured = iter([Perplexity(nll, nll, 100) for nll in (300.0, 200.0, 260.0, 250.0)])
    monkeypatch.setattr(train, "evaluate", lambda *_: next(measured))
    run_dir = train_alone(small, tmp_path / "run", "--epochs", "4", "--batch-size", "102")
    assert [line["step"] for line in records(run_dir, "epoch")] == [2, 4, 6, 8]
    assert [path.name for path in checkpoints(run_dir)] == ["step-00000004", "step-00000008"]
    results = [checkpoint.read_manifest(path)["results"]["heldout_perplexity"] for path in checkpoints(run_dir)]
    assert results == pytest.approx([math.exp(2.0), math.exp(2.5)])


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = os.geteuid() == 0 and not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True
    ).returncode
    if not mounted:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_ends_the_job(small: Prepared, tiny_disk: Path) -> None:
    """config, vocabulary and metrics fit, the model does not."""
    argv = ["bin/train", *small.options, *TINY, "--run-dir", str(tiny_disk / "run"), "--max-steps", "2"]
    job = mpi.mpirun(2, argv, timeout=60)
    ours = [line for line in job.stderr.splitlines() if line.startswith("bin/train: ")]
    assert job.returncode == 2, job.output
    assert len(ours) == 1 and "cannot write" in ours[0], job.output
    assert "Traceback" not in job.stderr and not job.survivors
    assert not checkpoints(tiny_disk / "run")
