"""Measure the speed of training by ranks and threads: ``python -m benchmarks.ranks [OPTION OF bin/train ...]``.

Prints words per second, without padding and boundaries, for several divisions of the same cores into ranks and threads:
with the fused LSTM, also in bfloat16 if the CPU supports it, and with AllenNLP's LSTM. Uses the default shards and
vocabulary (``make train`` makes them) unless options name others. The first steps of each run are discarded.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from lapse_elmo.model.products import cpu_multiplies_bf16
from lapse_elmo.mpi.host import usable_cores

ROOT = Path(__file__).resolve().parent.parent
_STEPS, _WARM_UP = 13, 3


def words_per_s(ranks: int, threads: int, *options: str) -> tuple[float, float]:
    """Train a few steps.

    Returns:
        The words per second of all ranks together, a mean over the steps, and the fraction of the time of a step that
        rank 0 computes.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [f"{sys.prefix}/bin/mpirun", "-n", str(ranks), "bin/train", "--run-dir", folder, "--overwrite"]
        command += ["--threads", str(threads), "--max-steps", str(_STEPS), "--report-every", "1", "--progress", "none"]
        command += ["--first-batch", "0"]  # full batches from the first step
        subprocess.run([*command, *options], cwd=ROOT, check=True, capture_output=True)
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"][_WARM_UP:]
    seconds = [sum(value for name, value in step.items() if name.startswith("step/")) for step in steps]
    compute = sum(step["step/compute_s"] for step in steps) / sum(seconds)
    return statistics.harmonic_mean([step["train/tokens_per_s"] for step in steps]), compute


def main(argv: list[str]) -> None:
    """Print the table."""
    cores = usable_cores()
    ways = sorted({(1, 1), (1, cores), (cores, 1), (max(cores // 2, 1), 2), (2 * cores, 1)})
    print(f"{cores} cores\nranks  threads  LSTM      precision  words/s  computing")
    for ranks, threads in ways:
        kinds = [("fused", "fp32")]
        if cpu_multiplies_bf16():
            kinds.append(("fused", "bf16"))
        if (ranks, threads) in ((1, 1), (cores, 1)):
            kinds.append(("allennlp", "fp32"))
        for lstm, precision in kinds:
            rate, compute = words_per_s(ranks, threads, "--lstm", lstm, "--precision", precision, *argv)
            print(f"{ranks:5}  {threads:7}  {lstm:8}  {precision:9}  {rate:7,.0f}  {compute:9.0%}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
