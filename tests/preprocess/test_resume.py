"""``shards`` after a kill: what was complete is used again, nothing else is, and the bytes are those of a fresh run."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lapse_elmo.corpus import text
from lapse_elmo.errors import OutputError, UserError
from lapse_elmo.mpi.world import solo
from preprocess import shards as command
from preprocess import staging
from tests.mpi import ROOT, Job
from tests.preprocess.texts import sentences, shards, tree, vocab, write

# Runs bin/preprocess with blocks of sys.argv[2] bytes and kills it in the call number sys.argv[3] of the function
# sys.argv[4] of preprocess.shards or preprocess.encoded_chunks.
KILLED = """
import itertools, os, signal, sys
sys.path.insert(0, sys.argv[1])
from lapse_elmo.corpus import text
from lapse_elmo.mpi.world import solo
from preprocess import cli, encoded_chunks, shards
text.BLOCK_BYTES, number, name, calls = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], itertools.count(1)
module = shards if hasattr(shards, name) else encoded_chunks
function = getattr(module, name)
def call(*arguments):
    if next(calls) == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments)
setattr(module, name, call)
cli.main(sys.argv[5:], solo)
"""
IN_THIRD_CHUNK = (3, "_checksum")
IN_SECOND_SHARD = (5, "read_group")  # a shard of training text has a group of each of three chunks

Corpus = tuple[list[Path], Path, Path]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Three training texts and a held-out text, each a chunk, and a vocabulary."""
    train = [
        write(tmp_path / "a.txt", sentences(50)), write(tmp_path / "b.gz", sentences(31, 50)),
        write(tmp_path / "c.txt", sentences(40, 81)),
    ]
    return train, write(tmp_path / "heldout.txt", sentences(9, 200)), vocab(train, tmp_path / "v", 2)


def arguments(corpus: Corpus, output: Path) -> list[str]:
    train, heldout, vocabulary = corpus
    words = ["shards", *train, "--heldout", heldout, "--vocab", vocabulary, "--output", output, "--num-shards", 3]
    return list(map(str, words))


def kill(corpus: Corpus, output: Path, moment: tuple[int, str]) -> Path:
    """Start the command and kill it; returns the hidden directory."""
    words = [sys.executable, "-c", KILLED, ROOT, text.BLOCK_BYTES, *moment, *arguments(corpus, output)]
    assert subprocess.run(list(map(str, words)), timeout=60, check=False).returncode == -signal.SIGKILL
    assert not output.exists()
    (left,) = output.parent.glob(f".{output.name}.tmp-*")
    return left


@pytest.mark.parametrize("moment", [IN_THIRD_CHUNK, IN_SECOND_SHARD])
@pytest.mark.parametrize("size", [1, 2])
def test_a_killed_run_is_resumed(
    corpus: Corpus, tmp_path: Path, mpirun: Callable[..., Job], moment: tuple[int, str], size: int
) -> None:
    output = tmp_path / "out"
    kill(corpus, output, moment)
    job = mpirun(size, [ROOT / "bin" / "preprocess", *arguments(corpus, output)])
    assert job.returncode == 0, job.output
    resumed = [line for line in job.stdout.splitlines() if line.startswith("resumes:")]
    if moment == IN_THIRD_CHUNK:
        assert resumed == ["resumes: 2 of 4 parts of the text are encoded already"]
    else:
        assert resumed == [
            "resumes: 4 of 4 parts of the text are encoded already", "resumes: 1 of 3 train shards are written already",
        ]
    assert "removed" not in job.stdout
    train, heldout, vocabulary = corpus
    assert tree(output) == tree(shards(train, [heldout], vocabulary, tmp_path / "fresh", num_shards=3))
    assert not list(tmp_path.glob(".*"))


