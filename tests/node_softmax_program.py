"""The ranks of tests/test_node_softmax.py: ``NODES FOLDER``."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lapse_elmo.model.full_softmax import full_softmax_nll
from lapse_elmo.mpi.launch import launch
from lapse_elmo.mpi.world import World
from lapse_elmo.node_softmax import NodeSoftmax, exchange
from lapse_elmo.ps.embedded import EmbeddedServer
from lapse_elmo.ps.layout import Layout
from lapse_elmo.tables import RowTable
from tests import collective

CLASSES, SIZE = 1000, 17
CPU = torch.device("cpu")


class Checks:
    """On every rank; rows are where a random localize has brought them."""

    def __init__(self, world: World) -> None:
        self.world = world
        layout = Layout.of(("other", 5, 3), ("softmax", CLASSES, SIZE))
        self.server = EmbeddedServer(world, layout, technique="relocation")
        self.table = RowTable(self.server, layout["softmax"], 1.0)
        self.table.initialise(world.rank, world.size, lambda first, end: values(end)[first:])
        self.server.quiesce()
        rows = np.random.default_rng(world.rank).choice(CLASSES, 200, replace=False)
        self.server.localize(layout["softmax"].keys(np.sort(rows)))
        self.server.quiesce()

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.world.rank)
        context = torch.randn(number, SIZE - 1, generator=generator)
        return context, torch.randint(CLASSES, (number,), generator=generator)

    def check(self, *numbers: int) -> None:
        """Two calls, whose ranks have ``numbers`` of vectors, in turn."""
        softmax = NodeSoftmax(self.table, self.world, CPU)
        for _ in range(2):
            context, target = self.batch(numbers[self.world.rank % len(numbers)])
            expected = full_softmax_nll(context, [(0, values(CLASSES))], target)
            torch.testing.assert_close(softmax.nll(context, target), expected, rtol=1e-6, atol=1e-6)

    def every_rank_has_as_many(self) -> None:
        self.check(40)

    def some_ranks_have_none(self) -> None:
        self.check(0, 7, 0, 1, 300)

    def no_rank_has_any(self) -> None:
        self.check(0)

    def one_rank_has_all(self) -> None:
        self.check(50, 0, 0, 0, 0)

    def an_array_for_several_ranks_is_not_copied(self) -> None:
        """What a rank sends takes memory once for any number of nodes, and arrives with the sender's other arrays."""
        ranks, size = range(self.world.size), 1 << 20
        large = np.full(size, self.world.rank, np.uint8)
        tracemalloc.start()
        received = exchange(self.world, dict.fromkeys(ranks, large))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < (self.world.size + 1.5) * size
        assert all(np.array_equal(received[rank], np.full(size, rank, np.uint8)) for rank in ranks)
        both = np.arange(3), np.array([self.world.rank])
        received = exchange(self.world, {rank: both[rank % 2] for rank in reversed(ranks)})
        expected = [np.array([rank]) if self.world.rank % 2 else both[0] for rank in ranks]
        assert all(np.array_equal(received[rank].view(np.int64), expected[rank]) for rank in ranks)

    def as_many_send_to_a_rank_as_is_said(self) -> None:
        """Nodes of three and two ranks: one of the latter receives from two of the former."""
        softmax = NodeSoftmax(self.table, self.world, CPU)
        receivers = [rank for partners in self.world.allgather(softmax._partners) for rank in partners]
        assert softmax.most_senders == np.bincount(receivers).max() == 3

    def close(self) -> None:
        self.server.close()


NAMES = [
    "every_rank_has_as_many", "some_ranks_have_none", "no_rank_has_any", "one_rank_has_all",
    "an_array_for_several_ranks_is_not_copied", "as_many_send_to_a_rank_as_is_said", "close",
]


def values(end: int) -> Tensor:
    """Rows [0, end) of the table."""
    return torch.randn(CLASSES, SIZE, generator=torch.Generator().manual_seed(99))[:end]


def main(argv: list[str], enter: Callable[[], World]) -> None:
    collective.run_on_nodes(argv, enter, Checks, NAMES)


if __name__ == "__main__":
    launch(main, sys.argv[1:], "node_softmax_program")
