"""Files that lie, files without end, numbers and names without sense: one clear line each, soon, and nothing left."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from lapse_elmo import checkpoint, code_cache, evaluate, native, train
from lapse_elmo.checkpoint.manifest import MANIFEST, encode
from lapse_elmo.config.preprocessing import VocabOptions
from lapse_elmo.config.training import parse_train
from lapse_elmo.corpus.shards import ShardSet
from lapse_elmo.corpus.vocabulary import Vocabulary
from lapse_elmo.corpus.word_vectors import read_word_vectors
from lapse_elmo.errors import CheckpointError, ConfigError, CorpusError, UserError
from lapse_elmo.mpi.world import solo
from lapse_elmo.trained.targets import read_targets
from preprocess.vocab import make_vocabulary
from tests import mpi
from tests.training.corpora import TINY, Prepared, train_alone

Change = Callable[[dict[str, Any]], Any]

MANIFESTS: dict[str, tuple[Change, str]] = {
    "world_size '2'": (lambda m: m.update(world_size="2"), "world_size is '2'"),
    "world_size 0": (lambda m: m.update(world_size=0), "world_size is 0"),
    "world_size 1e9": (lambda m: m.update(world_size=10**9), "world_size is 1000000000"),
    "world_size true": (lambda m: m.update(world_size=True), "world_size is True"),
    "more nodes than files": (lambda m: m.update(num_nodes=7), "does not name the files of the 7 nodes"),
    "num_nodes 1e7": (lambda m: m.update(num_nodes=10**7), "does not name the files of the 10000000 nodes"),
    "num_nodes '1'": (lambda m: m.update(num_nodes="1"), "num_nodes is '1'"),
    "a version of the past": (lambda m: m.update(version=2), "has no sha256"),
    "pieces that lack bytes": (lambda m: m["files"]["dense.h5"]["pieces"].pop(), "which add up to its bytes"),
    "pieces of less than nothing": (
        lambda m: m["files"]["dense.h5"]["pieces"].extend([[-8, ""], [8, ""]]), "which add up to its bytes"
    ),
    "a version of many": (lambda m: m.update(version=[3]), "format version [3]"),
    "step -5": (lambda m: m.update(step=-5), "step is -5"),
    "step x": (lambda m: m.update(step="x"), "step is 'x'"),
    "epoch 1.5": (lambda m: m.update(epoch=1.5), "epoch is 1.5"),
    "files a list": (lambda m: m.update(files=[*m["files"]]), "files is ["),
    "files without sizes": (lambda m: m.update(files={name: {} for name in m["files"]}), "expected its bytes"),
    "files elsewhere": (lambda m: m["files"].update({"../../x": {"bytes": 0, "pieces": []}}), "'../../x'"),
    "config a list": (lambda m: m.update(config=[1]), "config is [1]"),
    "config of numbers": (lambda m: m.update(config={"model": 3}), "config is not a table of groups"),
    "a size of text": (lambda m: m["config"]["model"].update(cell_size="16"), "cell_size is '16' of type str"),
    "a size of 5,000 digits": (lambda m: m["config"]["model"].update(cell_size=10**4000), "cell_size"),
    "an unknown preset": (lambda m: m["config"]["model"].update(preset="x"), "config that this version"),
    "corpus {}": (lambda m: m.update(corpus={}), "corpus does not name"),
    "best a number": (lambda m: m.update(best=3), "best is 3"),
    "milestones a list": (lambda m: m.update(milestones=[1]), "milestones is [1]"),
    "state {}": (lambda m: m.update(state={}), "state of the run in the checkpoint is damaged"),
    "state of text": (lambda m: m["state"].update(meter="x"), "state of the run in the checkpoint is damaged"),
}


def one_line(error: BaseException, says: str) -> None:
    text = str(error)
    assert says in text and len(text.splitlines()) == 1 and len(text) < 1500, text


@pytest.fixture(scope="module")
def run_dir(small: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_alone(small, tmp_path_factory.mktemp("hostile") / "run", "--max-steps", "1")


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_lies(name: str, small: Prepared, run_dir: Path, tmp_path: Path) -> None:
    """A manifest with wrong content but the right checksum is refused."""
    change, says = MANIFESTS[name]
    copy = shutil.copytree(run_dir, tmp_path / "run", symlinks=True)
    path = checkpoint.find(copy) / MANIFEST
    manifest = json.loads(path.read_bytes())
    del manifest["sha256"]
    change(manifest)
    path.write_bytes(encode(manifest))
    with pytest.raises(UserError) as caught:
        train.main([*small.options, *TINY, "--run-dir", str(copy), "--max-steps", "2"], solo)
    one_line(caught.value, says)
    if not name.startswith("state"):  # which says nothing of the model
        with pytest.raises(CheckpointError) as caught:
            evaluate.main([str(copy), "--threads", "1", "--device", "cpu"], solo)


def test_a_manifest_of_nested_lists(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text("[" * 200_000)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read_manifest(tmp_path)
    one_line(caught.value, MANIFEST)


def set_attribute(name: str, value: Any) -> Callable[[h5py.File], None]:
    return lambda file: file.attrs.__setitem__(name, value)


def replace(name: str, **kwargs: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, **kwargs)

    return change


def a_group(file: h5py.File) -> None:
    del file["tokens"]
    file.create_group("tokens")


def empty_sentences(file: h5py.File) -> None:
    replace("offsets", shape=(10**9 + 1,), dtype=np.int64, chunks=(1 << 16,))(file)
    file.attrs["num_sentences"] = 10**9


def a_long_sentence(file: h5py.File) -> None:
    replace("tokens", shape=(10**10,), dtype=np.int32, chunks=(1 << 16,))(file)
    replace("offsets", data=np.array([0, 10**10]))(file)
    file.attrs["num_sentences"], file.attrs["num_tokens"] = 1, 10**10


def compressed(file: h5py.File) -> None:
    """Replace the tokens by a hundred million, which compress to a few hundred kilobytes."""
    replace("tokens", shape=(10**8,), dtype=np.int32, chunks=(1 << 20,), compression="gzip", fillvalue=4)(file)
    file["tokens"][: 1 << 20] = 4
    file.attrs["num_tokens"] = 10**8


SHARDS: dict[str, tuple[Callable[[h5py.File], None], str]] = {
    "num_shards 1e9": (set_attribute("num_shards", 10**9), "1000000000 shards"),
    "vocabulary_size 1e15": (set_attribute("vocabulary_size", 10**15), "1000000000000000 classes"),
    "num_tokens an array": (set_attribute("num_tokens", np.arange(9)), "num_tokens"),
    "num_tokens negative": (set_attribute("num_tokens", -1), "num_tokens is -1"),
    "empty sentences": (empty_sentences, "1000000000 sentences of"),
    "a long sentence": (a_long_sentence, "bytes, 0 are in the file"),
    "compressed": (compressed, "tokens should have 400000000 bytes"),
    "tokens a group": (a_group, "tokens is not a dataset"),
    "sources numbers": (replace("sources", data=np.arange(3.0)), "sources are not a list of names"),
    "sources of no shape": (replace("sources", data=np.bytes_(b"x")), "sources are not a list of names"),
    "tokens of another type": (replace("tokens", data=np.zeros(1, np.float64)), "tokens"),
}


@pytest.mark.parametrize("name", SHARDS)
def test_a_shard_that_lies(name: str, small: Prepared, tmp_path: Path) -> None:
    change, says = SHARDS[name]
    shards = shutil.copytree(small.shards, tmp_path / "shards")
    with h5py.File(shards / "train-00001-of-00003.h5", "r+") as file:
        change(file)
    with pytest.raises(CorpusError) as caught:
        ShardSet.open(shards)
    one_line(caught.value, says)


def test_a_sentence_that_no_line_could_hold(small: Prepared, tmp_path: Path) -> None:
    shards = shutil.copytree(small.shards, tmp_path / "shards")
    with h5py.File(shards / "train-00001-of-00003.h5", "r+") as file:
        tokens = np.full(9_000_000, 4, np.int32)
        replace("tokens", data=tokens)(file)
        replace("offsets", data=np.array([0, tokens.size]))(file)
        file.attrs["num_sentences"], file.attrs["num_tokens"], file.attrs["num_unknown"] = 1, tokens.size, 0
    with ShardSet.open(shards) as found, pytest.raises(CorpusError) as caught:
        found.read(np.arange(found.num_sentences))
    one_line(caught.value, "a sentence has 9,000,000 tokens")


def endless(kind: str, path: Path) -> Path:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        with open(path, "wb") as file:
            file.truncate(1 << 42)  # takes no room on the disk
    return path


READERS: dict[str, Callable[[Path], Any]] = {
    "vocabulary": Vocabulary.load, "words": read_targets,
    "config": lambda path: parse_train(["--config", str(path)]),
    "shard": ShardSet.open,
    "vectors": lambda path: list(read_word_vectors(path, 3)),
    "text": lambda path: make_vocabulary(VocabOptions((str(path),), output=str(path.parent / "v")), solo()),
    "manifest": lambda path: checkpoint.read_manifest(path.parent),
}


@pytest.mark.parametrize("kind", ["fifo", "device", "sparse", "folder"])
@pytest.mark.parametrize("what", READERS)
def test_a_file_without_end(what: str, kind: str, tmp_path: Path) -> None:
    name = {"manifest": MANIFEST, "shard": "train-00000-of-00001.h5"}.get(what, "file")
    path = endless(kind, tmp_path / name)
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        READERS[what](path)
    one_line(caught.value, str(tmp_path))
    assert time.monotonic() - start < 20
    assert [other.name for other in tmp_path.iterdir()] == [name]


def test_a_gzip_bomb(tmp_path: Path) -> None:
    path = tmp_path / "bomb.gz"
    with gzip.open(path, "wb", compresslevel=9) as file:
        for _ in range(200):
            file.write(b"a a\n" * (1 << 18))  # a MiB
    assert path.stat().st_size < 1 << 20
    with pytest.raises(CorpusError) as caught:
        READERS["text"](path)
    one_line(caught.value, "this is not text")
    assert [other.name for other in tmp_path.iterdir()] == ["bomb.gz"]


@pytest.mark.parametrize(
    "option", [
        "--threads 5000", "--num-layers 1000", "--max-steps 1e30", "--max-length 1e30", "--initial-accumulator 1e39",
        "--epochs 1e15", "--accumulate 1e15", "--lookahead 1e15", "--learning-rate nan", "--max-minutes inf",
        "--batch-size 1e15", "--cell-size 1e15", f"--seed {'9' * 5000}",
    ],
)
def test_a_number_without_sense(option: str, small: Prepared, tmp_path: Path) -> None:
    name, value = option.split()
    argv = [word for pair in zip(TINY[::2], TINY[1::2], strict=True) if pair[0] != name for word in pair]
    with pytest.raises(ConfigError) as caught:
        train.main([*small.options, *argv, "--run-dir", str(tmp_path / "run"), name, value], solo)
    one_line(caught.value, "memory" if name in ("--batch-size", "--cell-size") else name)
    assert not (tmp_path / "run").exists()
    if value[:1] == "9":
        (tmp_path / "config.toml").write_text(f"[training]\n{name[2:]} = {value}\n")
        with pytest.raises(ConfigError) as caught:
            parse_train(["--config", str(tmp_path / "config.toml")])
        one_line(caught.value, "config.toml")


def run_program(*words: str, env: dict[str, str] | None = None, shell: str = "") -> mpi.Job:
    """Run a program of bin/ by a shell, with the redirections ``shell``."""
    command = ["-c", "import os, sys; os.execv('/bin/sh', ['sh', '-c', sys.argv[1], *sys.argv[2:]])"]
    line = f'"$0" "$@" {shell}'
    return mpi.mpirun(1, [*command, line, sys.executable, *words], env=env, launcher=False)


@pytest.mark.parametrize("name", ["PMI_RANK", "MPI_LOCALNRANKS"])
def test_a_launcher_variable_that_is_no_number(name: str) -> None:
    job = run_program("bin/train", env={"PMI_SIZE": "2", name: "x\u00b2"})
    assert job.returncode == 2 and job.seconds < 30, job.output
    (line,) = job.stderr.splitlines()
    assert line.startswith(f"bin/train: error: the environment variable {name} is "), line


def test_a_full_device_for_the_output(small: Prepared) -> None:
    words = ["bin/preprocess", "inspect", str(small.shards / "train-00000-of-00003.h5"), "--vocab", str(small.vocab)]
    for arguments in (words, ["bin/train", "--help"]):
        job = run_program(*arguments, shell="> /dev/full")
        assert job.returncode == 2, job.output
        (line,) = job.stderr.splitlines()
        assert "error: cannot write the standard output: No space left on device" in line
    assert run_program("bin/train", "--nonsense", shell="2> /dev/full").returncode == 2


def test_closed_standard_streams(small: Prepared, tmp_path: Path) -> None:
    """With closed standard streams, no file gets their numbers; output would be printed into it."""
    run_dir = tmp_path / "run"
    argv = [*small.options, *TINY, "--run-dir", str(run_dir), "--max-steps", "1"]
    job = run_program("bin/train", *argv, shell="<&- >&- 2>&-")
    assert job.returncode == 0, job.output
    path = checkpoint.find(run_dir)
    checkpoint.check_files(path, checkpoint.read_manifest(path))
    assert run_program("bin/train", "--nonsense", shell="2>&-").returncode == 2


def test_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff"
    with pytest.raises(ConfigError) as caught:
        parse_train(["--run-dir", os.fsdecode(name)])
    one_line(caught.value, "is not UTF-8")
    os.mkdir(name)
    (Path(os.fsdecode(name)) / "text.txt").write_text("a b\na b\na b\n")
    pattern = str(tmp_path / "*" / "text.txt")  # found, not named: its lines are read, its name is escaped
    make_vocabulary(VocabOptions((pattern,), output=str(tmp_path / "vocab.txt")), solo())
    assert Vocabulary.load(tmp_path / "vocab.txt").words == ["a", "b"]


def blocks(pid: int, number: signal.Signals) -> bool:
    (line,) = [one for one in Path(f"/proc/{pid}/status").read_text().splitlines() if one.startswith("SigBlk:")]
    return bool(int(line.split()[1], 16) >> (number - 1) & 1)


def test_an_interrupt_while_modules_are_imported() -> None:
    """Ctrl-C during imports ends the program at once and without a traceback."""
    for wait_s in (0.0, 0.3, 1.0):
        process = subprocess.Popen(
            [sys.executable, "bin/nearest", "nowhere", "word"], cwd=mpi.ROOT, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        while not blocks(process.pid, signal.SIGUSR1):  # Python itself has started
            time.sleep(0.01)
        time.sleep(wait_s)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
        assert process.returncode in (-signal.SIGINT, 130, 2) and b"Traceback" not in errors, errors


@pytest.mark.parametrize(("script", "says"), [
    ("printf '\\351\\377 broken' >&2; exit 1", "broken"), ("exec sleep 60", "has not finished within 1 s"),
    ("exit 3", "exit status 3"),
])
def test_a_compiler_that_misbehaves(
    script: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler that prints bytes, hangs or fails silently leads to the fallback, with a reason of one line."""
    compiler, source = tmp_path / "cc", tmp_path / "some.c"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    source.write_text("int f(void) { return 1; }\n")
    for name, value in (("CC", str(compiler)), (code_cache.CACHE, str(tmp_path / "cache")), (native.SWITCH, "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(native, "_COMPILER_TIME_S", 1)
    monkeypatch.setattr(native, "_SHOWS_VERSION_S", 1)
    start = time.monotonic()
    assert native.load(source) is None and time.monotonic() - start < 10
    assert says in native.problem(source) and len(native.problem(source).splitlines()) == 1