def test_only_verified_parts_are_used(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parts are encoded again if the text, the vocabulary or an option has changed, or if their files are damaged."""
    monkeypatch.setattr(text, "BLOCK_BYTES", 100)  # so that a chunk has several blocks
    train, heldout, vocabulary = corpus
    left = kill(corpus, tmp_path / "out", IN_SECOND_SHARD)
    encode, encoded = command.encode_part, []

    def counted(*arguments: object) -> object:
        encoded.append(arguments[0])
        return encode(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(command, "encode_part", counted)

    def flip(suffix: str, at: int) -> Callable[[Path], object]:
        def damage(directory: Path) -> None:
            path = max(directory.rglob(f"*{suffix}"), key=lambda path: path.stat().st_size)
            data = bytearray(path.read_bytes())
            data[at] ^= 1
            path.write_bytes(data)

        return damage

    def change_text(_: Path) -> None:
        status = train[0].stat()
        train[0].write_text(train[0].read_text().replace("ship", "mast"))
        os.utime(train[0], ns=(status.st_atime_ns, status.st_mtime_ns + 1))

    other = vocab(train, tmp_path / "other", 1, max_size=5)
    cases: list[tuple[Callable[[Path], object], dict[str, object], int, int]] = [
        (lambda _: None, {}, 0, 1),
        (flip(".tokens", 8), {}, 1, 1),
        (flip(".lengths", 0), {}, 1, 1),
        (flip(".record", 40), {}, 1, 1),
        (flip(".h5", -2), {}, 0, 0),
        (lambda path: next(path.rglob("*.lengths")).unlink(), {}, 1, 1),
        (lambda _: None, {"num_shards": 4}, 3, 0),
        (lambda _: None, {"num_heldout_shards": 2}, 1, 0),
        (lambda _: None, {"vocabulary": other}, 4, 0),
        (change_text, {}, 1, 0),
    ]
    for number, (change, options, num_encoded, num_shards) in enumerate(cases):
        used = {"vocabulary": vocabulary, "num_shards": 3, **options}
        output = tmp_path / f"out{number}"
        change(shutil.copytree(left, tmp_path / f".out{number}.tmp-copy"))
        encoded.clear()
        shards(train, [heldout], output=output, **used)  # type: ignore[arg-type]
        printed = capsys.readouterr().out
        assert len(encoded) == num_encoded, (number, printed)
        assert ("removed" in printed) == (num_encoded > 1 or bool(options) or change is change_text), (number, printed)
        assert sum(map(int, re.findall(r"resumes: (\d) of \d train shards", printed))) == num_shards, (number, printed)
        fresh = tmp_path / f"fresh{number}"
        assert tree(output) == tree(shards(train, [heldout], output=fresh, **used))  # type: ignore[arg-type]
    shutil.rmtree(left)
    assert not list(tmp_path.glob(".*"))


def test_a_part_of_several_texts_is_used(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(text, "NUM_PARTS", 1)
    train, heldout, vocabulary = corpus
    train.insert(1, write(tmp_path / "last", ["", "a ship"]))
    fresh = shards(train, [heldout], vocabulary, tmp_path / "fresh", num_shards=3)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(command, "read_group", interrupted)
        shards(train, [heldout], vocabulary, tmp_path / "out", num_shards=3)
    assert tree(shards(train, [heldout], vocabulary, tmp_path / "out", num_shards=3)) == tree(fresh)
    assert "resumes: 2 of 2 parts" in capsys.readouterr().out
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(command, "read_group", interrupted)
        shards(train, [heldout], vocabulary, tmp_path / "other", num_shards=3)
    write(train[0], ["a ship", *sentences(9)])  # the first text of the first part
    capsys.readouterr()
    shards(train, [heldout], vocabulary, tmp_path / "other", num_shards=3)
    assert "resumes: 1 of 2 parts" in capsys.readouterr().out


def test_an_interrupted_run_keeps_its_parts_and_an_error_does_not(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, heldout, vocabulary = corpus

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(command, "read_group", interrupted)
        shards(train, [heldout], vocabulary, tmp_path / "out", num_shards=3)
    assert len(list(tmp_path.glob(".out.tmp-*"))) == 1
    with pytest.raises(command.ConfigError, match="cannot fill 99 shards"):
        shards(train, [heldout], vocabulary, tmp_path / "out", num_shards=3, num_heldout_shards=99)
    assert "resumes: 3 of 4 parts" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*"))


def test_an_output_that_cannot_be_replaced_is_not_removed(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If neither the new nor the old directory can get the name, as on a file server that is lost for a moment."""
    train, heldout, vocabulary = corpus
    output = shards(train, [heldout], vocabulary, tmp_path / "out", num_shards=3)
    before = tree(output)

    def fail(new: Path, path: Path, old: Path) -> None:
        path.rename(old)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="Input/output error"):
        patch.setattr(staging, "replace", fail)
        shards(train, [heldout], vocabulary, output, num_shards=3, overwrite=True)
    shards(train, [heldout], vocabulary, output, num_shards=3)
    (kept,) = tmp_path.glob(".out.tmp-*/old")
    assert tree(kept) == tree(output) == before


def test_a_file_system_without_locks(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program works, and does not touch what may belong to a run that is active."""
    train, heldout, vocabulary = corpus
    left = kill(corpus, tmp_path / "out", IN_THIRD_CHUNK)
    before = tree(left)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(staging.fcntl, "flock", refuse)
    output = shards(train, [heldout], vocabulary, tmp_path / "out", num_shards=3)
    assert tree(left) == before
    monkeypatch.undo()
    shutil.rmtree(left)
    assert tree(output) == tree(shards(train, [heldout], vocabulary, tmp_path / "fresh", num_shards=3))
    assert not list(tmp_path.glob(".*"))


def test_the_file_server_is_not_asked_at_each_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, asked = solo(), []

    def exists(path: Path) -> bool:
        asked.append(path)
        return len(asked) == 2

    with staging.Staging(world, str(tmp_path / "out"), overwrite=False) as current:
        world.size = 2
        monkeypatch.setattr(Path, "exists", exists)
        for _ in range(1000):
            current.check()
        assert asked == [current.directory / "failed"]
        monkeypatch.setattr(staging, "_CHECK_S", 0.0)
        current._next_check = 0.0
        with pytest.raises(UserError, match="another rank failed"):
            current.check()
        world.size = 1
