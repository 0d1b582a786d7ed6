"""Count what a training step costs the server on many nodes, with the real code on a simulated network.

``python -m benchmarks.scale [--nodes 4 16 64] [--workers 32]``. Rows have the width of the ``original`` sizes. The sums
of the frequent rows' gradients count as sent, as by a ring, and as no transmission. A line of the table takes about a
minute for 16 nodes, and about ten minutes and 12 GB of memory for 64.
"""

from __future__ import annotations

import argparse
import dataclasses

from lapse_elmo.frequent_rows import frequent_in
from lapse_elmo.node_sums import sum_bytes
from tests.simulator.scale import Counts, Workload, count

_HEADER = (
    "| nodes | accumulators | transmissions / node | rows / message | MB sent | KB / token | manager s | remote rows "
    "| bookkeeping, B / class |"
)


def line(workload: Workload, counts: Counts, accumulators: str) -> str:
    """Return a row of the table, per step and node."""
    return (
        f"| {workload.num_nodes} | {accumulators} | {counts.transmissions / workload.num_nodes:.2f} x nodes "
        f"| {counts.rows_per_message:.0f} | {counts.sent_bytes / 1e6:.0f} | {counts.bytes_per_token / 1e3:.2f} "
        f"| {counts.manager_s:.3f} | {counts.remote_share:.1%} "
        f"| {counts.bookkeeping_bytes / workload.num_classes:.0f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--workers", type=int, default=32, help="workers per node")
    parser.add_argument("--classes", type=int, default=793_471)
    parser.add_argument("--own-samples", action="store_true", help="workers of a node do not share negative samples")
    parser.add_argument("--accumulators", choices=("element", "row"), default="element")
    parser.add_argument("--no-frequent-rows", action="store_true", help="the server moves all rows")
    options = parser.parse_args()
    print(_HEADER)
    print("|---|" + "---|" * 8)
    for nodes in options.nodes:
        workload = Workload(
            nodes, options.workers, options.classes, share_samples=not options.own_samples,
            row_floats=1026 if options.accumulators == "element" else 514,
        )
        if not options.no_frequent_rows:
            workload = dataclasses.replace(workload, frequent=frequent_in(workload.use))
        counts = count(workload)
        summed = sum_bytes(workload.weights * sum(workload.frequent), nodes)
        counts.sent_bytes += summed
        counts.bytes_per_token += summed / (workload.num_tokens * workload.workers_per_node)
        print(line(workload, counts, options.accumulators), flush=True)


if __name__ == "__main__":
    main()
