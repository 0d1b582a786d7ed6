"""The ranks of tests/test_row_update.py: ``NODES FOLDER``."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lapse_elmo.mpi.launch import launch
from lapse_elmo.mpi.world import World
from lapse_elmo.ps.embedded import EmbeddedServer
from lapse_elmo.ps.layout import Layout
from lapse_elmo.ps.rules import Rule
from lapse_elmo.row_update import RowGradients, RowUpdate
from lapse_elmo.tables import RowTable
from tests import collective

ROWS, SIZE, RATE, SCALE = 300, 9, 0.2, 0.5
STEPS = 3


class Checks:
    """Checks that run on every rank. All parts of all ranks have one row in common; some have other rows."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.num_frequent, self.bf16, self.tolerance = 0, False, 1e-5

    def parts(self, rank: int, step: int, num_parts: int) -> list[RowGradients]:
        rng = np.random.default_rng((rank, step))
        parts = []
        for part in range(num_parts):
            keys = 5 + np.unique(np.append(rng.choice(ROWS, 20 * step + 7 * rank, replace=False), 7))
            values = torch.from_numpy(rng.normal(size=(keys.size, SIZE)).astype(np.float32))
            parts.append(RowGradients(keys, values, 1.0 + part))
        return parts

    def train(self, num_parts: int, *, shared: bool = True) -> torch.Tensor:
        """Return the rows after some steps; check the norms that the ranks return."""
        layout = Layout.of(("other", 5, 3), ("table", ROWS, SIZE, Rule("adagrad"), self.num_frequent))
        server = EmbeddedServer(self.world, layout, technique="relocation")
        table = RowTable(server, layout["table"], 1.0)
        table.initialise(self.world.rank, self.world.size, lambda first, end: torch.zeros(end - first, SIZE))
        server.quiesce()
        server.set_rate("table", RATE)
        update = RowUpdate(self.world, table, num_parts * ROWS, shared=shared, bf16=self.bf16)
        for step in range(1, STEPS + 1):
            update.put(self.parts(self.world.rank, step, num_parts))
            self.world.node_barrier()
            update.add_up()
            squares = self.world.gather_numbers(np.array([update.finish()])).sum()
            expected = sum(float(sums.square().sum()) for sums in self.sums(step, num_parts, shared))
            assert squares == pytest.approx(expected, rel=self.tolerance)
            for turn in range(self.world.size):  # in the order of ranks, so that the result is known
                if turn == self.world.rank:
                    update.push(SCALE)
                self.world.barrier()
        server.quiesce()
        rows = table.read(0, ROWS)
        server.barrier()
        server.close()
        return rows

    def sums(self, step: int, num_parts: int, shared: bool) -> list[torch.Tensor]:
        """Return the sums (ROWS, SIZE) of each node, or of each rank, but those for frequent rows over all nodes."""
        groups = self.world.allgather((self.world.node if shared else self.world.rank, self.world.rank))
        sums = {group: torch.zeros(ROWS, SIZE, dtype=torch.float64) for group, _ in groups}
        for group, rank in groups:
            for part in self.parts(rank, step, num_parts):
                sums[group][torch.from_numpy(part.keys - 5)] += part.factor * part.values
        found = [sums[group] for group in sorted(sums)]
        frequent = sum(found, torch.zeros(ROWS, SIZE, dtype=torch.float64))
        frequent[self.num_frequent :] = 0
        for one in found:
            one[: self.num_frequent] = 0
        return [frequent, *found]

    def check(self, num_parts: int, *, shared: bool = True) -> None:
        weights, state = torch.zeros(ROWS, SIZE, dtype=torch.float64), torch.ones(ROWS, SIZE, dtype=torch.float64)
        for step in range(1, STEPS + 1):
            for sums in self.sums(step, num_parts, shared):
                state += (SCALE * sums).square()
                weights -= RATE * SCALE * sums / (state.sqrt() + 1e-7)
        found = self.train(num_parts, shared=shared)
        expected, tolerance = torch.cat([weights, state], 1), self.tolerance
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)

    def one_step_per_row_and_node(self) -> None:
        self.check(1)

    def parts_are_added_up(self) -> None:
        self.check(3)

    def ranks_on_their_own(self) -> None:
        """Updates are right if ranks share no rows, as with the native packages."""
        self.check(2, shared=False)

    def frequent_rows(self) -> None:
        """Updates are right if some rows, all rows, or fewer rows than ranks are frequent."""
        for number in (100, ROWS, 2):
            self.num_frequent = number
            self.check(2)
        self.num_frequent = 0

    def frequent_rows_in_bfloat16(self) -> None:
        """Gradients lose at most 2^-8 of their size in each of two roundings, and updates of up to 0.2 as much."""
        self.num_frequent = 100
        exact = self.train(2)
        self.bf16, self.tolerance = True, 1e-2
        self.check(2)
        rounded = self.train(2)
        assert torch.equal(rounded[100:], exact[100:])
        assert torch.equal(rounded, exact) == (self.world.num_nodes == 1)
        self.num_frequent, self.bf16, self.tolerance = 0, False, 1e-5

    def equal_bits(self) -> None:
        assert torch.equal(self.train(2), self.train(2))


def names() -> list[str]:
    return [
        "one_step_per_row_and_node", "parts_are_added_up", "ranks_on_their_own", "frequent_rows",
        "frequent_rows_in_bfloat16", "equal_bits",
    ]


def main(argv: list[str], enter: Callable[[], World]) -> None:
    collective.run_on_nodes(argv, enter, Checks, names())


if __name__ == "__main__":
    launch(main, sys.argv[1:], prog="row_update_program")
