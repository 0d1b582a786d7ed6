"""The embedded server against bare memory and bare messages: ``mpirun -n 2 python -m benchmarks.server [--nodes 2]``.

Rows a second in calls of 8,192 distinct rows of 1 KiB, each figure beside that of the bare operation, the two by turns.

On one node the floor is torch's ``index_select`` into a preallocated buffer, respectively an unguarded ``index_add_``,
on the same memory, all ranks at once. On several nodes each rank has a partner on another one: rows are pulled from,
pushed to and localized from there, by one rank alone and by all at once. The floor is what the same keys and rows take
through ``Alltoallv``, where nothing is looked up, copied or added. Between the two stands a bare stream: the copies and
additions that the server has to make, message by message, and nothing else.
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
from lapse_elmo.ps.wire import pieces

if TYPE_CHECKING:
    from mpi4py import MPI

WIDTH = 256  # 1 KiB
LAYOUT = Layout.of(("rows", 200_000, WIDTH))
NUM_KEYS = 8_192
PIECES = list(pieces(NUM_KEYS, WIDTH))  # of a stream, as the server sends them

Step = Callable[[int, slice, np.ndarray], None]  # number of the call, which of its rows, a block of their values


@dataclass(frozen=True)
class ServerOptions:
    """What is measured, and how often."""

    nodes: int = option(1, metavar="N", help="split the ranks into so many nodes, and measure between them")
    calls: int = option(10, metavar="N", help="calls of a repeat, which are timed together")
    repeats: int = option(7, metavar="N", help="repeats, after one that is thrown away; the median is shown")


@dataclass(frozen=True)
class Operation:
    """``run(number)`` handles 8,192 rows; ``before`` is called ahead of each repeat and not timed."""

    run: Callable[[int], object]
    before: Callable[[], object] = lambda: None


def measure(operations: Mapping[str, Operation], world: World, options: ServerOptions) -> dict[str, float]:
    """This rank's rows a second: the median over repeats, in which the operations take turns. Collective."""
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
    """Calls on rows of the own node, and the same on bare memory."""
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
    """Calls of the ``active`` ranks on rows of their partners' nodes; in what is collective all ranks take part."""

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
        """Keys go, rows come."""
        ask = self._exchange(8 * NUM_KEYS, self.is_active, self.partner_is_active)
        answer = self._exchange(4 * WIDTH * NUM_KEYS, self.partner_is_active, self.is_active)
        return Operation(lambda _: (ask(), answer()))

    def bare_push(self) -> Operation:
        """Keys and rows go."""
        send = self._exchange((8 + 4 * WIDTH) * NUM_KEYS, self.is_active, self.partner_is_active)
        return Operation(lambda _: send())

    def streams(self, verb: str) -> Operation:
        """The copies and additions of a ``verb``, and the rows' way from the one to the other."""
        rows = self.server._rows["rows"]
        values = self.values.numpy()

        def gather(number: int, piece: slice, block: np.ndarray) -> None:
            rows.pull(self.asked[number][piece], block)

        def copy(_: int, piece: slice, block: np.ndarray) -> None:
            block[:] = values[piece]

        def nothing(_: int, __: slice, ___: np.ndarray) -> None:
            """The rows have been received where they belong."""

        def add(number: int, piece: slice, block: np.ndarray) -> None:
            rows.push(self.asked[number][piece], block)

        def put(number: int, piece: slice, block: np.ndarray) -> None:
            place = self.asked[number][piece]  # as if these had just come
            rows.put(place, rows.slots[place].astype(np.int64), block, as_replica=False)

        if verb == "push":
            return Operation(self._stream(copy, add, self.is_active, self.partner_is_active))
        use, into = (nothing, values) if verb == "pull" else (put, None)
        stream = self._stream(gather, use, self.partner_is_active, self.is_active, into)
        return Operation(stream, self._bring_home if verb == "localize" else lambda: None)

    def _stream(
        self, fill: Step, use: Step, sends: bool, receives: bool, into: np.ndarray | None = None
    ) -> Callable[[int], None]:
        """Send blocks that ``fill`` fills, and receive blocks (or into ``into``) that ``use`` uses."""
        blocks, more = np.ones((2, 2, PIECES[0].stop, WIDTH), np.float32)

        def run(number: int) -> None:
            sent: list[MPI.Request] = []
            for turn, piece in enumerate(PIECES):
                if sends:
                    if turn > 1:
                        sent[turn - 2].Wait()
                    fill(number, piece, blocks[turn % 2])
                    sent.append(self.comm.Isend(blocks[turn % 2], self.partner))
                if receives:
                    block = more[0] if into is None else into[piece]
                    self.comm.Recv(block, self.partner)
                    use(number, piece, block)
            for request in sent[-2:]:
                request.Wait()

        return run

    def pull(self) -> Operation:
        return self._if_active(lambda number: self.server.pull(self.keys[number], self.values))

    def push(self) -> Operation:
        return self._if_active(lambda number: self.server.push(self.keys[number], self.values))

    def localize(self) -> Operation:
        """All rows start at their homes."""
        operation = self._if_active(lambda number: self.server.localize(self.keys[number]))
        return Operation(operation.run, self._bring_home)

    def _bring_home(self) -> None:
        self.world.barrier()
        self.server.localize(self.own)
        self.server.quiesce()

    def _if_active(self, call: Callable[[int], object]) -> Operation:
        return Operation(call if self.is_active else lambda _: None)

    def _exchange(self, num_bytes: int, sends: bool, receives: bool) -> Callable[[], None]:
        """``num_bytes`` to and from the partner, or nothing, by Alltoallv."""
        out, into = np.ones(num_bytes * sends, np.uint8), np.ones(num_bytes * receives, np.uint8)
        out_counts, into_counts = [0] * self.world.size, [0] * self.world.size
        out_counts[self.partner], into_counts[self.partner] = out.size, into.size
        start = [0] * self.world.size
        return lambda: self.comm.Alltoallv([out, (out_counts, start), "B"], [into, (into_counts, start), "B"])


