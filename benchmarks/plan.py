"""Compare plans with measured runs: ``python -m benchmarks.plan [OPTION ...] [-- OPTION ...]``.

For each number of nodes and each link, hosts are emulated on this machine by network namespaces whose links are shaped
(tests/hosts.py; needs root). bin/train runs on them, with full batches from the first step, and its speed after the
first report is compared with that of ``--plan-nodes``. The plan's trial starts as many ranks as the run has, on one
node, so that both share the processors of this machine alike. Options of bin/train can follow after ``--``.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lapse_elmo.config.cli import option, parse
from lapse_elmo.config.training import DEFAULT_SHARDS, DEFAULT_VOCAB
from tests.hosts import ENVIRONMENT, Link, cannot_delay, switched_hosts, why_not
from tests.mpi import mpirun

_REPORTS = 6  # of a measured run; the first is left out
_LIMIT_S = 3600


@dataclass(frozen=True)
class PlanOptions:
    """The options of the benchmark."""

    shards: str = option(DEFAULT_SHARDS, metavar="DIR", help="directory of the training and held-out shards")
    vocab: str = option(DEFAULT_VOCAB, metavar="FILE", help="vocabulary that the shards were made with")
    nodes: tuple[int, ...] = option((1, 2, 4), metavar="N", help="numbers of nodes")
    ranks: int = option(1, metavar="N", help="ranks per node")
    gbit: tuple[float, ...] = option((1.0, 10.0, 100.0), metavar="X", help="bandwidths of a node's link, in Gbit/s")
    latency_us: tuple[float, ...] = option((10.0, 1000.0), metavar="X", help="latencies between nodes, in microseconds")
    max_steps: int = option(60, metavar="N", help="steps of each measured run")
    rounds: int = option(3, metavar="N", help="plans and runs of each; medians are compared")


@dataclass(frozen=True)
class Speed:
    """Of a plan or of a run: words per second of all ranks, and MB of rows that a node sends per step."""

    tokens_per_s: float
    row_mb: float


def median(speeds: Sequence[Speed]) -> Speed:
    """Return the medians."""
    return Speed(
        statistics.median(speed.tokens_per_s for speed in speeds), statistics.median(speed.row_mb for speed in speeds)
    )


def plan(options: PlanOptions, nodes: int, link: Link, own: Sequence[str]) -> Speed:
    """Return what ``--plan-nodes`` says."""
    words = [
        *_training(options, own), "--plan-nodes", str(nodes), "--plan-ranks", str(options.ranks), "--network-gbit",
        str(link.gbit), "--network-us", str(link.latency_us),
    ]
    job = mpirun(options.ranks * nodes, words, timeout=_LIMIT_S)
    speed = re.search(r"^  ([\d,]+) tokens/s", job.stdout, re.MULTILINE)
    sent = re.search(r"move ([\d.]+), updates of replicas ([\d.]+), refreshed replicas ([\d.]+)", job.stdout)
    if job.returncode or not speed or not sent:
        sys.exit(f"the plan failed: {job.output}")
    return Speed(float(speed[1].replace(",", "")), sum(map(float, sent.groups())))


def run(options: PlanOptions, nodes: int, link: Link, own: Sequence[str]) -> Speed:
    """Train on emulated hosts; return the means after the first report."""
    with tempfile.TemporaryDirectory() as folder:
        every = str(max(1, options.max_steps // _REPORTS))
        steps = ["--max-steps", str(options.max_steps), "--report-every", every, "--epochs", "1000"]
        words = [*_training(options, own), "--run-dir", f"{folder}/run", "--first-batch", "0", *steps]
        if nodes == 1:
            job = mpirun(options.ranks, words, timeout=_LIMIT_S)
        else:
            with switched_hosts(nodes, options.ranks, link) as hosts:
                job = mpirun(
                    options.ranks * nodes, words, timeout=_LIMIT_S, launcher=hosts.launcher, env=ENVIRONMENT,
                    fork=False,
                )
        if job.returncode:
            sys.exit(f"the run failed: {job.output}")
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    reports = [line for line in lines if line["kind"] == "train"][1:]
    sent = sum(line.get(f"server/{name}_sent_bytes", 0.0) for name in ("embedding", "softmax") for line in reports)
    speed = statistics.mean(float(line["train/tokens_per_s"]) for line in reports)
    return Speed(speed, sent / len(reports) / nodes / 1e6)


def _training(options: PlanOptions, own: Sequence[str]) -> list[str]:
    return ["bin/train", "--shards", options.shards, "--vocab", options.vocab, *own]


def main(argv: list[str]) -> None:
    """Print the table."""
    cut = argv.index("--") if "--" in argv else len(argv)
    options = parse(
        PlanOptions, argv[:cut], prog="python -m benchmarks.plan",
        description="Compare plans with measured runs on emulated hosts; options of bin/train can follow after --.",
    )
    if reason := why_not():
        sys.exit(f"no hosts can be emulated here: {reason}")
    latencies, own = options.latency_us, argv[cut + 1 :]
    if reason := cannot_delay():
        print(f"without latencies: {reason}", flush=True)
        latencies = (0.0,)
    print("| nodes | Gbit/s | us | planned tokens/s | measured | error | planned MB of rows per step | measured |")
    print("|---" * 8 + "|", flush=True)
    for nodes, gbit, latency in itertools.product(options.nodes, options.gbit, latencies):
        if nodes == 1 and (gbit, latency) != (options.gbit[0], latencies[0]):
            continue  # one node uses no link
        link = Link(gbit, latency)
        # Plans and runs take turns, so that other load on the machine affects both alike.
        turns = [(plan(options, nodes, link, own), run(options, nodes, link, own)) for _ in range(options.rounds)]
        planned, measured = (median(speeds) for speeds in zip(*turns, strict=True))
        error = planned.tokens_per_s / measured.tokens_per_s - 1
        speeds = f"{planned.tokens_per_s:,.0f} | {measured.tokens_per_s:,.0f} | {error:+.0%}"
        rows = f"{planned.row_mb:.2f} | {measured.row_mb:.2f}"
        print(f"| {nodes} | {gbit:g} | {latency:g} | {speeds} | {rows} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
