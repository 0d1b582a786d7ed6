"""File systems that fail or hang for a while, and files that change: no model is lost, and no error waits."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lapse_elmo import checkpoint, train
from lapse_elmo.checkpoint import folder, saver
from lapse_elmo.errors import CorpusError, OutputError, UnreadableError
from lapse_elmo.mpi.world import solo
from lapse_elmo.ps.layout import Layout
from lapse_elmo.ps.trace import _Log
from tests import mpi
from tests.training.corpora import TINY, Prepared, checkpoints, train_alone


@pytest.mark.parametrize("function", [(os, "listdir"), (checkpoint.OpenFiles, "get"), (Path, "is_file")])
def test_what_cannot_be_read_now_is_not_taken_for_damage(
    small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: tuple[Any, str]
) -> None:
    """As on a file server that has lost a handle: an older checkpoint, or none, would replace the newest one."""
    run_dir = train_alone(small, tmp_path / "run", "--max-steps", "2", "--save-every-steps", "1")
    before, call = checkpoints(run_dir), getattr(*function)

    def stale(*arguments: Any, **rest: Any) -> Any:
        if any(word in f"{arguments[0]}/{arguments[-1]}" for word in (f"{run_dir}/checkpoints/", "dense.h5")):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return call(*arguments, **rest)

    monkeypatch.setattr(*function, stale)
    with pytest.raises(UnreadableError, match=r"cannot read .*: Stale file handle; try again"):
        train_alone(small, run_dir, "--max-steps", "3")
    monkeypatch.undo()
    assert len(before) == 2 and checkpoints(run_dir) == before


def test_a_checkpoint_whose_replacement_gets_no_name_keeps_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have the same step, as when a run ends with an evaluation that a signal had put off."""
    final = folder.path_of(tmp_path, 3)
    for path in (final, folder.partial_of(final)):
        path.mkdir(parents=True)
        (path / path.name).touch()

    def fail(*_: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output error"):
        folder.publish(folder.partial_of(final), final)
    assert folder.candidates(tmp_path) == [final] and os.listdir(final) == [final.name]


def test_the_vocabulary_that_a_run_keeps_is_that_of_its_shards(
    small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the file is replaced while the job starts; the model's own might be nowhere else by the time it is missed."""
    corpus = dataclasses.replace(small, vocab=Path(shutil.copy(small.vocab, tmp_path)))
    check = train.check_memory

    def replace(*arguments: Any) -> tuple[str, ...]:
        with open(corpus.vocab, "a", encoding="utf-8") as file:
            file.write("another\n")
        return check(*arguments)

    monkeypatch.setattr(train, "check_memory", replace)
    with pytest.raises(CorpusError, match="has changed since it was first read"):
        train_alone(corpus, tmp_path / "run", "--max-steps", "1")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_is_replaced_beside_a_removed_one_that_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NFS, a directory cannot be removed while another process has one of its files mapped."""
    final = folder.path_of(tmp_path, 3)
    for path in (final, folder.partial_of(final), in_use := final.with_name(f".{final.name}.removed")):
        path.mkdir(parents=True)
        (path / path.name).touch()
    rmtree = shutil.rmtree

    def remove(path: Path, **options: Any) -> None:
        if path != in_use:
            rmtree(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", remove)
        folder.publish(folder.partial_of(final), final)
    assert os.listdir(final) == [folder.partial_of(final).name]
    assert set(final.parent.iterdir()) == {final, in_use}
    folder.prune(tmp_path, {final})
    assert folder.candidates(tmp_path) == list(final.parent.iterdir()) == [final]


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_a_checkpoint_that_cannot_be_removed_is_not_left_for_the_next_resume(
    small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    """Else that resume would find it newer than those of the run that was to replace it."""
    run_dir = train_alone(small, tmp_path / "run", "--max-steps", "2", "--save-every-steps", "1")
    (checkpoints(run_dir)[-1] / "dense.h5").unlink()  # damaged, so that a resume begins at the first one

    def fail(*_: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    with monkeypatch.context() as patch, pytest.raises(OutputError, match=r"cannot remove .*step-00000002, which"):
        patch.setattr(folder, "_unused_name", fail)
        train_alone(small, run_dir, "--max-steps", "3", *options)
    train_alone(small, run_dir, "--max-steps", "3", *options)


@pytest.mark.parametrize("complete", [False, True])
def test_an_error_does_not_wait_for_a_file_that_is_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complete: bool
) -> None:
    """Else the other ranks, which leave in order, would end the job before rank 0 has reported the error."""
    final, go_on = folder.path_of(tmp_path, 3), threading.Event()
    folder.partial_of(final).mkdir(parents=True)

    def hang() -> None:
        go_on.wait(1.0)
        go_on.set()

    monkeypatch.setattr(saver, "_CANCEL_S", 0.1)
    with pytest.raises(ZeroDivisionError), checkpoint.Saver(tmp_path, solo()) as under_way:
        under_way._final = None if complete else final
        under_way._run(final, hang)
        raise ZeroDivisionError
    assert go_on.is_set() == complete == folder.partial_of(final).exists()
    go_on.set()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a file system of 64 KiB."""
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
    """A job ends with one line if its model does not fit on the disk (its config and vocabulary do)."""
    argv = ["bin/train", *small.options, *TINY, "--run-dir", str(tiny_disk / "run"), "--max-steps", "2"]
    job = mpi.mpirun(2, argv, timeout=60)
    ours = [line for line in job.stderr.splitlines() if line.startswith("bin/train: ")]
    assert job.returncode == 2, job.output
    assert len(ours) == 1 and "cannot write" in ours[0], job.output
    assert "Traceback" not in job.stderr and not job.survivors
    assert not checkpoints(tiny_disk / "run")


def test_the_rest_of_a_trace_that_a_full_disk_has_no_room_for_is_an_error_of_one_line() -> None:
    segment = Layout.of(("words", 3, 2, None, 0))["words"]
    log = _Log({"words": np.ones(3, bool)}, 0, 0, np.zeros(1, np.int64))
    log._file = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115 (close() is what is tested)
    log.add("pull", segment, np.arange(2), np.ones(2, bool))
    with pytest.raises(OutputError, match="cannot write a trace to /dev: No space left on device"):
        log.close()
