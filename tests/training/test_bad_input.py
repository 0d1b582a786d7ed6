"""Mistakes of users: each gives one clear line and status 2 at once, and leaves no incomplete output."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

from tests import mpi
from tests.training.conftest import Drive
from tests.training.corpora import TINY, Prepared, evaluate_alone, prepare, random_sentences, records, train_alone


@dataclass(frozen=True)
class Case:
    """A call that must fail: its error class, words of its message, and an output that must not exist afterwards."""

    program: str
    argv: list[str]
    error: str
    says: tuple[str, ...]
    absent: Path | None = None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad")


@pytest.fixture(scope="module")
def run_dir(small: Prepared, folder: Path) -> Path:
    """Return the directory of a valid run."""
    return train_alone(small, folder / "good", "--max-steps", "1")


@pytest.fixture(scope="module")
def cases(small: Prepared, folder: Path, run_dir: Path) -> dict[str, Case]:
    found = corpus_cases(small, folder) | option_cases(small, folder) | output_cases(small, folder, run_dir)
    return found | evaluation_cases(small, folder, run_dir)


def train_case(small: Prepared, folder: Path, name: str, options: list[str], error: str, *says: str) -> Case:
    """Return a training run of the small corpus; ``options`` come last and override the others."""
    run_dir = folder / "never" / name
    argv = [*small.options, *TINY, "--run-dir", str(run_dir), "--max-steps", "1", *options]
    return Case("train", argv, error, says, run_dir)


def copied_shards(small: Prepared, folder: Path, name: str) -> Path:
    return shutil.copytree(small.shards, folder / name)


def corpus_cases(small: Prepared, folder: Path) -> dict[str, Case]:
    empty = folder / "empty"
    empty.mkdir()
    no_heldout = copied_shards(small, folder, "no-heldout")
    next(no_heldout.glob("heldout-*")).unlink()
    truncated = copied_shards(small, folder, "truncated")
    shard = truncated / "train-00001-of-00003.h5"
    shard.write_bytes(shard.read_bytes()[:3000])
    foreign = copied_shards(small, folder, "foreign")
    with h5py.File(foreign / "train-00001-of-00003.h5", "w") as file:
        file["something"] = [1, 2, 3]
    missing = copied_shards(small, folder, "missing")
    (missing / "train-00002-of-00003.h5").unlink()
    other = prepare(folder / "other", random_sentences(8, 30, 20, (3, 5)), random_sentences(9, 5, 20, (3, 5)))
    words = small.vocab.read_text()
    (folder / "double.txt").write_text(words + "w00\n")
    (folder / "latin.txt").write_bytes(words.encode() + b"caf\xe9\n")
    rows: dict[str, tuple[list[str], tuple[str, ...]]] = {
        "no such folder": (["--shards", str(folder / "nowhere")], ("nowhere", "bin/preprocess shards")),
        "empty folder": (["--shards", str(empty)], (str(empty), "no train shards")),
        "no held-out shards": (["--shards", str(no_heldout)], (str(no_heldout), "no heldout shards")),
        "truncated shard": (["--shards", str(truncated)], ("train-00001-of-00003.h5", "damaged")),
        "foreign HDF5 file": (["--shards", str(foreign)], ("train-00001-of-00003.h5", "not a shard of lapse-elmo")),
        "missing shard": (["--shards", str(missing)], ("1 of the 3 train shards",)),
        "other vocabulary": (["--vocab", str(other.vocab)], ("vocabulary", "SHA-256", "43 classes")),
        "double word": (["--vocab", str(folder / "double.txt")], ("double.txt", "'w00'", "already")),
        "not UTF-8": (["--vocab", str(folder / "latin.txt")], ("latin.txt", "0xe9", "UTF-8")),
        "no vocabulary": (["--vocab", str(folder / "nowhere.txt")], ("nowhere.txt", "No such file")),
    }
    return {n: train_case(small, folder, n, options, "CorpusError", *says) for n, (options, says) in rows.items()}


def option_cases(small: Prepared, folder: Path) -> dict[str, Case]:
    (folder / "broken.toml").write_text("[training\nepochs = 2\n")
    (folder / "strange.toml").write_text("[training]\nepoch = 2\n")
    few = prepare(folder / "one", ["w00 w01"], ["w00 w01"], num_shards=1)
    lone = prepare(folder / "lone", ["w00 w01", "w01"], ["w00", "w01"], num_shards=1)
    rows: dict[str, tuple[list[str], tuple[str, ...]]] = {
        "unknown option": (["--learning-rat", "1"], ("--learning-rat'", "did you mean '--learning-rate'?")),
        "sync with ps": (["--sync", "--dense", "ps"], ("--sync", "--dense allreduce")),
        "GPUs of the CPU": (["--device-ids", "0", "--device", "cpu"], ("--device-ids", "--device")),
        "tries with replacement": (["--num-tries", "9", "--replacement"], ("--num-tries", "--no-replacement")),
        "not a number": (["--learning-rate", "fast"], ("--learning-rate", "'fast'")),
        "no config file": (["--config", str(folder / "nowhere.toml")], ("nowhere.toml", "No such file")),
        "broken config file": (["--config", str(folder / "broken.toml")], ("broken.toml", "not valid TOML")),
        "strange config file": (["--config", str(folder / "strange.toml")], ("'epoch'", "did you mean 'epochs'?")),
        "more ranks than sentences": (few.options, ("1 training sentences", "2 ranks", "fewer ranks")),
        "no targets": ([*lone.options, "--no-boundaries"], ("no targets", "--boundaries")),
    }
    if not torch.cuda.is_available():
        rows["no GPU"] = (["--device", "cuda"], ("GPU 0", "--device cpu"))
    return {n: train_case(small, folder, n, options, "ConfigError", *says) for n, (options, says) in rows.items()}


def output_cases(small: Prepared, folder: Path, run_dir: Path) -> dict[str, Case]:
    (folder / "a-file").write_text("not a folder")
    rows: dict[str, tuple[list[str], tuple[str, ...]]] = {
        "a run is there": (["--run-dir", str(run_dir), "--resume", "never"], (str(run_dir), "--overwrite", "auto")),
        "under a file": (["--run-dir", str(folder / "a-file" / "run")], ("a-file", "Not a directory", "--run-dir")),
        "not writable": (["--run-dir", "/proc/run"], ("/proc/run", "--run-dir")),
    }
    return {n: train_case(small, folder, n, options, "OutputError", *says) for n, (options, says) in rows.items()}


def evaluation_cases(small: Prepared, folder: Path, run_dir: Path) -> dict[str, Case]:
    name = "step-00000001"
    damaged = shutil.copytree(run_dir, folder / "damaged") / "checkpoints" / name
    data = bytearray((damaged / "dense.h5").read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / "dense.h5").write_bytes(data)
    incomplete = shutil.copytree(run_dir, folder / "incomplete") / "checkpoints" / name
    next(incomplete.glob("table-softmax-*")).unlink()
    garbled = shutil.copytree(run_dir, folder / "garbled") / "checkpoints" / name
    (garbled / "manifest.json").write_text("{")
    other = folder / "other"  # made by corpus_cases
    output = folder / "result.json"
    rows: dict[str, tuple[list[str], str, tuple[str, ...]]] = {
        "no model": ([str(folder / "empty")], "CheckpointError", ("holds no checkpoint",)),
        "flipped bit": ([str(folder / "damaged")], "CheckpointError", ("dense.h5", "damaged")),
        "lost file": ([str(folder / "incomplete")], "CheckpointError", ("table-softmax-00000-of-00001.h5", "missing")),
        "garbled manifest": ([str(folder / "garbled")], "CheckpointError", ("manifest.json",)),
        "model of another vocabulary": (
            [str(run_dir), "--vocab", str(other / "vocab.txt")], "CheckpointError", ("(43 classes)", "trained with"),
        ),
        "shards of another vocabulary": (
            [str(run_dir), "--shards", str(other / "shards")], "CorpusError", ("SHA-256", "43 classes"),
        ),
        "no shards to evaluate": ([str(run_dir), "--shards", str(folder / "empty")], "CorpusError", ("no heldout",)),
        "output is there": (
            [str(run_dir), "--output", str(small.vocab)], "OutputError", (str(small.vocab), "--overwrite"),
        ),
    }
    made = {}
    for case, (argv, error, says) in rows.items():
        options = argv if "--output" in argv else [*argv, "--output", str(output)]
        made[case] = Case("evaluate", [*options, "--device", "cpu", "--threads", "1"], error, says, output)
    made["nothing to export"] = Case(
        "export", [str(folder / "damaged"), "--output", str(output)], "CheckpointError", ("dense.h5", "damaged"), output
    )
    made["export over a file"] = Case(
        "export", [str(run_dir), "--output", str(small.vocab), "--overwrite"], "OutputError", ("is a file",)
    )
    made["no text to embed"] = Case(
        "embed", [str(run_dir), str(folder / "nowhere"), "--output", str(output)], "CorpusError", ("nowhere",), output
    )
    return made


@pytest.fixture(scope="module")
def outcomes(cases: dict[str, Case], drive: Drive) -> dict[str, list[dict[str, Any]]]:
    """Run all cases in one job; returns the result of each of two ranks for each case."""
    results = drive(2, [(case.program, case.argv) for case in cases.values()])
    return dict(zip(cases, results, strict=True))


def test_every_mistake_is_refused_alike_on_all_ranks(
    cases: dict[str, Case], outcomes: dict[str, list[dict[str, Any]]]
) -> None:
    """Both ranks raise the same error, marked as ``everywhere``, so that rank 0 prints it once."""
    wrong: list[tuple[str, object]] = []
    for name, case in cases.items():
        first, second = outcomes[name]
        lines = first["message"].splitlines()
        at_parsing = first["error"] == "ConfigError" and not first["everywhere"]  # there is no world yet: rank 0 prints
        if first["error"] != case.error or first != second or len(lines) != 1:
            wrong.append((name, outcomes[name]))
        elif not all(text in lines[0] for text in case.says) or not (first["everywhere"] or at_parsing):
            wrong.append((name, first))
        elif case.absent is not None and case.absent.exists():
            wrong.append((name, f"{case.absent} was made"))
    assert not wrong


def assert_one_line(job: mpi.Job, *says: str) -> None:
    """Check status 2, an empty stdout, and one line of ours on stderr (mpirun adds its own after an abort)."""
    ours = [line for line in job.stderr.splitlines() if line.startswith("bin/")]
    assert job.returncode == 2, job.output
    assert len(ours) == 1 and all(text in ours[0] for text in says), job.output
    assert "Traceback" not in job.stderr and not job.stdout.strip() and not job.survivors, job.output


def test_the_programs_print_one_line_and_end_with_2(tmp_path: Path) -> None:
    program = str(mpi.ROOT / "bin" / "train")
    empty = tmp_path
    job = mpi.mpirun(2, [program, "--learning-rat", "1"], cwd=empty)
    assert_one_line(job, "bin/train: error: ", "did you mean '--learning-rate'?")
    job = mpi.mpirun(2, [program], cwd=empty)
    assert_one_line(job, "bin/train: error: ", "data/shards", "bin/preprocess", "--shards")
    assert not list(empty.iterdir())
    job = mpi.mpirun(1, [mpi.ROOT / "bin" / "evaluate", "gone"], cwd=empty, launcher=False)
    assert_one_line(job, "bin/evaluate: error: ", "gone does not exist")


def damage_tokens(path: Path) -> None:
    """Flip a bit of the tokens, so that their checksum fails when they are read but not when the file is opened."""
    with h5py.File(path, "r") as file:
        chunk = file["tokens"].id.get_chunk_info(0)
    data = bytearray(path.read_bytes())
    data[chunk.byte_offset + 8] ^= 1
    path.write_bytes(data)


def test_a_shard_that_one_rank_cannot_read_ends_the_job(small: Prepared, tmp_path: Path) -> None:
    shards = shutil.copytree(small.shards, tmp_path / "shards")
    damage_tokens(shards / "train-00002-of-00003.h5")  # one of the ranks reads it for the node
    argv = ["bin/train", *small.options, "--shards", str(shards), *TINY, "--run-dir", str(tmp_path / "run")]
    job = mpi.mpirun(3, [*argv, "--max-steps", "50"], timeout=60)
    assert_one_line(job, "[rank ", "/3 ", "train-00002-of-00003.h5", "damaged")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_few_classes_and_long_sentences_are_no_mistakes(
    small: Prepared, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = train_alone(
        small, tmp_path / "run", "--num-samples", "43", "--max-length", "5", "--epochs", "1", "--batch-size", "50"
    )
    shown = capfd.readouterr().err
    assert "full softmax" in shown
    lengths = [len(sentence.split()) for sentence in small.train]
    (epoch,) = records(run_dir, "epoch")
    assert epoch["train/cut_sentences"] == sum(length > 5 for length in lengths) > 0
    assert epoch["train/epoch_tokens"] == sum(min(length, 5) for length in lengths)
    cut = sum(len(sentence.split()) > 5 for sentence in small.heldout)
    assert cut and f"{cut:,} held-out sentences were cut at --max-length 5\n" in shown
    assert evaluate_alone(run_dir, tmp_path / "result.json")["num_cut_sentences"] == cut
    assert f"\ncut          {cut} sentences at --max-length 5, as in training\nforward " in capfd.readouterr().out


def test_a_run_is_replaced_when_that_is_asked_for(small: Prepared, tmp_path: Path) -> None:
    run_dir = train_alone(small, tmp_path / "run", "--max-steps", "2")
    own_copy = ["--vocab", str(run_dir / "vocab.txt")]
    train_alone(small, run_dir, "--max-steps", "1", "--overwrite", *own_copy)
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000001"]
    assert [line["step"] for line in records(run_dir, "epoch")] == [1]
    assert (run_dir / "vocab.txt").read_bytes() == small.vocab.read_bytes()
