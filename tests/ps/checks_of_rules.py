"""Contract checks for update rules: a push carries gradients, and the server takes the steps."""

from __future__ import annotations

import numpy as np

from lapse_elmo.mpi.world import World
from lapse_elmo.ps.api import ParameterServer
from lapse_elmo.ps.layout import Segment
from tests.ps.layout import LAYOUT, every_key, ones, pulled

RULED = ("adagrad", "per row", "descent")  # the segments that have a rule
_PUSHES = 30


def whole_rows(server: ParameterServer, segment: Segment) -> np.ndarray:
    out = np.full((segment.num_rows, segment.row_width), np.nan, np.float32)
    server.pull_rows(segment.keys(np.arange(segment.num_rows)), out)
    return out


class Rules:
    """Each check gets a new server whose rows, accumulators included, are all 0."""

    world: World

    def pulls_are_weights_alone(self, server: ParameterServer) -> None:
        """A pull returns weights only; ``set`` and ``pull_rows`` take and return whole rows."""
        for segment in (LAYOUT[name] for name in RULED):
            values = np.arange(segment.num_rows * segment.row_width, dtype=np.float32).reshape(segment.num_rows, -1)
            mine = np.arange(self.world.rank, segment.num_rows, self.world.size)
            server.set(segment.keys(mine), values[mine])
            server.quiesce()
            np.testing.assert_array_equal(whole_rows(server, segment), values)
            rows = self._rng().integers(0, segment.num_rows, 70)
            np.testing.assert_array_equal(pulled(server, segment.keys(rows)), values[rows, : segment.width])
            out = np.empty((rows.size, segment.row_width), np.float32)
            server.pull_rows(segment.keys(rows), out)
            np.testing.assert_array_equal(out, values[rows])

    def hot_rows_make_right_steps(self, server: ParameterServer) -> None:
        """All ranks push to the same row at once; in any order, accumulators are the exact sums of squares."""
        for name in ("adagrad", "per row"):
            segment, total = LAYOUT[name], _PUSHES * self.world.size
            assert segment.rule is not None
            key, gradient = every_key(name)[3:4], 2.0
            server.set_rate(name, 0.5)
            self.world.barrier()
            for _ in range(_PUSHES):
                server.push(key, ones(key, gradient))
            server.quiesce()
            row = whole_rows(server, segment)[3]
            assert (row[segment.width :] == gradient**2 * total).all()
            self._seen_alike(row)
            steps = 0.5 * gradient / (gradient * np.sqrt(np.arange(1, total + 1)) + segment.rule.epsilon)
            if self._steps_are_in_turn:  # each step uses the accumulators that the earlier ones have left
                np.testing.assert_allclose(row[: segment.width], -steps.sum(), rtol=1e-5)
            else:
                assert (row[: segment.width] <= -steps.sum() * (1 - 1e-5)).all()  # no accumulator exceeds the final one
            server.quiesce()

    def steps_while_rows_move(self, server: ParameterServer) -> None:
        """No step is lost while all ranks localize, announce and push to the same rows, with repeats."""
        for name in ("adagrad", "per row"):
            segment, rng = LAYOUT[name], self._rng()
            squares = np.zeros(segment.num_rows)
            server.set_rate(name, 0.5)
            for clock in range(server.clock, server.clock + 25):
                some = rng.integers(0, segment.num_rows, 20)
                gradients = rng.integers(-3, 4, (20, 1)).astype(np.float32)
                server.intent(segment.keys(some), clock, clock + 2)
                server.localize(segment.keys(some[:5]))
                server.push(segment.keys(some), gradients.repeat(segment.width, 1))
                np.add.at(squares, some, gradients[:, 0] ** 2)
                rows = pulled(server, segment.keys(some))
                assert (rows == rows[:, :1]).all(), "half a step was seen"
                server.advance_clock()
            server.quiesce()
            total = np.sum(self.world.allgather(squares), 0)
            rows = whole_rows(server, segment)
            np.testing.assert_array_equal(rows[:, segment.width :], np.repeat(
                total[:, None], segment.row_width - segment.width, 1
            ))
            self._seen_alike(rows)
            server.quiesce()

    def rates_are_the_workers_own(self, server: ParameterServer) -> None:
        """Each worker has its own rate and may change it from push to push; powers of two keep the sums exact."""
        keys = every_key("descent")
        for turn in range(6):
            server.set_rate("descent", 2.0 ** (self.world.rank - turn))
            server.push(keys[turn:], ones(keys[turn:]))
        server.quiesce()
        expected = np.zeros((keys.size, 2))
        for turn in range(6):
            expected[turn:] -= sum(2.0 ** (rank - turn) for rank in range(self.world.size))
        np.testing.assert_array_equal(pulled(server, keys), expected)

    def pulls_see_own_steps(self, server: ParameterServer) -> None:
        """A worker sees its own steps at once, also with asynchronous calls."""
        key, out = every_key("adagrad")[[self.world.rank]], np.empty((1, 5), np.float32)
        server.set_rate("adagrad", 1.0)
        expected = np.float64(0)
        for count in range(1, 21):
            server.wait(server.push_async(key, ones(key)))
            expected -= 1 / (np.sqrt(count) + 0.5)
            server.wait(server.pull_async(key, out))
            np.testing.assert_allclose(out, np.full((1, 5), expected), rtol=1e-5)

    def a_push_carries_gradients_alone(self, server: ParameterServer) -> None:
        """A push transfers gradients and a pull weights, not whole rows. (The packages transfer whole rows.)"""
        keys, stats = every_key("adagrad")[:7], server.stats.segments["adagrad"]
        server.set_rate("adagrad", 1.0)
        pushed, got = stats.pushed_bytes, stats.pulled_bytes
        server.push(keys, ones(keys))
        pulled(server, keys)
        assert (stats.pushed_bytes - pushed, stats.pulled_bytes - got) == (7 * 20, 7 * 20)

    def _seen_alike(self, rows: np.ndarray) -> None:
        """All ranks have the same rows, up to rounding: an owner and a replica's holder add in different orders."""
        for values in self.world.allgather(rows):
            np.testing.assert_allclose(values, rows, rtol=1e-5, atol=1e-6)

    def _rng(self) -> np.random.Generator:
        return np.random.default_rng(self.world.rank)

    @property
    def _steps_are_in_turn(self) -> bool:
        raise NotImplementedError
