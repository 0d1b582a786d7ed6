"""Measure the speed of checkpoints, what they cost training, and how long a kill and a resume take.

``python -m benchmarks.checkpoint [models] [training]`` runs both parts, or one of them, on 2 ranks. Rates are compared
with those of plain files of the same size, written and read by as many processes on the same disk in the same run. The
files are dropped from the page cache before they are read.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import torch

from lapse_elmo import checkpoint
from lapse_elmo.config.cli import as_tables
from lapse_elmo.config.preprocessing import ShardsOptions, VocabOptions
from lapse_elmo.config.training import parse_train
from lapse_elmo.cursor import Cursor, Position
from lapse_elmo.mpi.launch import launch
from lapse_elmo.mpi.world import World, solo
from lapse_elmo.parameters import Parameters
from preprocess.shards import make_shards
from preprocess.vocab import make_vocabulary

ROOT = Path(__file__).resolve().parent.parent
MPIRUN = f"{sys.prefix}/bin/mpirun"
NUM_RANKS, REPEATS = 2, 3
MODELS = {"small, 44,095 classes": 44_095, "small, 970,000 classes": 970_000}
_BLOCK_BYTES = 1 << 22


class FixedCursor:
    """A stand-in for a Cursor that is between two epochs and does not move."""

    position = Position(1, 1, 0)
    step = 1

    def sentences(self) -> None:
        """Return None: between epochs there are no sentences to save."""


def measure_files(argv: list[str], enter: Callable[[], World]) -> None:
    """Run one rank of the first part; ``argv`` is NUM_CLASSES FOLDER."""
    num_classes, folder = int(argv[0]), Path(argv[1])
    world = enter()
    torch.set_num_threads(1)
    config = parse_train(["--preset", "small", "--run-dir", str(folder)])
    parameters = Parameters(config, num_classes, world, torch.device("cpu"))
    parameters.initialise()
    entries = {
        "vocabulary_sha256": "", "num_classes": num_classes, "config": as_tables(config), "results": {},
        "corpus": {"training": "", "held-out": ""}, "state": {},
    }
    times: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], object]) -> None:
        world.barrier()
        start = time.perf_counter()
        call()
        world.barrier()
        times.setdefault(name, []).append(time.perf_counter() - start)

    saver, cursor = checkpoint.Saver(folder, world), cast("Cursor", FixedCursor())
    path, plain = checkpoint.path_of(folder, 1), folder / f"plain-{world.rank}"
    total = 0

    def write_plain_file() -> None:
        write_plain(plain, total // world.size)

    for _ in range(REPEATS):
        begin = time.perf_counter()
        timed("stall", lambda: saver.start(parameters, cursor, entries, None))
        timed("write", saver.finish)
        times["write"][-1] = time.perf_counter() - begin
        manifest = checkpoint.read_manifest(path)
        total = sum(entry["bytes"] for entry in manifest["files"].values())
        timed("plain write", write_plain_file)
        for file in (*path.iterdir(), plain):
            drop_from_page_cache(file)
        timed("restore", lambda: restore(path, parameters, world))
        timed("plain read", lambda: read_plain(plain))
        plain.unlink()
    if world.rank == 0:
        rates = {name: total / 1e6 / statistics.median(seconds) for name, seconds in times.items()}
        print(
            f"{total / 1e9:5.2f} GB  write {rates['write']:5.0f} MB/s (plain file {rates['plain write']:5.0f}), "
            f"restore with checksums {rates['restore']:5.0f} MB/s (plain file {rates['plain read']:5.0f}), "
            f"training pauses for {statistics.median(times['stall']):.2f} s", flush=True,
        )
    parameters.server.close()


def restore(path: Path, parameters: Parameters, world: World) -> None:
    """Verify and restore a checkpoint (collective)."""
    files = checkpoint.OpenFiles(path)
    manifest = checkpoint.verified(files, world)
    world.barrier()
    checkpoint.restore(files, manifest, parameters, world)


def write_plain(path: Path, num_bytes: int) -> None:
    """Write a file of random bytes and flush it to the disk."""
    block = np.random.default_rng(0).bytes(_BLOCK_BYTES)
    with open(path, "wb", buffering=0) as file:
        for _ in range(0, num_bytes, _BLOCK_BYTES):
            file.write(block)
        os.fsync(file.fileno())


def read_plain(path: Path) -> None:
    """Read a file and discard its data."""
    block = memoryview(bytearray(_BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while file.readinto(block):
            pass


def drop_from_page_cache(path: Path) -> None:
    """Drop a file from the page cache."""
    handle = os.open(path, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def make_corpus(folder: Path, num_words: int) -> list[str]:
    """Make a corpus of Zipf-distributed words, all of them in the vocabulary; returns options of bin/train."""
    rng = np.random.default_rng(0)
    order = rng.permutation(num_words)
    lines = [" ".join(f"w{word}" for word in order[i : i + 20]) for i in range(0, num_words, 20)]
    common = np.minimum(rng.zipf(1.3, (4000, 20)), num_words) - 1
    lines += [" ".join(f"w{word}" for word in row) for row in common]
    (folder / "text").write_text("\n".join(lines) + "\n")
    (folder / "heldout").write_text("\n".join(lines[:10]) + "\n")
    vocab, shards, text = str(folder / "vocab.txt"), str(folder / "shards"), (str(folder / "text"),)
    make_vocabulary(VocabOptions(text, output=vocab, threshold=1), solo())
    make_shards(ShardsOptions(text, (str(folder / "heldout"),), vocab=vocab, output=shards, num_shards=4), solo())
    return ["--vocab", vocab, "--shards", shards, "--preset", "small", "--report-every", "5", "--progress", "none"]


def start(run_dir: Path, options: list[str]) -> subprocess.Popen[bytes]:
    """Start a training job."""
    command = [MPIRUN, "-n", str(NUM_RANKS), sys.executable, "bin/train", "--run-dir", str(run_dir), *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def lines_of(run_dir: Path) -> list[dict]:
    """Return the training records of a run's metrics so far."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [record for record in map(json.loads, lines) if record["kind"] == "train"]


