"""Speed and memory of preprocessing: a vocabulary of ELMo's size, and ``vocab`` and ``shards`` on growing text.

Run ``python benchmarks/preprocess.py``. Memory must not grow with the text, only with the vocabulary.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lapse_elmo.corpus.vocabulary import Vocabulary  # noqa: E402

ELMO_LINES = 793_471
TYPES = 50_000
SIZES_MB = (8, 32, 96)
REPEATS = 3

# Peak memory is of a whole process, so each run is one; the interpreter's own part shows in the first line.
_RUN = """
import sys, time
sys.path.insert(0, sys.argv[1])
from lapse_elmo.world import solo
from preprocess.cli import main
start = time.perf_counter()
if len(sys.argv) > 2:
    main(sys.argv[2:], solo)
seconds = time.perf_counter() - start
status = open("/proc/self/status").read()  # ru_maxrss would start at the parent's
print(seconds, status.split("VmHWM:")[1].split()[0])
"""


def _measure(arguments: list[str]) -> tuple[float, float]:
    """(seconds, peak MB) of one command in a process of its own."""
    command = [sys.executable, "-c", _RUN, str(ROOT), *arguments]
    seconds, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[-2].split()
    return float(seconds), int(peak) / 1024


def _write_text(path: Path, size_mb: int) -> None:
    rng = np.random.default_rng(0)
    words = np.array([f"word{number}" for number in range(TYPES)])
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < size_mb << 20:
            numbers = np.minimum(rng.zipf(1.3, (4000, 25)) - 1, TYPES - 1)
            file.writelines(" ".join(row) + "\n" for row in words[numbers])


def _vocabulary(directory: Path) -> None:
    path = directory / "elmo.txt"
    Vocabulary.from_words(f"word{number}" for number in range(ELMO_LINES - 3)).save(path)
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        Vocabulary.load(path)
        seconds.append(time.perf_counter() - start)
    print(f"load a vocabulary of {ELMO_LINES:,} lines: {statistics.median(seconds):.2f} s")


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        _vocabulary(directory)
        print(f"interpreter and imports: peak {_measure([])[1]:.0f} MB")
        heldout = directory / "heldout.txt"
        _write_text(heldout, 1)
        for size in SIZES_MB:
            text, vocab, shards = (str(directory / f"{kind}{size}") for kind in ("text", "vocab", "shards"))
            _write_text(Path(text), size)
            seconds, peak = _measure(["vocab", text, "--output", vocab])
            print(f"vocab,  {size:4} MB: {size / seconds:6.1f} MB/s, peak {peak:.0f} MB")
            seconds, peak = _measure(["shards", text, "--heldout", str(heldout), "--vocab", vocab, "--output", shards])
            print(f"shards, {size:4} MB: {size / seconds:6.1f} MB/s, peak {peak:.0f} MB")


if __name__ == "__main__":
    main()
