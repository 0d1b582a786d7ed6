"""Whole training steps by ``bin/train``: ``python -m benchmarks.ranks [TRAIN OPTION ...]``.

Words a second, padding and boundaries not counted, on the same cores divided into ranks and threads in several ways;
with the fused LSTM, in bfloat16 too where the processor multiplies it, and with AllenNLP's. Uses the shards and
vocabulary of the default place (``make train`` builds them) unless options say otherwise. The first steps of each run
are thrown away.
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
    """(mean over steps of all ranks' words a second, share of the step's time in computation on rank 0)."""
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
