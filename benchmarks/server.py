"""The embedded server against bare memory: ``mpirun -n RANKS python -m benchmarks.server``.

Rows a second of one call of 8,192 distinct rows of 1 KiB, all ranks at once; the floor is torch's ``index_select`` into
a preallocated buffer, respectively an unguarded ``index_add_``, on the same memory.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from lapse_elmo.ps.embedded import EmbeddedServer
from lapse_elmo.ps.layout import Layout
from lapse_elmo.world import World, launch

_ROWS, _WIDTH, _KEYS, _REPEATS, _CALLS = 200_000, 256, 8_192, 7, 10


def rows_per_s(call: Callable[[], None], world: World) -> float:
    """Median over repeats, of this rank."""
    rates = []
    for _ in range(_REPEATS + 1):
        world.barrier()
        start = time.perf_counter()
        for _ in range(_CALLS):
            call()
        rates.append(_KEYS * _CALLS / (time.perf_counter() - start))
    return statistics.median(rates[1:])


def main(argv: list[str], enter: Callable[[], World]) -> None:
    world = enter()
    torch.set_num_threads(1)
    server = EmbeddedServer(world, Layout.of(("rows", _ROWS, _WIDTH)))
    rng = np.random.default_rng(world.rank)
    keys = np.sort(rng.choice(_ROWS, _KEYS, replace=False))
    shuffled = rng.permutation(keys)
    rows = torch.from_numpy(keys)
    values, table = torch.ones(_KEYS, _WIDTH), torch.from_numpy(server._rows["rows"].main)

    def gather() -> None:
        torch.index_select(table, 0, rows, out=values)

    def add() -> None:
        table.index_add_(0, rows, values)

    table.zero_() if world.rank == 0 else None
    figures = {
        "index_select": rows_per_s(gather, world),
        "pull": rows_per_s(lambda: server.pull(keys, values), world),
        "pull, shuffled keys": rows_per_s(lambda: server.pull(shuffled, values), world),
        "index_add_ (unguarded)": rows_per_s(add, world),
        "push": rows_per_s(lambda: server.push(keys, values), world),
        "push, shuffled keys": rows_per_s(lambda: server.push(shuffled, values), world),
    }
    everyone = world.allgather(figures)
    if world.rank == 0:
        print(f"{world.size} ranks: million rows/s a rank, and share of the floor")
        for name in figures:
            floor = "index_select" if "pull" in name or "select" in name else "index_add_ (unguarded)"
            rate = statistics.mean(rank[name] for rank in everyone)
            share = rate / statistics.mean(rank[floor] for rank in everyone)
            print(f"  {name:24} {rate / 1e6:6.2f}  {share:5.0%}")
    server.close()


if __name__ == "__main__":
    launch(main, sys.argv[1:], prog="benchmarks.server")
