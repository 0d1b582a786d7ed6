"""Compare the embedded server with bare memory and MPI: ``mpirun -n 2 python -m benchmarks.server [--nodes 2]``.

Measures rows per second in calls of 8,192 distinct rows of 1 KiB. The server and the bare operation take turns.

On one node the bare operation is torch's ``index_select`` into a preallocated buffer, or ``index_add_`` without locks,
on the same memory, by all ranks at once. On several nodes each rank has a partner on another node: it pulls, pushes and
localizes rows of its partner's node, once while the other ranks wait and once while all work. The bare operation is an
``Alltoallv`` of the same keys and rows, without look-ups, copies and additions. In between is a stream: the copies and
additions that the server must make, message by message, and nothing else.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from lapse_elmo.config.cli import option, parse
from lapse_elmo.errors import ConfigError
from lapse_elmo.mpi.launch import launch
from lapse_elmo.mpi.world import World
from lapse_elmo.ps.embedded import EmbeddedServer
from lapse_elmo.ps.layout import Layout
from lapse_elmo.ps.wire import chunks

if TYPE_CHECKING:
    from mpi4py import MPI

WIDTH = 256  # 1 KiB
LAYOUT = Layout.of(("rows", 200_000, WIDTH))
NUM_KEYS = 8_192
CHUNKS = list(chunks(NUM_KEYS, WIDTH))  # of a stream, as the server sends them

Step = Callable[[int, slice, np.ndarray], None]  # number of the call, which of its rows, a block of their values


@dataclass(frozen=True)
class ServerOptions:
    """The options of the benchmark."""

    nodes: int = option(1, metavar="N", help="split the ranks into N nodes, and measure between nodes")
    calls: int = option(10, metavar="N", help="calls per repeat, which are timed together")
    repeats: int = option(7, metavar="N", help="repeats, after one that is discarded; the result is their median")


@dataclass(frozen=True)
class Operation:
    """An operation on 8,192 rows, ``run(number)``; ``before`` is called before each repeat and not timed."""

    run: Callable[[int], object]
    before: Callable[[], object] = lambda: None


def measure(operations: Mapping[str, Operation], world: World, options: ServerOptions) -> dict[str, float]:
    """Measure operations, which take turns (collective); returns this rank's rows per second, medians of repeats."""
    rates: dict[str, list[float]] = {name: [] for name in operations}
    for _ in range(options.repeats + 1):
        for name, operation in operations.items():
            operation.before()
            world.barrier()
            start = time.perf_counter()
            for number in range(options.calls):
                operation.run(number)
            rates[name].append(NUM_KEYS * options.calls / (time.perf_counter() - start))
    return {name: statistics.median(several[1:]) for name, several in rates.items()}


def local_operations(server: EmbeddedServer, world: World) -> dict[str, Operation]:
    """Return operations on rows of the same node: the server's, and those on bare memory."""
    rng = np.random.default_rng(world.rank)
    keys = np.sort(rng.choice(LAYOUT.num_keys, NUM_KEYS, replace=False))
    shuffled = rng.permutation(keys)
    table = torch.from_numpy(server._rows["rows"].main)
    slots = torch.from_numpy(server._rows["rows"].slots[keys].astype(np.int64))
    values = torch.ones(NUM_KEYS, WIDTH)
    return {
        "index_select": Operation(lambda _: torch.index_select(table, 0, slots, out=values)),
        "pull": Operation(lambda _: server.pull(keys, values)),
        "pull, shuffled keys": Operation(lambda _: server.pull(shuffled, values)),
        "index_add_ (unguarded)": Operation(lambda _: table.index_add_(0, slots, values)),
        "push": Operation(lambda _: server.push(keys, values)),
        "push, shuffled keys": Operation(lambda _: server.push(shuffled, values)),
    }


