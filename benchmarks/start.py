"""Seconds from starting ``bin/train`` to its first finished step: ``python -m benchmarks.start [RANKS ...]``.

Uses the shards and vocabulary of the default place (``make train`` builds them). Each figure is the median of three
starts, after one that is thrown away.
"""

from __future__ import annotations

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
    """Seconds of one start."""
    with tempfile.TemporaryDirectory() as folder:
        command = [f"{sys.prefix}/bin/mpirun", "-n", str(ranks), "bin/train", "--run-dir", folder, "--max-steps", "1"]
        begin = time.time()
        subprocess.run([*command, "--report-every", "1", *options], cwd=ROOT, check=True, capture_output=True)
        records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return float(next(r["time_s"] for r in records if r["kind"] == "train")) - begin


def main(argv: list[str]) -> None:
    print("ranks  LSTM      first step after (s)")
    for ranks in map(int, argv or ["1", "2"]):
        for lstm in ("fused", "allennlp"):
            times = [start_s(ranks, "--lstm", lstm) for _ in range(_REPEATS + 1)][1:]
            print(f"{ranks:5}  {lstm:8}  {statistics.median(times):.1f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
