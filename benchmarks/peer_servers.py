"""Measure the packages lapse and adapm: ``mpirun -n 2 python -m benchmarks.peer_servers lapse|adapm``.

Two ranks of one machine are two nodes. A call concerns 8,192 distinct rows of 1 KiB. The results are million rows per
second: of rank 0 while the other rank waits, and the mean of both ranks while both work. Rows are local because they
were localized (Lapse) or announced (AdaPM) before, and remote because the other node has them. The same run measures
the same rows with bare memory operations and bare MPI. If a package is not installed, the benchmark says so and ends.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from lapse_elmo.errors import ConfigError
from lapse_elmo.mpi.launch import launch
from lapse_elmo.mpi.world import World
from lapse_elmo.ps.api import ParameterServer
from lapse_elmo.ps.engines import make_server
from lapse_elmo.ps.layout import Layout

PACKAGES = ("lapse", "adapm")
_ROWS, _WIDTH, _KEYS, _REPEATS = 65_536, 256, 8_192, 3
_CALLS = 4  # per repeat: the number of blocks of each rank


class Bench:
    """Measures one package, and prints each result at once."""

    def __init__(self, world: World, server: ParameterServer) -> None:
        self.world = world
        self.server = server
        self.values = torch.ones(_KEYS, _WIDTH)
        # The rows (blocks, keys), ascending within a block. `bring` moves block b to rank b % size.
        self.blocks = np.random.default_rng(1).permutation(_ROWS)[: _ROWS // _KEYS * _KEYS].reshape(-1, _KEYS)
        self.blocks.sort(axis=1)

    def bring(self) -> None:
        """Move every second block of rows to each rank, for the following clocks (collective)."""
        server = self.server
        mine = np.concatenate(self.blocks[self.world.rank :: self.world.size])
        server.quiesce()
        server.localize(mine)
        server.quiesce()
        server.advance_clock()  # ends all announcements of the rows

    def near(self) -> np.ndarray:
        """Return the blocks that are on this rank, (n, keys)."""
        return self.blocks[self.world.rank :: self.world.size]

    def far(self) -> np.ndarray:
        """Return the blocks that are on the other rank, (n, keys)."""
        return self.blocks[(self.world.rank + 1) % self.world.size :: self.world.size]

    def measure(self, name: str, call: Callable[[np.ndarray], object], blocks: np.ndarray, *, alone: bool) -> None:
        """Median over repeats of calls with one block after another; ``alone``: rank 0's, while the others wait."""
        rates = []
        for repeat in range(_REPEATS + 1):
            self.world.barrier()
            if alone and self.world.rank:
                continue
            start = time.perf_counter()
            for number in range(_CALLS):
                call(blocks[(repeat * _CALLS + number) % len(blocks)])
            rates.append(_CALLS * _KEYS / (time.perf_counter() - start))
        self._show(name, rates)

    def _show(self, name: str, rates: list[float]) -> None:
        """Print the mean of the ranks that worked, without the first repeat (collective)."""
        medians = self.world.allgather(statistics.median(rates[1:]) if rates else None)
        if self.world.rank == 0:
            worked = [median for median in medians if median is not None]
            print(f"  {name:28} {statistics.mean(worked) / 1e6:6.2f}", flush=True)

    def measure_moves(self, name: str, move: Callable[[np.ndarray], object], *, alone: bool) -> None:
        """Measure calls that move remote rows here. Each block moves once per repeat; :meth:`bring` moves it back."""
        rates = []
        for _ in range(_REPEATS + 1):
            self.bring()
            self.world.barrier()
            if not alone or self.world.rank == 0:
                blocks = self.far()[:_CALLS]
                start = time.perf_counter()
                for block in blocks:
                    move(block)
                rates.append(len(blocks) * _KEYS / (time.perf_counter() - start))
            self.world.barrier()
        self._show(name, rates)

    def run(self) -> None:
        """Measure all operations of the package (collective)."""
        server, values = self.server, self.values
        for alone, suffix in ((True, ""), (False, ", both")):
            self.bring()
            before = server.stats.segments["rows"].remote_pulled_rows
            self.measure("local pull" + suffix, lambda keys: server.pull(keys, values), self.near(), alone=alone)
            assert server.stats.segments["rows"].remote_pulled_rows == before, "rows that were brought are not here"
            self.measure("local push" + suffix, lambda keys: server.push(keys, values), self.near(), alone=alone)
            self.measure("remote pull" + suffix, lambda keys: server.pull(keys, values), self.far(), alone=alone)
            self.measure("remote push" + suffix, lambda keys: server.push(keys, values), self.far(), alone=alone)
            self.measure_moves("localize" + suffix, server.localize, alone=alone)

    def floors(self) -> None:
        """Measure bare memory operations, and an MPI exchange of the bytes of a remote pull."""
        table, values = torch.zeros(_ROWS, _WIDTH), self.values
        out = torch.empty(_KEYS, _WIDTH)
        for alone, suffix in ((True, ""), (False, ", both")):
            self.measure(
                "bare index_select" + suffix,
                lambda keys: torch.index_select(table, 0, torch.from_numpy(keys), out=out), self.near(), alone=alone,
            )
            self.measure(
                "bare index_add_" + suffix, lambda keys: table.index_add_(0, torch.from_numpy(keys), values),
                self.near(), alone=alone,
            )
        if self.world.size > 1:
            self.measure("bare Alltoallv, both", self._exchange, self.far(), alone=False)
            self.measure("bare Alltoallv, one way", self._send, self.far(), alone=False)

    def _exchange(self, keys: np.ndarray, *, both: bool = True) -> None:
        """Exchange keys for rows by Alltoallv: for both ranks, or for rank 0 alone."""
        from mpi4py import MPI

        comm, other = self.world.comm, (self.world.rank + 1) % self.world.size
        assert comm is not None
        asks, answers = both or self.world.rank == 0, both or self.world.rank != 0
        sent, got = np.zeros(comm.size, np.int64), np.zeros(comm.size, np.int64)
        sent[other], got[other] = keys.size * asks, keys.size * answers
        asked = np.empty(int(got.sum()), np.int64)
        comm.Alltoallv([keys[: sent.sum()], sent, None, MPI.INT64_T], [asked, got, None, MPI.INT64_T])
        rows = self.values.numpy()[: asked.size]
        out = np.empty((int(sent.sum()), _WIDTH), np.float32)
        comm.Alltoallv([rows, got * _WIDTH, None, MPI.FLOAT], [out, sent * _WIDTH, None, MPI.FLOAT])

    def _send(self, keys: np.ndarray) -> None:
        self._exchange(keys, both=False)


def main(argv: list[str], enter: Callable[[], World]) -> None:
    """Run the benchmark on one rank."""
    world = enter()
    package = argv[0] if argv else ""
    if package not in PACKAGES:
        raise ConfigError(f"the package is {package!r}, expected one of {', '.join(PACKAGES)}").on_every_rank()
    if importlib.util.find_spec(package) is None:
        if world.rank == 0:
            print(f"the package {package} is not installed: nothing to measure")
        return
    torch.set_num_threads(1)
    if world.rank == 0:
        print(f"{package}, {world.size} nodes of one rank: million rows/s per rank", flush=True)
    server = make_server(package, world, Layout.of(("rows", _ROWS, _WIDTH)))
    bench = Bench(world, server)
    bench.floors()
    bench.run()
    server.close()


if __name__ == "__main__":
    launch(main, sys.argv[1:], prog="benchmarks.peer_servers")
