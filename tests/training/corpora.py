"""Small corpora through the real preprocessing, runs of the real programs, and what these leave on the disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from lapse_elmo import evaluate, train
from lapse_elmo.checkpoint import Manifest, Saver
from lapse_elmo.config.preprocessing import ShardsOptions, VocabOptions
from lapse_elmo.cursor import Cursor
from lapse_elmo.mpi.world import World, solo
from lapse_elmo.parameters import Parameters
from preprocess.shards import make_shards
from preprocess.vocab import make_vocabulary
from tests import mpi

TINY = (  # batches of the size asked for, from the first step on
    *("--projection-size", "16", "--cell-size", "32", "--threads", "1", "--progress", "none", "--device", "cpu"),
    *("--first-batch", "0"),
)


@dataclass(frozen=True)
class Prepared:
    """Shards, their vocabulary, and the sentences they were made of."""

    shards: Path
    vocab: Path
    train: tuple[str, ...]
    heldout: tuple[str, ...]

    @property
    def options(self) -> list[str]:
        return ["--shards", str(self.shards), "--vocab", str(self.vocab)]


def prepare(folder: Path, train_text: Sequence[str], heldout_text: Sequence[str], num_shards: int = 3) -> Prepared:
    """Make a vocabulary with every word of the sentences, and their shards."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, sentences in (("train.txt", train_text), ("heldout.txt", heldout_text)):
        (folder / name).write_text("".join(f"{sentence}\n" for sentence in sentences), encoding="utf-8")
    vocab, shards = folder / "vocab.txt", folder / "shards"
    text = (str(folder / "train.txt"),)
    make_vocabulary(VocabOptions(text, output=str(vocab), threshold=1), solo())
    heldout = (str(folder / "heldout.txt"),)
    make_shards(ShardsOptions(text, heldout, vocab=str(vocab), output=str(shards), num_shards=num_shards), solo())
    return Prepared(shards, vocab, tuple(train_text), tuple(heldout_text))


def random_sentences(seed: int, count: int, num_words: int, lengths: tuple[int, int]) -> list[str]:
    """Return sentences of words drawn by rank frequency; ``lengths`` are the shortest and the longest."""
    rng = np.random.default_rng(seed)
    frequencies = 1 / np.arange(1, num_words + 1)
    frequencies /= frequencies.sum()
    sizes = rng.integers(lengths[0], lengths[1] + 1, count)
    return [" ".join(f"w{word:02d}" for word in rng.choice(num_words, size, p=frequencies)) for size in sizes]


def train_alone(corpus: Prepared, run_dir: Path, *options: str) -> Path:
    """Run bin/train on one rank in this process."""
    train.main([*corpus.options, *TINY, "--run-dir", str(run_dir), *options], solo)
    return run_dir


def evaluate_alone(model: Path, output: Path, *options: str) -> dict[str, Any]:
    """Return the result of ``bin/evaluate`` on one rank in this process."""
    evaluate.main([str(model), "--output", str(output), "--threads", "1", "--device", "cpu", *options], solo)
    return json.loads(output.read_text())


def records(run_dir: Path, kind: str = "") -> list[dict[str, Any]]:
    """Return the records of a run's metrics.jsonl, or those of one kind."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in ("", line["kind"])]


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the run's checkpoints, oldest first, with any other files in their folder."""
    return sorted((run_dir / "checkpoints").iterdir())


def saved_arrays(checkpoint: Path) -> dict[str, np.ndarray]:
    """Return all arrays of a checkpoint by name; tables are assembled from their files, each row once."""
    arrays: dict[str, np.ndarray] = {}
    shares: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    with h5py.File(checkpoint / "dense.h5", "r") as file:
        file.visititems(
            lambda name, item: arrays.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None
        )
    for path in sorted(checkpoint.glob("table-*.h5")):
        with h5py.File(path, "r") as file:
            shares.setdefault(path.name.split("-")[1], []).append((file["rows"][:], file["values"][:]))
    for path in sorted(checkpoint.glob("rank-*.h5")):  # of version 2
        with h5py.File(path, "r") as file:
            for name, group in file["tables"].items():
                shares.setdefault(name, []).append((group["rows"][:], group["values"][:]))
    for name, found in shares.items():
        rows = np.concatenate([numbers for numbers, _ in found])
        np.testing.assert_array_equal(np.sort(rows), np.arange(rows.size))
        arrays[name] = np.concatenate([values for _, values in found])[np.argsort(rows)]
    return arrays


def train_job(
    num_ranks: int, corpus: Prepared, run_dir: Path, *options: str, program: str | Path = "bin/train",
    env: Mapping[str, str] | None = None, fork: bool = True,
) -> mpi.RunningJob:
    """Start a run of bin/train."""
    words = [program, *corpus.options, *TINY, "--run-dir", str(run_dir), *options]
    return mpi.start(num_ranks, words, env=env, fork=fork)


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl without the values that depend on time."""
    timed = ("_s", "/slowest", "/slowest_host")
    return [{name: value for name, value in line.items() if not name.endswith(timed)} for line in lines]


def assert_same_run(first: Path, second: Path) -> None:
    """Check that both runs ended with the same parameters, to the bit, and the same metrics."""
    ends = [checkpoints(run)[-1] for run in (first, second)]
    assert ends[0].name == ends[1].name
    mine, theirs = (saved_arrays(end) for end in ends)
    assert mine.keys() == theirs.keys() and len(mine) > 10
    for name, values in mine.items():
        np.testing.assert_array_equal(values, theirs[name], err_msg=name)
    lines = [without_times(records(run)) for run in (first, second)]
    if any(line.get("server/softmax_sent_bytes") for line in lines[0]):  # between nodes, what is sent when varies
        lines = [[{n: v for n, v in line.items() if not n.startswith("server/")} for line in run] for run in lines]
    for mine_line, their_line in zip(*lines, strict=True):
        differing = {name for name in {**mine_line, **their_line} if mine_line.get(name) != their_line.get(name)}
        assert not differing, {name: (mine_line.get(name), their_line.get(name)) for name in ["step", *differing]}


def save_once(run_dir: Path, parameters: Parameters, cursor: Cursor, manifest: Manifest, world: World) -> Path:
    """Save one checkpoint and wait for it (collective); return its directory."""
    saver = Saver(run_dir, world)
    path = saver.start(parameters, cursor, manifest, None)
    saver.finish()
    return path
