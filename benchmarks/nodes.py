"""Train with the same ranks as 1, 2, 4, ... nodes: ``python -m benchmarks.nodes [OPTION ...] [-- OPTION ...]``.

Measures what it costs if rows are not in one shared memory. Each row of the table is a run of ``bin/train`` with full
batches from the first step (``--first-batch 0``); fractions and rates are those of the steps after the first report.
Speeds are medians of several rounds, since the speed of a machine varies.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass

from benchmarks.techniques import TechniquesOptions, row_of, train
from lapse_elmo.config.cli import option, parse
from lapse_elmo.config.training import DEFAULT_SHARDS, DEFAULT_VOCAB


@dataclass(frozen=True)
class NodesOptions:
    """The options of the benchmark."""

    shards: str = option(DEFAULT_SHARDS, metavar="DIR", help="directory of the training and held-out shards")
    vocab: str = option(DEFAULT_VOCAB, metavar="FILE", help="vocabulary that the shards were made with")
    ranks: int = option(16, metavar="N", help="total number of ranks")
    nodes: tuple[int, ...] = option((1, 2, 4, 8, 16), metavar="N", help="numbers of nodes to split them into")
    max_steps: int = option(10, metavar="N", help="steps of each run")
    rounds: int = option(3, metavar="N", help="number of runs of each")


def main(argv: list[str]) -> None:
    """Print the table."""
    cut = argv.index("--") if "--" in argv else len(argv)
    options = parse(
        NodesOptions, argv[:cut], prog="python -m benchmarks.nodes",
        description="Train with the same ranks as several numbers of nodes; options of bin/train can follow after --.",
    )
    cells: dict[int, list[list[str]]] = {nodes: [] for nodes in options.nodes}
    for _ in range(options.rounds):
        for nodes in options.nodes:
            each = TechniquesOptions(options.shards, options.vocab, (nodes,), options.ranks // nodes, options.max_steps)
            own = ["--nodes", str(nodes), *argv[cut + 1 :]]
            cells[nodes].append(row_of(train(each, nodes, own)).split(" | "))
    print("| nodes | local rows | MB per step | waiting | tokens/s | of the first row | tokens/s of each run |")
    print("|---" * 7 + "|")
    first = 0.0
    for nodes, runs in cells.items():
        speeds = [float(run[4].replace(",", "")) for run in runs]
        speed = statistics.median(speeds)
        first = first or speed
        each_speed = ", ".join(f"{s:,.0f}" for s in speeds)
        share = f"{speed:,.0f} | {speed / first:.0%}"
        print(f"| {nodes} | {runs[-1][0]} | {runs[-1][1]} | {runs[-1][2]} | {share} | {each_speed} |")


if __name__ == "__main__":
    main(sys.argv[1:])
