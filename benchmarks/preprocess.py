"""Measure speed and memory of preprocessing: ``python -m benchmarks.preprocess [TEXT...]``.

The text is repeated until there is enough of it; without TEXT it is random. ``vocab`` and ``shards`` are compared with
plain loops, which split each line and look up each word in a dict. Rates are MB (10^6 bytes) of uncompressed text per
second of CPU time of one rank and of wall time, without the start of the interpreter; the best of three runs. Memory
must grow only with the vocabulary, not with the text. The time to load a vocabulary of ELMo's size is measured too.
``--short`` measures once, with less text.
"""

from __future__ import annotations

import argparse
import array
import bz2
import gzip
import lzma
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from backports import zstd

from lapse_elmo.corpus.compressed import compression_of, decompress
from lapse_elmo.corpus.text import find_texts, read_blocks, split_into_chunks
from lapse_elmo.corpus.vocabulary import Vocabulary
from lapse_elmo.corpus.words import new_word_counter

ROOT = Path(__file__).resolve().parent.parent
ELMO_LINES = 793_471
TYPES = 50_000
PART_MB = 4  # of a compressed file, repeated
_MB = 1_000_000

# Each run is a process of its own, since peak memory is that of a whole process. An empty run shows the interpreter's.
_RUN = """
import sys, time
from lapse_elmo.mpi.world import solo
from preprocess.cli import main
start, used = time.perf_counter(), time.process_time()
if len(sys.argv) > 1:
    main(sys.argv[1:], solo)
seconds, used = time.perf_counter() - start, time.process_time() - used
status = open("/proc/self/status").read()  # ru_maxrss would start at the parent's
print(seconds, used, int(status.split("VmHWM:")[1].split()[0]) / 1024)
"""


class Amounts(NamedTuple):
    """Megabytes of text, and the number of runs."""

    full_mb: int = 256  # for the C code
    some_mb: int = 32  # for its fallback in Python, and of random text
    loop_mb: int = 16  # for the plain loops
    memory_mb: tuple[int, ...] = (8, 32, 128)
    copies: int = 64  # of PART_MB, in a zstd file; fewer in the slower formats
    repeats: int = 3


SHORT = Amounts(64, 8, 8, (8, 32), 32, 1)


class Cost(NamedTuple):
    """Wall and CPU seconds of a command without the start of the interpreter, and its peak memory."""

    wall_s: float
    processor_s: float
    peak_mb: float


def _command(arguments: list[str], native: bool = True, repeats: int = 1) -> Cost:
    """Run a command ``repeats`` times, each in a process of its own, and return the best results."""
    command = [sys.executable, "-c", _RUN, *arguments]
    environment = {**os.environ, "LAPSE_ELMO_NATIVE": str(int(native))}
    costs = []
    for _ in range(repeats):
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT)
        costs.append([float(field) for field in done.stdout.split("\n")[-2].split()])
    return Cost(*np.min(costs, axis=0).tolist())