class Partners:
    """Operations of the ``active`` ranks on rows of their partners' nodes; all ranks take part in collective calls."""

    def __init__(self, server: EmbeddedServer, world: World, active: Sequence[int], calls: int) -> None:
        assert world.comm is not None
        self.server, self.world, self.comm = server, world, world.comm
        self.is_active = world.rank in active
        self.partner = (world.rank + world.size // 2) % world.size
        self.partner_is_active = self.partner in active
        homes = np.arange(LAYOUT.num_keys) % world.num_nodes
        nodes = world.allgather(world.node)
        assert nodes[self.partner] != world.node
        self.own = np.flatnonzero(homes == world.node)[world.local_rank :: world.local_size].copy()
        there = np.flatnonzero(homes == nodes[self.partner])[world.local_rank :: world.local_size]
        chosen = np.random.default_rng(world.rank).permutation(there)[: calls * NUM_KEYS]
        self.keys = [np.sort(part) for part in chosen.reshape(calls, NUM_KEYS)]
        self.asked = world.allgather(self.keys)[self.partner]
        self.values = torch.ones(NUM_KEYS, WIDTH)

    def bare_pull(self) -> Operation:
        """Return an operation that sends keys and receives rows."""
        ask = self._exchange(8 * NUM_KEYS, self.is_active, self.partner_is_active)
        answer = self._exchange(4 * WIDTH * NUM_KEYS, self.partner_is_active, self.is_active)
        return Operation(lambda _: (ask(), answer()))

    def bare_push(self) -> Operation:
        """Return an operation that sends keys and rows."""
        send = self._exchange((8 + 4 * WIDTH) * NUM_KEYS, self.is_active, self.partner_is_active)
        return Operation(lambda _: send())

    def streams(self, verb: str) -> Operation:
        """Return an operation that makes only the copies, transfers and additions of a ``verb``."""
        rows = self.server._rows["rows"]
        values = self.values.numpy()

        def gather(number: int, chunk: slice, block: np.ndarray) -> None:
            rows.pull(self.asked[number][chunk], block)

        def copy(_: int, chunk: slice, block: np.ndarray) -> None:
            block[:] = values[chunk]

        def nothing(_: int, __: slice, ___: np.ndarray) -> None:
            """Do nothing: the rows were received in place."""

        def add(number: int, chunk: slice, block: np.ndarray) -> None:
            rows.push(self.asked[number][chunk], block)

        def put(number: int, chunk: slice, block: np.ndarray) -> None:
            keys = self.asked[number][chunk]  # as if these rows had just arrived
            rows.put(keys, rows.slots[keys].astype(np.int64), block, as_replica=False)

        if verb == "push":
            return Operation(self._stream(copy, add, self.is_active, self.partner_is_active))
        use, into = (nothing, values) if verb == "pull" else (put, None)
        stream = self._stream(gather, use, self.partner_is_active, self.is_active, into)
        return Operation(stream, self._bring_home if verb == "localize" else lambda: None)

    def _stream(
        self, fill: Step, use: Step, sends: bool, receives: bool, into: np.ndarray | None = None
    ) -> Callable[[int], None]:
        """Return a call that sends blocks filled by ``fill``, and passes those received to ``use``."""
        blocks, more = np.ones((2, 2, CHUNKS[0].stop, WIDTH), np.float32)

        def run(number: int) -> None:
            sent: list[MPI.Request] = []
            for turn, chunk in enumerate(CHUNKS):
                if sends:
                    if turn > 1:
                        sent[turn - 2].Wait()
                    fill(number, chunk, blocks[turn % 2])
                    sent.append(self.comm.Isend(blocks[turn % 2], self.partner))
                if receives:
                    block = more[0] if into is None else into[chunk]
                    self.comm.Recv(block, self.partner)
                    use(number, chunk, block)
            for request in sent[-2:]:
                request.Wait()

        return run

    def pull(self) -> Operation:
        """Return the pull of the partner's rows."""
        return self._if_active(lambda number: self.server.pull(self.keys[number], self.values))

    def push(self) -> Operation:
        """Return the push to the partner's rows."""
        return self._if_active(lambda number: self.server.push(self.keys[number], self.values))

    def localize(self) -> Operation:
        """Return the localize of the partner's rows, all of which are at home before each repeat."""
        operation = self._if_active(lambda number: self.server.localize(self.keys[number]))
        return Operation(operation.run, self._bring_home)

    def _bring_home(self) -> None:
        self.world.barrier()
        self.server.localize(self.own)
        self.server.quiesce()

    def _if_active(self, call: Callable[[int], object]) -> Operation:
        return Operation(call if self.is_active else lambda _: None)

    def _exchange(self, num_bytes: int, sends: bool, receives: bool) -> Callable[[], None]:
        """Return an Alltoallv that sends ``num_bytes`` to the partner, receives as many from it, or both."""
        out, into = np.ones(num_bytes * sends, np.uint8), np.ones(num_bytes * receives, np.uint8)
        out_counts, into_counts = [0] * self.world.size, [0] * self.world.size
        out_counts[self.partner], into_counts[self.partner] = out.size, into.size
        start = [0] * self.world.size
        return lambda: self.comm.Alltoallv([out, (out_counts, start), "B"], [into, (into_counts, start), "B"])


def show(title: str, figures: list[dict[str, float]], floors: Mapping[str, str]) -> None:
    """Print the means over ranks, and each as a fraction of the bare operation that ``floors`` names for it."""
    print(f"{title}: million rows/s per rank, and fraction of the bare operation")
    for name in figures[0]:
        rate, floor = (statistics.mean(rank[key] for rank in figures) for key in (name, floors.get(name, name)))
        print(f"  {name:24} {rate / 1e6:6.2f}  {rate / floor:5.0%}", flush=True)


def measure_local(world: World, options: ServerOptions) -> None:
    """Measure operations on one node (collective)."""
    server = EmbeddedServer(world, LAYOUT)
    everyone = world.allgather(measure(local_operations(server, world), world, options))
    if world.rank == 0:
        kind = "native" if server.is_native else "without native code"
        floors = {"pull": "index_select", "push": "index_add_ (unguarded)"}
        floors |= {f"{name}, shuffled keys": floor for name, floor in floors.items()}
        show(f"one node, {world.size} ranks at once, {kind}", everyone, floors)
    server.close()


def measure_remote(world: World, options: ServerOptions) -> None:
    """Measure operations between nodes (collective)."""
    for active in ([0], list(range(world.size))):
        figures: dict[str, float] = {}
        for technique, verbs in (("static", ("pull", "push")), ("relocation", ("localize",))):
            server = EmbeddedServer(world, LAYOUT, technique=technique)
            partners = Partners(server, world, active, options.calls)
            operations = {"Alltoallv of a pull": partners.bare_pull()}
            if "push" in verbs:
                operations["Alltoallv of a push"] = partners.bare_push()
            operations |= {f"stream of a {verb}": partners.streams(verb) for verb in verbs}
            operations |= {verb: getattr(partners, verb)() for verb in verbs}
            taken = measure(operations, world, options)
            if "localize" in verbs:  # the bare operation measured together with it
                taken["Alltoallv of a localize"] = taken.pop("Alltoallv of a pull")
            figures |= taken
            server.close()
        everyone = world.allgather(figures)
        if world.rank == 0:
            floors = {verb: f"Alltoallv of a {verb}" for verb in ("pull", "push", "localize")}
            floors |= {f"stream of a {verb}": floor for verb, floor in floors.items()}
            who = "one rank alone" if len(active) == 1 else f"{world.size} ranks at once"
            kind = "native" if server.is_native else "without native code"
            show(f"{world.num_nodes} nodes, {who}, {kind}", [everyone[rank] for rank in active], floors)


def main(argv: list[str], enter: Callable[[], World]) -> None:
    """Run the benchmark on one rank."""
    options = parse(
        ServerOptions, argv, prog="python -m benchmarks.server", description="Time the server against bare operations."
    )
    world = enter()
    torch.set_num_threads(1)
    if options.nodes > 1:
        world.split(options.nodes)
        if world.size % 2 or options.calls * NUM_KEYS * world.size > LAYOUT.num_keys:
            raise ConfigError(
                f"{world.size} ranks with --calls {options.calls} cannot be measured between nodes, expected an even "
                f"number of ranks and at most {LAYOUT.num_keys:,} rows: give fewer --calls"
            )
        measure_remote(world, options)
    else:
        measure_local(world, options)


if __name__ == "__main__":
    launch(main, sys.argv[1:], prog="benchmarks.server")