def show(title: str, figures: list[dict[str, float]], floors: Mapping[str, str]) -> None:
    """Print the means over ranks, and each as a share of the operation that ``floors`` names for it."""
    print(f"{title}: million rows/s a rank, and share of the bare operation")
    for name in figures[0]:
        rate, floor = (statistics.mean(rank[key] for rank in figures) for key in (name, floors.get(name, name)))
        print(f"  {name:24} {rate / 1e6:6.2f}  {rate / floor:5.0%}", flush=True)


def measure_local(world: World, options: ServerOptions) -> None:
    server = EmbeddedServer(world, LAYOUT)
    everyone = world.allgather(measure(local_operations(server, world), world, options))
    if world.rank == 0:
        kind = "native" if server.is_native else "without native code"
        floors = {"pull": "index_select", "push": "index_add_ (unguarded)"}
        floors |= {f"{name}, shuffled keys": floor for name, floor in floors.items()}
        show(f"one node, {world.size} ranks at once, {kind}", everyone, floors)
    server.close()


def measure_remote(world: World, options: ServerOptions) -> None:
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
            if "localize" in verbs:  # the floor taken beside it, under a name of its own
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
    options = parse(
        ServerOptions, argv, prog="python -m benchmarks.server", description="Time the server against bare operations."
    )
    world = enter()
    torch.set_num_threads(1)
    if options.nodes > 1:
        world.split(options.nodes)
        if world.size % 2 or options.calls * NUM_KEYS * world.size > LAYOUT.num_keys:
            raise ConfigError("between nodes an even number of ranks is measured, with rows enough for --calls of each")
        measure_remote(world, options)
    else:
        measure_local(world, options)


if __name__ == "__main__":
    launch(main, sys.argv[1:], prog="benchmarks.server")
