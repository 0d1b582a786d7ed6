"""Check the distribution of samples drawn through a server of several nodes: ``sampling_program.py NODES FOLDER``.

Seeds are fixed. A correct sampler violates a bound with the probability that :mod:`tests.ps.test_sampling` states.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from lapse_elmo.mpi.launch import launch
from lapse_elmo.mpi.world import World
from lapse_elmo.ps.embedded import EmbeddedServer
from lapse_elmo.ps.layout import Layout
from lapse_elmo.ps.sampling import POOL_REUSE, SCHEMES, SHARING, Distribution, Sampler
from tests import collective
from tests.ps.test_sampling import chi_square_is_plausible

ROWS, COUNT = 60, 6
LAW = Distribution("log-uniform", ROWS)
LAYOUT = Layout.of(("other", 7, 1), ("sampled", ROWS, 2))
SEGMENT = LAYOUT["sampled"]


class Laws:
    """Checks for all ranks together: counts are summed over the ranks that draw independently."""

    def __init__(self, world: World) -> None:
        self.world = world

    def checks(self) -> dict[str, Callable[[], None]]:
        own = [name for name in vars(Laws) if not name.startswith("_") and name not in ("checks", "law_of")]
        laws = {
            f"{scheme}, {'with' if again else 'without'} replacement, sharing {sharing}":
            partial(self.law_of, scheme, again, sharing)
            for scheme in SCHEMES for again in (True, False) for sharing in SHARING
        }
        return {**laws, **{name: getattr(self, name) for name in own}}

    def law_of(self, scheme: str, replacement: bool, sharing: str) -> None:
        """A sample of each pool follows the distribution, as a whole and in its first row; so does ``local``."""
        server = self._open(scheme, replacement, "replication", sharing)
        if scheme == "local":
            server.localize(SEGMENT.keys(np.arange(ROWS)))
        draws = self._draws(server, 400 * POOL_REUSE)[::POOL_REUSE]
        server.close()
        # Of ranks that draw the same rows, only one counts.
        leaders = {"none": range(self.world.size), "node": self.world.leaders, "job": [0]}[sharing]
        if self.world.rank not in leaders:
            draws = draws[:0]
        if replacement:
            self._follows(draws.ravel(), LAW.probabilities)
        elif scheme == "pool":  # a pool is shuffled: each row is in it as often as in the draws of the other schemes
            reference = Sampler(LAW, "naive", False, seed=17, worker=0)
            often = np.concatenate([reference.draw(number, COUNT) for number in range(2000)])
            expected = np.bincount(often, minlength=ROWS) / 2000
            inclusion = self._counts(draws.ravel()) / (400 * len(leaders))
            error = np.sqrt(expected * (1 - expected) * (1 / 2000 + 1 / (400 * len(leaders))))
            assert (np.abs(inclusion - expected) <= 4.5 * error + 1e-3).all()
        else:
            self._follows(draws[:, 0], LAW.probabilities)
            assert all(np.unique(rows).size == COUNT for rows in draws)

    def a_pool_is_used_a_number_of_times(self) -> None:
        server = self._open("pool", False, "adaptive")
        draws = np.sort(self._draws(server, 20 * POOL_REUSE), 1).reshape(20, POOL_REUSE, COUNT)
        server.close()
        assert (draws == draws[:, :1]).all()
        assert len({pool[0].tobytes() for pool in draws}) > 10

    def who_draws_alike(self) -> None:
        """All ranks, those of each node, or none draw the same rows, depending on ``sharing`` and the scheme."""
        for sharing in SHARING:
            for scheme in SCHEMES:
                server = self._open(scheme, False, "static" if scheme == "local" else "adaptive", sharing)
                everyone = self.world.allgather((self.world.node, self._draws(server, 6).tobytes()))
                server.close()
                if sharing == "none":
                    assert len({draws for _, draws in everyone}) == self.world.size
                else:
                    groups = self.world.num_nodes if sharing == "node" or scheme == "local" else 1
                    assert len({draws for _, draws in everyone}) == groups
                    assert len(set(everyone)) == self.world.num_nodes, "a node's ranks draw differently"

    def local_where_rows_are_at_their_homes(self) -> None:
        """A node draws from its own rows only, each in proportion to its probability."""
        for replacement in (True, False):
            server = self._open("local", replacement, "static")
            self._conditional_law(server, replacement)
            server.close()

    def local_where_rows_were_brought(self) -> None:
        """The same holds after moves: frequent rows to node 0, the others to the last node."""
        for replacement in (True, False):
            server = self._open("local", replacement, "relocation")
            self.world.barrier()
            if self.world.local_rank == 0:
                if self.world.node == 0:
                    server.localize(SEGMENT.keys(np.arange(12)))
                elif self.world.node == self.world.num_nodes - 1:
                    server.localize(SEGMENT.keys(np.arange(12, ROWS)))
            server.quiesce()
            expected = {0: np.arange(12), self.world.num_nodes - 1: np.arange(12, ROWS)}
            here = server.is_local("sampled")
            assert here is not None
            np.testing.assert_array_equal(np.flatnonzero(here), expected.get(self.world.node, np.arange(0)))
            if here.any():
                self._conditional_law(server, replacement)
            server.close()

    def local_with_too_few_rows(self) -> None:
        """If local rows are too few, all are taken, and the others are drawn in proportion to their probability."""
        server = self._open("local", False, "static")
        here = server.is_local("sampled")
        assert here is not None
        count = int(here.sum()) + 3
        draws = self._draws(server, 500, count)
        server.close()
        for rows in draws:
            assert np.unique(rows).size == count
            assert set(np.flatnonzero(here)) <= set(rows.tolist())
        far = draws[:, count - 3]  # the first row that is not local
        law = np.where(here, 0, LAW.probabilities)
        self._follows(far, law / law.sum(), together=False)

    def _conditional_law(self, server: EmbeddedServer, replacement: bool) -> None:
        here = server.is_local("sampled")
        assert here is not None
        draws = self._draws(server, 1500)
        assert here[draws].all(), "a row was drawn that is not local"
        law = np.where(here, LAW.probabilities, 0)
        self._follows(draws.ravel() if replacement else draws[:, 0], law / law.sum(), together=False)
        assert replacement or all(np.unique(rows).size == COUNT for rows in draws)

    def _open(self, scheme: str, replacement: bool, technique: str, sharing: str = "node") -> EmbeddedServer:
        world = self.world
        sampler = Sampler(LAW, scheme, replacement, seed=5, worker=world.rank, node=world.node, sharing=sharing)
        return EmbeddedServer(self.world, LAYOUT, ("sampled", sampler), technique=technique)

    def _draws(self, server: EmbeddedServer, number: int, count: int = COUNT) -> np.ndarray:
        """Return rows (number, count) as the server samples them, prepared a few clocks ahead."""
        draws = np.empty((number, count), np.int64)
        handles: list[int] = []
        for place in range(number):
            while len(handles) < min(4, number - place):
                handles.append(server.prepare_sample(count, server.clock, server.clock + 4))
            server.pull_sample(handles.pop(0), draws[place], None)
        return draws - SEGMENT.first_key

    def _counts(self, rows: np.ndarray) -> np.ndarray:
        """Return how often each row was drawn by all ranks."""
        return self.world.sum_(np.bincount(rows, minlength=ROWS).astype(np.float64))

    def _follows(self, rows: np.ndarray, law: np.ndarray, together: bool = True) -> None:
        """Check that counts, of all ranks or of this one, fit ``law``; rare rows are merged into one class."""
        counts = self._counts(rows) if together else np.bincount(rows, minlength=ROWS).astype(np.float64)
        expected = law * counts.sum()
        order = np.argsort(-expected)
        cells = np.searchsorted(np.cumsum(expected[order]), np.arange(1, counts.sum() // 20) * 20.0)
        starts = np.unique(np.concatenate([[0], cells[cells < np.count_nonzero(law) - 1]]))
        joined, fair = np.add.reduceat(counts[order], starts), np.add.reduceat(expected[order], starts)
        if fair[-1] <= 5:
            joined, fair = np.append(joined[:-2], joined[-2:].sum()), np.append(fair[:-2], fair[-2:].sum())
        assert chi_square_is_plausible(joined, fair), f"{joined} is not {fair.round(1)}"


def main(argv: list[str], join: Callable[[], World]) -> None:
    nodes, folder = argv
    world = join()
    world.split(int(nodes))
    collective.run(Laws(world).checks(), world, Path(folder))


if __name__ == "__main__":
    launch(main, sys.argv[1:], prog="sampling_program.py")
