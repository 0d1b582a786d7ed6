"""Situations that once hung, stalled or leaked, on 2 nodes of 2 ranks: ``liveness_program.py NODES FOLDER``.

The ranks of each machine are split into NODES nodes: 2 on one machine, 1 on two. Ranks 0 and 2 run the managers of the
nodes; ranks 1 and 3 are workers only.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from lapse_elmo.mpi.launch import launch
from lapse_elmo.mpi.world import World
from lapse_elmo.ps.embedded import EmbeddedServer
from lapse_elmo.ps.layout import Layout
from lapse_elmo.ps.ring import RING_BYTES
from tests import collective

RANKS, NODES = 4, 2
LONG, WIDE = 2_000_000, 20_000  # rows
LAYOUT = Layout.of(("long", LONG, 1), ("wide", WIDE, 8))
CALM_S = 5.0  # limit for twenty steps that take milliseconds, on a busy machine
STALL_S, COMPUTES_S, ATTEMPTS = 0.5, 1.5, 3
ARRIVAL_S = 20.0
MOST_SENDS, MOST_SENT_BYTES, MOST_GROWTH_BYTES = 8, 1 << 20, 8 << 20


class Liveness:
    """Each check gets a new server of two nodes whose rows are all 0."""

    def __init__(self, world: World) -> None:
        self.world = world

    def checks(self) -> dict[str, Callable[[], None]]:
        return {name: partial(self._with_server, name) for name in NAMES}

    def _with_server(self, name: str) -> None:
        server = EmbeddedServer(self.world, LAYOUT, technique="adaptive")
        self.world.barrier()
        getattr(self, name)(server)
        server.close()

    def large_intents_do_not_hang(self, server: EmbeddedServer) -> None:
        """A worker that announces 64 KB of rows and advances its clock, which needs its manager, does not hang."""
        own = self._rows_at_home("long", 8000)
        start = time.monotonic()
        for clock in range(20):
            if self.world.local_rank:
                server.intent(own, clock + 1, clock + 2)
            server.advance_clock()
        assert time.monotonic() - start < CALM_S

    def a_worker_that_computes_stalls_nobody(self, server: EmbeddedServer) -> None:
        """A worker that announces 64 KB of rows and then computes without calling MPI delays no pull of rank 2.

        The shortest of a few attempts counts, since a busy machine may stop any process for a while.
        """
        own = self._rows_at_home("long", 8192)
        far, out = self._rows_elsewhere("long", 64), np.empty((64, 1), np.float32)
        server.pull(far, out)
        longest_s = []
        for attempt in range(ATTEMPTS):
            self.world.barrier()
            if self.world.rank == 1:
                time.sleep(0.2)
                server.intent(own, attempt + 1, attempt + 2)
                time.sleep(COMPUTES_S)
            if self.world.rank == 2:
                longest_s.append(_longest_s(lambda: server.pull(far, out), 0.2 + COMPUTES_S))
            worst_s = self.world.bcast(longest_s[-1] if longest_s else 0.0, root=2)
            if worst_s < STALL_S:
                return
        raise AssertionError(f"the longest pull of each attempt: {longest_s} s")

    def local_steps_hold_nothing(self, server: EmbeddedServer) -> None:
        """Steps whose rows are all local, with intents of 72 KB, leave no pending sends and no allocated memory."""
        own = self._rows_at_home("wide", 9000)
        self._take_steps(server, own, 400)

    def far_steps_hold_nothing(self, server: EmbeddedServer) -> None:
        """Steps whose rows are all on the other node, without intents, leave neither either."""
        self._take_steps(server, self._rows_elsewhere("wide", 500), 100, announced=False)

    def _take_steps(self, server: EmbeddedServer, keys: np.ndarray, number: int, announced: bool = True) -> None:
        out = np.empty((keys.size, 8), np.float32)
        early_bytes = 0
        for clock in range(number):
            if announced:
                server.intent(keys, clock + 1, clock + 2)
            server.pull(keys, out)
            server.push(keys, np.ones_like(out))
            self.world.gather_numbers(np.zeros(6))
            server.advance_clock()
            if clock == number // 4:
                early_bytes = _resident_bytes()
        grown_bytes = _resident_bytes() - early_bytes
        assert grown_bytes < MOST_GROWTH_BYTES, f"{grown_bytes} bytes more than after a quarter of the steps"
        transports = [server._requests.mailbox.transport]
        if server._manager is not None:
            transports.append(server._manager.mailbox.transport)
        for transport in transports:
            held = [block.nbytes for _, block, _ in transport._sends]  # type: ignore[attr-defined]
            assert len(held) <= MOST_SENDS and sum(held) <= MOST_SENT_BYTES, held
        assert not server._calls

    def replicas_are_equal_to_the_bit(self, server: EmbeddedServer) -> None:
        """After a quiesce replicas equal their main copies to the bit, though the sums depend on the order.

        All nodes push floats to one half of the rows; only the replicas' holder pushes to the other half. Once, a
        holder never got back its own pushes as the owner had added them, in another order.
        """
        keys, rng = LAYOUT["wide"].keys(np.arange(0, 4000, 2)), np.random.default_rng(self.world.rank)
        out = np.empty((keys.size, 8), np.float32)
        if self.world.rank == 0:
            server.set(keys, rng.normal(size=out.shape).astype(np.float32))
        server.quiesce()
        server.intent(keys, 0, 10_000)
        deadline = time.monotonic() + ARRIVAL_S
        while not self._here(server, "wide", keys):
            assert time.monotonic() < deadline, "the rows are not on both nodes"
            time.sleep(0.01)
        for _ in range(20):
            for _ in range(3):
                pushed = keys if self.world.node else keys[: keys.size // 2]
                server.push(pushed, rng.normal(size=(pushed.size, 8)).astype(np.float32))
            server.advance_clock()
        server.quiesce()
        server.pull(keys, out)
        assert np.unique(out).size > out.size // 2
        for values in self.world.allgather(out):
            np.testing.assert_array_equal(values, out)

    def a_full_ring_is_waited_for(self, server: EmbeddedServer) -> None:
        """Workers announce 8 times what a ring can hold while their managers are busy: all of it arrives."""
        if server._manager is not None:
            step = server._manager.step

            def slow_step() -> bool:
                time.sleep(0.02)
                return step()

            server._manager.step = slow_step  # type: ignore[method-assign]
        refused = 0
        if self.world.local_rank:
            ring = server._requests._ring
            write = ring.try_write

            def counted(block: np.ndarray) -> bool:
                nonlocal refused
                written = write(block)
                refused += not written
                return written

            ring.try_write = counted  # type: ignore[method-assign]
            rows = self._rows_elsewhere("long", 8 * RING_BYTES // 8)
            server.intent(rows, 0, 10)
            assert refused, "the ring was never full"
            deadline = time.monotonic() + ARRIVAL_S
            while not self._here(server, "long", rows):
                assert time.monotonic() < deadline, "announced rows have not arrived"
                time.sleep(0.02)
        self.world.barrier()

    def _rows_at_home(self, segment: str, number: int) -> np.ndarray:
        """Return keys (number,) whose home is this node; consecutive rows have alternating homes."""
        return LAYOUT[segment].keys(np.arange(number) * NODES + self.world.node)

    def _rows_elsewhere(self, segment: str, number: int) -> np.ndarray:
        return LAYOUT[segment].keys(np.arange(number) * NODES + 1 - self.world.node)

    def _here(self, server: EmbeddedServer, segment: str, keys: np.ndarray) -> bool:
        here = server.is_local(segment)
        assert here is not None
        return bool(here[keys - LAYOUT[segment].first_key].all())


NAMES = [name for name in vars(Liveness) if not name.startswith("_") and name != "checks"]


def _longest_s(call: Callable[[], None], seconds: float) -> float:
    """Return the duration of the longest call among those made within ``seconds``."""
    longest_s, end = 0.0, time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        call()
        longest_s = max(longest_s, time.perf_counter() - start)
    return longest_s


def _resident_bytes() -> int:
    """Return this process's own memory; shared pages count for the process that touches them first."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) << 10


def main(argv: list[str], join: Callable[[], World]) -> None:
    nodes, folder = argv
    world = join()
    if int(nodes) > 1:
        world.split(int(nodes))
    assert (world.size, world.num_nodes) == (RANKS, NODES)
    collective.run(Liveness(world).checks(), world, Path(folder))


if __name__ == "__main__":
    launch(main, sys.argv[1:], prog="liveness_program.py")
