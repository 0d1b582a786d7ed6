"""Checkpoints: they are complete or absent, a failed save leaves nothing behind, old ones are removed but the best."""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from lapse_elmo import checkpoint, train
from lapse_elmo.checkpoint import files, saver
from lapse_elmo.checkpoint.manifest import encode
from lapse_elmo.config.cli import as_tables
from lapse_elmo.config.training import Config, parse_train
from lapse_elmo.corpus.shards import ShardSet
from lapse_elmo.cursor import Cursor, Position, SavedCursor
from lapse_elmo.errors import CheckpointError, OutputError
from lapse_elmo.mpi.world import solo
from lapse_elmo.parameters import Parameters
from lapse_elmo.perplexity import Perplexity
from tests.training.corpora import TINY, Prepared, checkpoints, records, save_once, train_alone

ENTRIES: dict[str, Any] = {
    "vocabulary_sha256": "v", "num_classes": 43, "corpus": {"training": "t", "held-out": "h"},
    "results": {"score": 3.5}, "state": {},
}


@pytest.fixture(scope="module")
def config(small: Prepared) -> Config:
    return parse_train([*small.options, *TINY])


@pytest.fixture(scope="module")
def parameters(config: Config) -> Iterator[Parameters]:
    made = Parameters(config, 43, solo(), torch.device("cpu"))
    made.initialise()
    yield made
    made.server.close()


@pytest.fixture
def cursor(config: Config, small: Prepared) -> Iterator[Cursor]:
    """Return a cursor in the second epoch, of seven steps."""
    with ShardSet.open(small.shards) as shards:
        yield cursor_at(config, shards, 9)


def cursor_at(config: Config, shards: ShardSet, step: int) -> Cursor:
    cursor = Cursor(config, solo(), shards)
    for batch, _ in zip(cursor.batches(), range(step), strict=False):
        cursor.trained(batch)
    return cursor


def save(folder: Path, parameters: Parameters, cursor: Cursor) -> Path:
    entries = {**ENTRIES, "config": as_tables(parameters.config)}
    return save_once(folder, parameters, cursor, entries, solo())


def test_the_manifest_tells_everything(
    config: Config, parameters: Parameters, cursor: Cursor, tmp_path: Path
) -> None:
    folder = save(tmp_path, parameters, cursor)
    assert folder == tmp_path / "checkpoints" / "step-00000009"
    manifest = json.loads((folder / "manifest.json").read_text())
    files = manifest.pop("files")
    tables = {"table-embedding-00000-of-00001.h5", "table-softmax-00000-of-00001.h5"}
    assert files.keys() == tables | {"dense.h5", "sentences.h5"}
    assert {path.name for path in folder.iterdir()} == {*files, "manifest.json"}
    for name, entry in files.items():
        data = (folder / name).read_bytes()
        assert entry["bytes"] == len(data) == sum(size for size, _ in entry["pieces"])
        for size, sha256 in entry["pieces"]:
            assert hashlib.sha256(data[:size]).hexdigest() == sha256
            data = data[size:]
    assert manifest.pop("versions")["torch"] == torch.__version__
    assert len(manifest.pop("sha256")) == 64
    assert manifest == {
        **ENTRIES, "format": "lapse-elmo checkpoint", "version": 3, "step": 9, "epoch": 1, "step_in_epoch": 2,
        "world_size": 1, "num_nodes": 1, "config": as_tables(config), "best": None,
    }
    read = checkpoint.read_manifest(folder)
    checkpoint.check_files(folder, read)
    assert checkpoint.config_of(read, folder) == config
    saved = checkpoint.read_cursor(folder, read, 203, solo())
    assert saved.position == Position(9, 1, 2)
    assert saved.own is not None and saved.own_left is not None and saved.rest is not None
    np.testing.assert_array_equal(saved.own.numbers, np.arange(203))
    np.testing.assert_array_equal(saved.own_left, saved.rest.numbers)
    assert saved.rest.num_all == saved.own_left.size == 203 - 64
    with pytest.raises(CheckpointError, match=r"a larger corpus than these shards \(150 sentences\)"):
        checkpoint.read_cursor(folder, read, 150, solo())


