"""Contract checks for asynchronous calls, and for a server that closes while some are pending."""

from __future__ import annotations

import time

import numpy as np
import pytest

from lapse_elmo.errors import ServerError
from lapse_elmo.mpi.world import World
from lapse_elmo.ps.api import DONE, ParameterServer
from tests.ps.layout import LAYOUT, WIDTH, every_key, ones, pulled

_ARRIVAL_S = 10.0


class Tickets:
    """Each check gets a new server whose rows are all 0."""

    world: World

    def tickets_in_any_order(self, server: ParameterServer) -> None:
        """Pending pulls, pushes and localizes of few and many rows may be waited for in any order."""
        segment, rng = LAYOUT["long"], np.random.default_rng(self.world.rank)
        fixed = np.arange(15000, dtype=np.float32).reshape(5000, 3)[:3000]
        if self.world.rank == 0:
            server.set(segment.keys(np.arange(3000)), fixed)
        server.quiesce()
        pushed = np.zeros(2000)
        for _ in range(6):
            tickets, outs = [], []
            for size in rng.permutation([1, 3, 40, 700, 2500]).tolist():
                rows = rng.integers(0, 3000, size)
                outs.append((rows, np.full((size, 3), np.nan, np.float32)))
                tickets.append(server.pull_async(segment.keys(rows), outs[-1][1]))
                rows = rng.integers(0, 2000, size)
                tickets.append(server.push_async(segment.keys(rows + 3000), np.ones((size, 3), np.float32)))
                np.add.at(pushed, rows, 1)
                tickets.append(server.localize_async(segment.keys(rng.integers(0, 5000, size))))
            for place in rng.permutation(len(tickets)):
                server.wait(tickets[place])
            for rows, out in outs:
                np.testing.assert_array_equal(out, fixed[rows])
        total = np.sum(self.world.allgather(pushed), 0)
        server.quiesce()
        np.testing.assert_array_equal(pulled(server, segment.keys(np.arange(3000, 5000)))[:, 0], total)

    def wait_all_completes_everything(self, server: ParameterServer) -> None:
        keys = every_key("long")[:500]
        mine = keys[self.world.rank :: self.world.size].copy()
        out = np.full((mine.size, 3), np.nan, np.float32)
        server.push_async(mine, ones(mine, 4))
        server.wait_all()
        server.localize_async(keys)
        server.pull_async(mine, out)
        server.wait_all()
        server.wait_all()
        assert (out == 4).all()

    def tickets_serve_once(self, server: ParameterServer) -> None:
        """Unknown and used tickets are refused while other calls are pending; DONE may be waited for repeatedly."""
        keys = every_key("long")
        server.wait(DONE)
        for number in (10**6, -2, 2**40):
            with pytest.raises(ServerError, match=rf"^ticket: {number} was never given"):
                server.wait(number)
        ticket = server.push_async(keys, ones(keys))
        other = server.pull_async(keys, np.empty((keys.size, 3), np.float32))
        assert ticket != other or ticket == DONE
        server.wait(ticket)
        if ticket != DONE:  # in a world of one node every call completes at once
            with pytest.raises(ServerError, match=rf"^ticket: {ticket} "):
                server.wait(ticket)
        server.wait(other)
        server.quiesce()
        assert (pulled(server, keys) == self.world.size).all()

    def rows_pushed_from_a_refilled_buffer(self, server: ParameterServer) -> None:
        """The caller may overwrite keys and deltas while the push is still pending."""
        keys, deltas = every_key("wide")[:2].copy(), np.empty((2, WIDTH), np.float32)
        tickets = []
        for _ in range(25):
            keys[:] = every_key("wide")[:2]
            deltas[:] = 1
            tickets.append(server.push_async(keys, deltas))
            deltas[:] = 1000
            keys[:] = every_key("wide")[10]
        for ticket in tickets:
            server.wait(ticket)
        server.quiesce()
        assert (pulled(server, every_key("wide")[:2]) == 25 * self.world.size).all()
        assert not pulled(server, every_key("wide")[2:]).any()

    def later_calls_see_earlier_ones(self, server: ParameterServer) -> None:
        """A worker that waits for its newest push alone still sees the earlier ones."""
        keys = every_key("long")[self.world.rank : 900 : self.world.size].copy()
        tickets = [server.push_async(keys, ones(keys)) for _ in range(20)]
        for ticket in reversed(tickets):
            server.wait(ticket)
        assert (pulled(server, keys) == 20).all()

    def repeated_keys_in_calls_under_way(self, server: ParameterServer) -> None:
        key = every_key("long")[[self.world.rank, self.world.rank + self.world.size, self.world.rank]]
        keys = np.tile(key, 400)
        server.localize_async(keys)
        server.intent(keys, 0, 2)
        server.wait(server.push_async(keys, ones(keys)))
        out = np.empty((1200, 3), np.float32)
        server.wait(server.pull_async(keys, out))
        np.testing.assert_array_equal(out, np.tile([[800.0] * 3, [400.0] * 3, [800.0] * 3], (400, 1)))

    def pushes_arrive_unattended(self, server: ParameterServer) -> None:
        """A push that nobody waits for is applied while its worker does something else."""
        keys = every_key("long")[:50]
        ticket = server.push_async(keys, ones(keys)) if self.world.rank == 0 else DONE
        if self.world.rank == self.world.size - 1:
            deadline = time.monotonic() + _ARRIVAL_S
            while not (pulled(server, keys) == 1).all():
                assert time.monotonic() < deadline, "the push did not arrive"
                time.sleep(0.002)
        self.world.barrier()
        server.wait(ticket)

    def close_with_requests_in_flight(self, server: ParameterServer) -> None:
        """Closing does not hang, and requests sent just before it still arrive."""
        keys = every_key("long")
        out = np.full((keys.size, 3), np.nan, np.float32)
        server.prepare_sample(20, 0, 1)
        server.intent(keys, 0, 1)
        server.pull_async(keys, out)
        server.push_async(keys, ones(keys))
        server.localize_async(keys[:: self.world.rank + 1].copy())
        server.push_async(every_key("wide"), ones(every_key("wide")))
        server.intent(keys, 1, 100)
        server.close()
        assert np.isfinite(out).all(), "a pull under way was lost"
