"""Compare techniques and sampling schemes by training: ``python -m benchmarks.techniques [OPTION ...]``.

Each row of the table is a run of ``bin/train`` on several nodes of this machine, with the same seed, steps and
sentences; the first row of each number of nodes has the same ranks on one node. Fractions and rates are those of the
steps after the first report. Each row that a step pulls or pushes is counted each time.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapse_elmo.config.cli import option, parse
from lapse_elmo.config.training import DEFAULT_SHARDS, DEFAULT_VOCAB

ROOT = Path(__file__).resolve().parent.parent
TECHNIQUES = ("static", "relocation", "replication", "adaptive")
SCHEMES = ("naive", "preloc", "pool", "local")
SEGMENTS = ("embedding", "softmax")
# Only speed counts here; at the default learning rate many nodes diverge with full batches from the first step.
FULL_BATCHES = ("--first-batch", "0", "--learning-rate", "0.02")
_REPORTS = 5


@dataclass(frozen=True)
class TechniquesOptions:
    """The options of the benchmark."""

    shards: str = option(DEFAULT_SHARDS, metavar="DIR", help="directory of the training and held-out shards")
    vocab: str = option(DEFAULT_VOCAB, metavar="FILE", help="vocabulary that the shards were made with")
    nodes: tuple[int, ...] = option((2, 4), metavar="N", help="numbers of nodes")
    ranks: int = option(1, metavar="N", help="ranks per node")
    max_steps: int = option(60, metavar="N", help="steps of each run")
    techniques: tuple[str, ...] = option(TECHNIQUES, metavar="NAME", help="techniques to compare")
    schemes: tuple[str, ...] = option(SCHEMES, metavar="NAME", help="sampling schemes to compare")


def train(options: TechniquesOptions, nodes: int, own: Sequence[str]) -> list[dict[str, Any]]:
    """Train, and return the records of the run's metrics."""
    with tempfile.TemporaryDirectory() as folder:
        command = [f"{sys.prefix}/bin/mpirun", "-n", str(options.ranks * nodes), "bin/train", "--run-dir", folder]
        corpus = ["--shards", options.shards, "--vocab", options.vocab, "--epochs", "1000", *FULL_BATCHES]
        steps = ["--max-steps", str(options.max_steps), "--report-every", str(max(1, options.max_steps // _REPORTS))]
        done = subprocess.run([*command, *corpus, *steps, *own], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr}")
        return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def row_of(records: list[dict[str, Any]]) -> str:
    """Format columns: local fraction, MB and waiting fraction per step, seconds per step, tokens/s, perplexity."""
    reports = [record for record in records if record["kind"] == "train"]
    reports = reports[1:] or reports

    def mean(name: str) -> float:
        return statistics.mean(float(record.get(name, 0.0)) for record in reports)

    rows = {name: mean(f"server/{name}_pulled_rows") + mean(f"server/{name}_pushed_rows") for name in SEGMENTS}
    total = sum(rows.values())
    share = sum(rows[name] * mean(f"server/{name}_local_share") for name in SEGMENTS) / total if total else 1.0
    megabytes = sum(mean(f"server/{name}_sent_bytes") for name in SEGMENTS) / 1e6
    wait_s = mean("server/clock_wait_s") + sum(mean(f"server/{name}_wait_s") for name in SEGMENTS)
    phases = {name for record in reports for name in record if name.startswith("step/")}
    step_s = sum(mean(name) for name in phases)
    (perplexity,) = [r["heldout/mean_perplexity"] for r in records if "heldout/mean_perplexity" in r][-1:]
    cells = [f"{share:.1%}", f"{megabytes:.1f}", f"{wait_s / step_s:.1%}", f"{step_s:.2f}"]
    return " | ".join([*cells, f"{mean('train/tokens_per_s'):,.0f}", f"{perplexity:.1f}"])


def main(argv: list[str]) -> None:
    """Print the table."""
    cut = argv.index("--") if "--" in argv else len(argv)
    options = parse(
        TechniquesOptions, argv[:cut], prog="python -m benchmarks.techniques",
        description="Compare techniques and sampling schemes by training; options of bin/train can follow after --.",
    )
    heads = [
        "nodes", "technique", "scheme", "local rows", "MB per step", "waiting", "step (s)", "tokens/s", "perplexity",
    ]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|", flush=True)
    for nodes in options.nodes:
        cells = row_of(train(options, nodes, argv[cut + 1 :]))
        print(f"| 1, {options.ranks * nodes} ranks | | preloc | {cells} |", flush=True)
        for technique, scheme in itertools.product(options.techniques, options.schemes):
            own = ["--nodes", str(nodes), "--technique", technique, "--sampling-scheme", scheme]
            own += ["--frequent-rows", "0", *argv[cut + 1 :]]  # else the server would not move most of the rows
            print(f"| {nodes} | {technique} | {scheme} | {row_of(train(options, nodes, own))} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