def test_between_epochs_no_sentences_are_saved(
    config: Config, parameters: Parameters, small: Prepared, tmp_path: Path
) -> None:
    with ShardSet.open(small.shards) as shards:
        folder = save(tmp_path, parameters, cursor_at(config, shards, 7))
    assert not (folder / "sentences.h5").exists()
    saved = checkpoint.read_cursor(folder, checkpoint.read_manifest(folder), 203, solo())
    assert saved == SavedCursor(Position(7, 1, 0))


@pytest.mark.parametrize(
    "step", [(files, "_pwrite_all"), (files, "_create_contiguous"), (saver, "encode"), (saver, "publish")]
)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unable to flush file")])
def test_a_save_that_fails_leaves_the_older_one_alone(
    config: Config, parameters: Parameters, cursor: Cursor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    step: tuple[Any, str], error: Exception,
) -> None:
    older = save(tmp_path, parameters, cursor)
    cursor.step += 1

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(*step, fail)
    with pytest.raises(OutputError, match=r"step-00000010: (No space left|unable to flush).*--run-dir"):
        save(tmp_path, parameters, cursor)
    assert checkpoints(tmp_path) == [older]
    monkeypatch.undo()
    checkpoint.check_files(older, checkpoint.read_manifest(older))


def test_a_save_that_was_cut_off_does_not_count(
    parameters: Parameters, cursor: Cursor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed save leaves only a hidden directory, which nothing reads and which the next save removes."""
    monkeypatch.setattr(saver, "publish", lambda *_: None)
    monkeypatch.setattr(saver, "prune", lambda *_: None)
    save(tmp_path, parameters, cursor)
    monkeypatch.undo()
    assert [path.name for path in checkpoints(tmp_path)] == [".step-00000009.partial"]
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoint.find(tmp_path)
    assert not checkpoint.candidates(tmp_path)
    cursor.step += 1
    whole = save(tmp_path, parameters, cursor)
    assert checkpoint.find(tmp_path) == whole
    assert checkpoints(tmp_path) == [whole]


def test_an_error_stops_a_save_under_way(
    parameters: Parameters, cursor: Cursor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        reached.set()
        go_on.wait(20)

    monkeypatch.setattr(files, "_pwrite_all", wait)
    with pytest.raises(ZeroDivisionError), checkpoint.Saver(tmp_path, solo()) as under_way:
        under_way.start(parameters, cursor, {**ENTRIES, "config": {}}, None)
        assert reached.wait(20) and checkpoints(tmp_path)
        go_on.set()
        raise ZeroDivisionError
    assert not checkpoints(tmp_path)
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


def test_what_was_saved_is_of_the_moment_of_the_start(
    parameters: Parameters, cursor: Cursor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint has the state at the start of its save, although training continues while it is written."""
    before = parameters.embedding.read(0, 43).numpy().copy()
    go_on, write = threading.Event(), files._pwrite_all
    monkeypatch.setattr(files, "_pwrite_all", lambda *rest: (go_on.wait(20), write(*rest)))
    background = checkpoint.Saver(tmp_path, solo())
    path = background.start(parameters, cursor, {**ENTRIES, "config": as_tables(parameters.config)}, None)
    keys = parameters.embedding.segment.keys(np.arange(43))
    parameters.server.push(keys, np.ones((43, parameters.embedding.size), np.float32))
    assert not np.array_equal(parameters.embedding.read(0, 43).numpy(), before)
    assert not background.written and not background.failed
    go_on.set()
    background.finish()
    checkpoint.restore(checkpoint.OpenFiles(path), checkpoint.read_manifest(path), parameters, solo())
    np.testing.assert_array_equal(parameters.embedding.read(0, 43).numpy(), before)


def test_a_checkpoint_is_there_while_the_one_it_replaces_is_removed(
    parameters: Parameters, cursor: Cursor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill during the removal, which may take long, must not leave the run without both."""
    path, found, remove = save(tmp_path, parameters, cursor), [], shutil.rmtree

    def watched(folder: Path, **rest: Any) -> None:
        if (folder / "manifest.json").exists():
            found.append(checkpoint.candidates(tmp_path))
        remove(folder, **rest)

    monkeypatch.setattr(shutil, "rmtree", watched)
    assert save(tmp_path, parameters, cursor) == path
    assert found == [[path]] and checkpoints(tmp_path) == [path]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_no_copy_of_the_rows_is_kept(
    config: Config, cursor: Cursor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tables of 40 MB: both are copied at the start of a save, and none is held after its end."""
    big = Parameters(config, 300_000, solo(), torch.device("cpu"))
    big.initialise()
    go_on, write = threading.Event(), files._pwrite_all
    monkeypatch.setattr(files, "_pwrite_all", lambda *rest: (go_on.wait(20), write(*rest)))
    background = checkpoint.Saver(tmp_path, solo())
    before = resident_bytes()
    path = background.start(big, cursor, {**ENTRIES, "config": as_tables(config)}, None)
    during = resident_bytes()
    go_on.set()
    background.finish()
    after = resident_bytes()
    big.server.close()
    copied = sum(file.stat().st_size for file in path.glob("table-*.h5"))
    assert copied > 80e6 and during - before > 0.9 * copied
    assert after - before < 0.1 * copied


def flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink, "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"), "first byte": lambda path: flip(path, 0),
    "a byte in the middle": lambda path: flip(path, 0.6), "last byte": lambda path: flip(path, 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("pattern", ["table-embedding-*", "table-softmax-*", "dense.h5", "sentences.h5"])
def test_damage_is_told_in_one_line(
    parameters: Parameters, cursor: Cursor, tmp_path: Path, pattern: str, damage: str
) -> None:
    path = save(tmp_path, parameters, cursor)
    with checkpoint.OpenFiles(path) as files:
        checkpoint.verified(files, solo())
    (file,) = path.glob(pattern)
    DAMAGES[damage](file)
    with (
        pytest.raises(CheckpointError, match="use another checkpoint") as caught,
        checkpoint.OpenFiles(path) as files,
    ):
        checkpoint.verified(files, solo())
    assert str(file) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def rewrite(file: Path, change: Callable[[h5py.File], object]) -> None:
    """Change a file, and its checksums in the manifest."""
    with h5py.File(file, "r+") as opened:
        change(opened)
    data, manifest = file.read_bytes(), json.loads((file.parent / "manifest.json").read_bytes())
    del manifest["sha256"]
    manifest["files"][file.name] = {"bytes": len(data), "pieces": [[len(data), hashlib.sha256(data).hexdigest()]]}
    (file.parent / "manifest.json").write_bytes(encode(manifest))


def fewer_rows(file: h5py.File) -> None:
    for name in ("rows", "values"):
        values = file[name][:-1]
        del file[name]
        file[name] = values


LIES: dict[str, tuple[str, Callable[[h5py.File], object], str]] = {
    "fewer rows": ("table-softmax-*", fewer_rows, "42 rows of the table softmax, expected 43"),
    "another row": ("table-softmax-*", lambda file: file["rows"].write_direct(np.arange(9, 52)), "outside 0 to 42"),
    "no values": ("table-embedding-*", lambda file: file.pop("values"), "cannot read"),
    "no weights": ("dense.h5", lambda file: file.pop("parameters"), "cannot read"),
    "no sentences": ("sentences.h5", lambda file: file.pop("left"), "cannot read"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_file_that_lies(parameters: Parameters, cursor: Cursor, tmp_path: Path, name: str) -> None:
    """A file with right checksums but wrong content is refused."""
    pattern, change, says = LIES[name]
    path = save(tmp_path, parameters, cursor)
    (file,) = path.glob(pattern)
    rewrite(file, change)
    files = checkpoint.OpenFiles(path)
    manifest = checkpoint.verified(files, solo())
    with files, pytest.raises(CheckpointError, match=says) as caught:
        checkpoint.read_cursor(path, manifest, 203, solo())
        checkpoint.restore(files, manifest, parameters, solo())
    assert len(str(caught.value).splitlines()) == 1


def test_a_manifest_vouches_for_itself(parameters: Parameters, cursor: Cursor, tmp_path: Path) -> None:
    path = save(tmp_path, parameters, cursor)
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"step": 9,', '"step": 8,'))
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.read_manifest(path)
    (path / "manifest.json").write_bytes(encode(json.loads(text) | {"version": 4}))
    with pytest.raises(CheckpointError, match="version 4"):
        checkpoint.read_manifest(path)


def test_a_file_size_limit_is_reported(parameters: Parameters, cursor: Cursor, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OutputError, match="cannot write checkpoint"):
            save(tmp_path, parameters, cursor)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not checkpoints(tmp_path)


def test_the_newest_two_and_the_best_are_kept(
    small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two newest checkpoints and the best are kept: of five epochs, the second has the best perplexity."""
    measured = iter([Perplexity(nll, nll, 100) for nll in (300.0, 200.0, 260.0, 250.0, 255.0)])
    monkeypatch.setattr(train, "measure_perplexity", lambda *_: next(measured))
    run_dir = train_alone(small, tmp_path / "run", "--epochs", "5", "--batch-size", "102")
    assert [line["step"] for line in records(run_dir, "epoch")] == [2, 4, 6, 8, 10]
    names = [path.name for path in checkpoints(run_dir)]
    assert names == ["step-00000004", "step-00000008", "step-00000010"]
    results = [checkpoint.read_manifest(path)["results"]["heldout_perplexity"] for path in checkpoints(run_dir)]
    assert results == pytest.approx([math.exp(2.0), math.exp(2.5), math.exp(2.55)])
    assert (run_dir / "best").resolve() == checkpoints(run_dir)[0]


@pytest.mark.parametrize(("report_every", "reported"), [("3", [3, 6, 8]), ("4", [4, 8])])
def test_patience(
    small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    report_every: str, reported: list[int],
) -> None:
    """The second epoch is the best; two epochs that are no better end the run, and more patience resumes it."""
    measured = iter([Perplexity(nll, nll, 100) for nll in (300.0, 200.0, 260.0, 200.0, 190.0)])
    monkeypatch.setattr(train, "measure_perplexity", lambda *_: next(measured))
    options = ("--epochs", "5", "--batch-size", "102", "--report-every", report_every)
    run_dir = train_alone(small, tmp_path / "run", *options, "--patience", "2")
    assert [line["step"] for line in records(run_dir, "epoch")] == [2, 4, 6, 8]
    assert [line["step"] for line in records(run_dir, "train")] == reported, "the last steps are reported, once"
    capfd.readouterr()
    train_alone(small, run_dir, *options, "--patience", "2", "--epochs", "9")
    assert len(records(run_dir, "epoch")) == 4
    assert "--patience 2 ended the run: the last 2 evaluations brought no better" in capfd.readouterr().err
    train_alone(small, run_dir, *options, "--patience", "3")
    assert [line["step"] for line in records(run_dir, "epoch")] == [2, 4, 6, 8, 10]
    assert (run_dir / "best").resolve().name == "step-00000010"


def test_evaluation_within_an_epoch(small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs of five steps; the evaluation after the fourth is the best, three that are no better end the run."""
    measured = iter([Perplexity(nll, nll, 100) for nll in (300.0, 200.0, 260.0, 250.0, 255.0)])
    monkeypatch.setattr(train, "measure_perplexity", lambda *_: next(measured))
    options = ("--epochs", "2", "--batch-size", "41", "--evaluate-every", "2", "--patience", "3")
    run_dir = train_alone(small, tmp_path / "run", *options)
    evaluated = records(run_dir, "epoch")
    assert [(line["step"], line["epoch"]) for line in evaluated] == [(2, 1), (4, 1), (5, 1), (6, 2), (8, 2)]
    tokens = [line["train/epoch_tokens"] for line in evaluated]
    assert tokens[0] < tokens[1] < tokens[2] and tokens[3] < tokens[4] < tokens[2]
    assert (run_dir / "best").resolve().name == "step-00000004"


def test_the_summary_names_the_model_to_which_best_links(
    small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run that resumes in another directory does not have the checkpoint of its best evaluation there."""
    measured = iter([Perplexity(nll, nll, 100) for nll in (200.0, 300.0, 250.0)])
    monkeypatch.setattr(train, "measure_perplexity", lambda *_: next(measured))
    run_dir = train_alone(small, tmp_path / "run", "--batch-size", "102")
    capfd.readouterr()
    options = ("--batch-size", "102", "--resume", str(run_dir))
    fork = train_alone(small, tmp_path / "fork", *options, "--epochs", "3")
    assert f"The best model, of step 6, is {fork}/best: perplexity {math.exp(2.5):.1f}." in capfd.readouterr().out
    assert (fork / "best").resolve().name == "step-00000006"
    train_alone(small, tmp_path / "complete", *options)
    assert "best" not in capfd.readouterr().out
