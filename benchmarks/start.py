"""Measure the time from starting ``bin/train`` to its first step: ``python -m benchmarks.start [RANKS ...]``.

Uses the default shards and vocabulary (``make train`` makes them). Each result is the median of three starts, after one
that is discarded.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_REPEATS = 3


def start_s(ranks: int, *options: str) -> float:
    """Measure the seconds of one start; the run is stopped as soon as its first step is in the metrics."""
    with tempfile.TemporaryDirectory() as folder:
        command = [f"{sys.prefix}/bin/mpirun", "-n", str(ranks), "bin/train", "--run-dir", folder, "--progress", "none"]
        begin = time.time()
        command += ["--report-every", "1", *options]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
            while (step_s := _first_step(Path(folder) / "metrics.jsonl")) is None:
                if run.poll() is not None:
                    sys.exit(f"{' '.join(command)} ended with status {run.returncode} before its first step")
                time.sleep(0.1)
            run.terminate()
    return step_s - begin


def _first_step(metrics: Path) -> float | None:
    """Return the time at which the first step was reported, or None."""
    with contextlib.suppress(FileNotFoundError):
        for line in metrics.read_text().splitlines(keepends=True):
            if line.endswith("\n") and (record := json.loads(line))["kind"] == "train":
                return float(record["time_s"])
    return None


def main(argv: list[str]) -> None:
    """Print the table."""
    print("ranks  LSTM      first step after (s)")
    for ranks in map(int, argv or ["1", "2"]):
        for lstm in ("fused", "allennlp"):
            times = [start_s(ranks, "--lstm", lstm) for _ in range(_REPEATS + 1)][1:]
            print(f"{ranks:5}  {lstm:8}  {statistics.median(times):.1f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