def measure_stall(folder: Path, corpus: list[str], steps: int, every: int) -> None:
    """Compare training with and without saves, in turn."""
    rates: dict[int, list[float]] = {0: [], every: []}
    stalls = []
    for turn in range(2):
        for period in (0, every):
            run_dir = folder / f"stall-{turn}-{period}"
            options = [*corpus, "--max-steps", str(steps), "--save-every-steps", str(period)]
            assert start(run_dir, options).wait() == 0
            records = lines_of(run_dir)[2:]
            rates[period].append(statistics.mean(record["train/tokens_per_s"] for record in records))
            if period:
                stalls += [5 * record["step/save_s"] for record in records if "step/save_s" in record]
                seconds = records[-1]["time_s"] - records[0]["time_s"]
                print(f"  one save every {seconds / max(steps / every, 1):.1f} s", flush=True)
    without, with_ = statistics.mean(rates[0]), statistics.mean(rates[every])
    print(f"  {without:,.0f} tokens/s without saves, {with_:,.0f} with: {1 - with_ / without:.1%} less")
    print(f"  training paused for {statistics.median(stalls):.2f} s per save, including waiting for the previous one")


def measure_kill(folder: Path, corpus: list[str]) -> None:
    """Measure the time from SIGKILL of a rank to the end of the job, and from the start to the first step."""
    ends, firsts = [], []
    run_dir = folder / "killed"
    options = [*corpus, "--save-every-steps", "5", "--report-every", "1"]
    for _ in range(REPEATS):
        known, begin = len(lines_of(run_dir)), time.time()
        job = start(run_dir, options)
        while not checkpoint.candidates(run_dir) or len(lines_of(run_dir)) < known + 8:
            time.sleep(0.05)
            assert job.poll() is None
        firsts.append(next(record["time_s"] for record in lines_of(run_dir) if record["time_s"] > begin) - begin)
        ranks = subprocess.run(["pgrep", "-f", f"bin/train --run-dir {run_dir}"], capture_output=True, text=True)
        victim = max(pid for pid in map(int, ranks.stdout.split()) if pid != job.pid)
        os.kill(victim, signal.SIGKILL)
        begin = time.time()
        job.wait()
        ends.append(time.time() - begin)
    print(f"  SIGKILL of a rank to the end of the job: {statistics.median(ends):.2f} s")
    print(f"  first start to its first step {firsts[0]:.1f} s, resumed {statistics.median(firsts[1:]):.1f} s")


def main(parts: list[str]) -> None:
    """Run the parts of the benchmark."""
    with tempfile.TemporaryDirectory(dir=ROOT) as name:
        folder = Path(name)
        for title, num_classes in MODELS.items() if "models" in parts else ():
            print(f"{title}: ", end="", flush=True)
            command = [MPIRUN, "-n", str(NUM_RANKS), sys.executable, "-m", "benchmarks.checkpoint", "files"]
            subprocess.run([*command, str(num_classes), str(folder / str(num_classes))], cwd=ROOT, check=True)
        if "training" in parts:
            corpus = make_corpus(folder, 44_000)
            print("small, 44,000 classes, training")
            measure_kill(folder, corpus)
            measure_stall(folder, corpus, 40, 10)


if __name__ == "__main__":
    if sys.argv[1:2] == ["files"]:
        launch(measure_files, sys.argv[2:], prog="benchmarks.checkpoint")
    else:
        main(sys.argv[1:] or ["models", "training"])