def _processor_s(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def _made_text(size: int) -> bytes:
    rng = np.random.default_rng(0)
    words = np.array([f"word{number}" for number in range(TYPES)])
    text = bytearray()
    while len(text) < size:
        numbers = np.minimum(rng.zipf(1.3, (4000, 25)) - 1, TYPES - 1)
        text += "".join(" ".join(row) + "\n" for row in words[numbers]).encode()
    return bytes(text)


def _text(paths: list[str]) -> bytes:
    return b"".join(block.data for part in split_into_chunks(find_texts(paths)) for block in read_blocks(part))


def _write(path: Path, text: bytes, size_mb: int) -> Path:
    """Write about ``size_mb`` of ``text``, repeated if it is shorter, in whole lines."""
    size = size_mb * _MB
    with open(path, "wb") as file:
        while file.tell() < size:
            rest = size - file.tell()
            file.write(text if len(text) <= rest else text[: text.index(b"\n", rest - 1) + 1])
    return path


def _count_plainly(path: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    with open(path, encoding="utf-8", newline="\n") as file:
        for line in file:
            for word in line.split():
                counts[word] = counts.get(word, 0) + 1
    return counts


def _encode_plainly(path: Path, ids: dict[str, int]) -> None:
    tokens, offsets = array.array("i"), array.array("q")
    with open(path, encoding="utf-8", newline="\n") as file:
        for line in file:
            for word in line.split():
                tokens.append(ids.get(word, 3))
            offsets.append(len(tokens))


def _line(what: str, size: float, cost: Cost, loop: float) -> None:
    rate = size / _MB / cost.processor_s
    print(
        f"| {what} | {size / _MB:.0f} | {rate:.0f} | {size / _MB / cost.wall_s:.0f} | {rate / loop:.1f} "
        f"| {cost.peak_mb:.0f} |",
        flush=True,
    )


def _speed(directory: Path, text: bytes, amounts: Amounts) -> None:
    part = _write(directory / "part", text, amounts.loop_mb)
    size = part.stat().st_size / _MB
    counting = max(size / _processor_s(lambda: _count_plainly(part)) for _ in range(amounts.repeats))
    ids = {word: number for number, word in enumerate(_count_plainly(part), start=4)}
    encoding = max(size / _processor_s(lambda: _encode_plainly(part, ids)) for _ in range(amounts.repeats))
    print(f"plain loops: {counting:.1f} MB/s counting, {encoding:.1f} MB/s encoding")
    print("| | MB | MB/s of processor time | MB/s by the clock | to the plain loop | peak MB |")
    print("|---|---|---|---|---|---|")
    for what, full_mb, native in (("C", amounts.full_mb, True), ("Python", amounts.some_mb, False)):
        full, heldout = _write(directory / "full", text, full_mb), _write(directory / "heldout", text, 1)
        vocab, shards = str(directory / "vocab"), str(directory / "shards")
        size = full.stat().st_size
        cost = _command(["vocab", str(full), "--output", vocab, "--overwrite"], native, amounts.repeats)
        _line(f"`vocab`, {what}", size, cost, counting)
        arguments = ["shards", str(full), "--heldout", str(heldout), "--vocab", vocab, "--output", shards]
        arguments.append("--overwrite")
        _line(f"`shards`, {what}", size, _command(arguments, native, amounts.repeats), encoding)


def _expand(path: Path) -> None:
    with open(path, "rb") as file, decompress(file, compression_of(str(path))) as stream:
        while stream.read(1 << 20):
            pass


def _count(path: Path) -> None:
    counter = new_word_counter()
    for chunk in split_into_chunks([str(path)]):
        for block in read_blocks(chunk):
            counter.count(block)


def _rates(function: Callable[[], object], size_mb: float) -> np.ndarray:
    """Return MB/s by the clock and of processor time of all threads."""
    start, used = time.perf_counter(), time.process_time()
    function()
    return size_mb / np.array([time.perf_counter() - start, time.process_time() - used])


def _compressed(directory: Path, text: bytes, amounts: Amounts) -> None:
    """Compare expanding alone with expanding and counting, as ``vocab`` does, without what it does once per run."""
    part = _write(directory / "plain", text, PART_MB).read_bytes()
    print("MB/s of text, by the clock and of processor time")
    print("| format | MB | expanding alone | expanding and counting | share | counting alone |")
    print("|---|---|---|---|---|---|")
    for name, fewer, compress in (
        ("gzip", 2, gzip.compress), ("zstd", 1, zstd.compress), ("xz", 4, lzma.compress), ("bzip2", 16, bz2.compress)
    ):
        copies = amounts.copies // fewer
        path, plain, size = directory / name, directory / "plain", copies * len(part) / _MB
        path.write_bytes(copies * compress(part))  # frames one after another are one text
        plain.write_bytes(copies * part)
        work = [partial(_expand, path), partial(_count, path), partial(_count, plain)]
        turns = [[_rates(function, size) for function in work] for _ in range(amounts.repeats)]
        alone, both, counting = np.max(turns, axis=0)
        share = " / ".join(f"{ratio:.0%}" for ratio in np.median([turn[1] / turn[0] for turn in turns], axis=0))
        cells = [f"{wall:.0f} / {processor:.0f}" for wall, processor in (alone, both, counting)]
        print(f"| {name} | {size:.0f} | {cells[0]} | {cells[1]} | {share} | {cells[2]} |", flush=True)


def _memory(directory: Path, text: bytes, amounts: Amounts) -> None:
    print(f"interpreter and imports: peak {_command([]).peak_mb:.0f} MB")
    heldout = _write(directory / "heldout", text, 1)
    for size in amounts.memory_mb:
        path = str(_write(directory / "text", text, size))
        vocab, shards = str(directory / "vocab"), str(directory / "shards")
        first = _command(["vocab", path, "--output", vocab, "--overwrite"])
        arguments = ["shards", path, "--heldout", str(heldout), "--vocab", vocab, "--output", shards, "--overwrite"]
        print(f"{size:4} MB: vocab peak {first.peak_mb:.0f} MB, shards peak {_command(arguments).peak_mb:.0f} MB")


def _vocabulary(directory: Path, amounts: Amounts) -> None:
    path = directory / "elmo.txt"
    Vocabulary.from_words(f"word{number}" for number in range(ELMO_LINES - 3)).save(path)
    seconds = []
    for _ in range(amounts.repeats):
        start = time.perf_counter()
        Vocabulary.load(path)
        seconds.append(time.perf_counter() - start)
    print(f"load a vocabulary of {ELMO_LINES:,} lines: {statistics.median(seconds):.2f} s")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", nargs="*", metavar="TEXT")
    parser.add_argument("--short", action="store_true", help="measure once, with less text")
    options = parser.parse_args()
    amounts = SHORT if options.short else Amounts()
    text = _text(options.texts) if options.texts else _made_text(amounts.some_mb * _MB)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        _vocabulary(directory, amounts)
        _speed(directory, text, amounts)
        _compressed(directory, text, amounts)
        _memory(directory, text, amounts)


if __name__ == "__main__":
    main()
