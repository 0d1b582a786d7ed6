"""The ranks of tests/test_dense_node.py: ``NODES FOLDER``."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lapse_elmo.dense_node import NodeDense, NodeUpdate
from lapse_elmo.dense_update import DenseUpdate, RankUpdate
from lapse_elmo.model.optimizers import DenseOptimizer, DenseRule
from lapse_elmo.mpi.launch import launch
from lapse_elmo.mpi.world import World
from tests import collective

SHAPES = ((3, 5), (7,), (), (400, 300))
RATE = 0.2
ADAM, ADAGRAD, SGD = map(DenseRule, ("adam", "adagrad", "sgd"))


class Checks:
    """Checks that run on every rank."""

    def __init__(self, world: World) -> None:
        self.world = world

    def tensors(self, *seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(sum(1000**place * number for place, number in enumerate(seed)))
        return [torch.randn(shape, generator=generator) for shape in SHAPES]

    def train(self, update: DenseUpdate, steps: int = 3) -> list[tuple[float, float]]:
        """Return the sums over the ranks of both norms at each step."""
        norms = []
        for step in range(steps):
            gradients = self.tensors(self.world.rank, step + 1)
            given = [gradient.clone() for gradient in gradients]
            update.start(gradients, squares=step != 1)
            self.world.node_barrier()
            share = update.finish()
            assert all(map(torch.equal, gradients, given))
            every = self.world.allgather((share.own_squares, share.mean_square))
            norms.append((sum(own for own, _ in every), sum(mean for _, mean in every)))
            assert update.apply(0.5, step + 1, last=False)
            self.world.node_barrier()
        update.close()
        return norms

    def node(
        self, rule: DenseRule, steps: int = 3, *, bf16: bool = False
    ) -> tuple[list[nn.Parameter], DenseOptimizer, list[tuple[float, float]]]:
        # Only the values of a node's first rank count.
        values = self.tensors(0) if self.world.local_rank == 0 else self.tensors(9)
        parameters = [nn.Parameter(value) for value in values]
        dense = NodeDense(self.world, parameters, rule)
        optimizer = dense.optimizer(RATE)
        return parameters, optimizer, self.train(NodeUpdate(self.world, dense, optimizer, bf16=bf16), steps)

    def expected(self, rule: DenseRule) -> tuple[list[Tensor], list[tuple[float, float]]]:
        values, norms = [value.double().requires_grad_() for value in self.tensors(0)], []
        optimizer: torch.optim.Optimizer = torch.optim.SGD(values, RATE)
        if rule is ADAM:
            optimizer = torch.optim.Adam(values, RATE, eps=rule.epsilon)
        if rule is ADAGRAD:
            initial = rule.initial_accumulator
            optimizer = torch.optim.Adagrad(values, RATE, initial_accumulator_value=initial, eps=rule.epsilon)
        for step in range(3):
            every = [[g.double() for g in self.tensors(rank, step + 1)] for rank in range(self.world.size)]
            means = [torch.stack(some).mean(0) for some in zip(*every, strict=True)]
            squares = [float(sum(g.square().sum() for g in some)) for some in every]
            norms.append((sum(squares) if step != 1 else 0.0, float(sum(g.square().sum() for g in means))))
            for value, mean in zip(values, means, strict=True):
                value.grad = 0.5 * mean
            optimizer.step()
        return [value.detach() for value in values], norms

    def updates(self, rule: DenseRule) -> None:
        """Three steps give the expected parameters and norms, with the same bits on every rank."""
        parameters, optimizer, norms = self.node(rule)
        expected, squares = self.expected(rule)
        for found, wanted in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found.detach().double(), wanted, rtol=1e-5, atol=1e-6)
        assert [number for pair in norms for number in pair] == pytest.approx([n for pair in squares for n in pair])
        state = itertools.chain(*optimizer.state.values())
        flat = torch.cat([p.detach().reshape(-1) for p in (*parameters, *state, optimizer.num_steps)])
        assert all(torch.equal(flat, other) for other in self.world.allgather(flat))

    def adam(self) -> None:
        self.updates(ADAM)

    def adagrad(self) -> None:
        self.updates(ADAGRAD)

    def descent(self) -> None:
        self.updates(SGD)

    def sums_in_bfloat16(self) -> None:
        """With SGD, an error of the mean gradient is one of the parameters; all ranks have the same bits."""
        parameters, _, norms = self.node(SGD, bf16=True)
        expected, squares = self.expected(SGD)
        bound = 3 * RATE * 0.5 * 2**-8 * (0.0 if self.world.num_nodes == 1 else 8.0) + 1e-6  # of gradients up to 8
        for found, wanted in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found.detach().double(), wanted, rtol=1e-5, atol=bound)
        assert norms[-1] == pytest.approx(squares[-1], rel=1e-2)
        flat = torch.cat([p.detach().reshape(-1) for p in parameters])
        assert all(torch.equal(flat, other) for other in self.world.allgather(flat))
        exact = torch.cat([p.detach().reshape(-1) for p in self.node(SGD)[0]])
        assert torch.equal(flat, exact) == (self.world.num_nodes == 1)

    def as_on_each_rank(self) -> None:
        """A copy on each rank gets the same values; the same bits where two gradients, at most, are added."""
        rule, steps = DenseRule("adagrad", average=0.9), 17  # the averages are updated after 16 steps
        parameters, optimizer, _ = self.node(rule, steps)
        own = self.tensors(0)
        alone = DenseOptimizer(own, rule, RATE)
        self.train(RankUpdate(self.world, torch.device("cpu"), alone), steps)
        assert optimizer.averages is not None and alone.averages is not None
        assert not torch.equal(optimizer.averages.means[0], parameters[0].detach())
        ours = [*parameters, *optimizer.state["accumulators"], *optimizer.averages.means]
        theirs = [*own, *alone.state["accumulators"], *alone.averages.means]
        for found, wanted in zip(ours, theirs, strict=True):
            if self.world.size <= 2:
                assert torch.equal(found, wanted)
            torch.testing.assert_close(found.detach(), wanted, rtol=1e-5, atol=1e-5)

    def memory_is_shared(self) -> None:
        """A rank's write is read by the other ranks of its node only."""
        parameters = [nn.Parameter(value) for value in self.tensors(0)]
        dense = NodeDense(self.world, parameters, ADAGRAD)
        accumulators = dense.optimizer(RATE).state["accumulators"]
        self.world.barrier()
        if self.world.rank == 0:
            with torch.no_grad():
                parameters[3][-1, -1], accumulators[3][0, 0] = 5.0, 6.0
        self.world.barrier()
        seen = float(parameters[3][-1, -1]) == 5.0, float(accumulators[3][0, 0]) == 6.0
        assert seen == (self.world.node == 0,) * 2
        ends = self.world.allgather((self.world.node, dense.own.start, dense.own.stop))
        mine = [(first, end) for node, first, end in ends if node == self.world.node and end > first]
        assert [first for first, _ in mine] == [0, *(end for _, end in mine[:-1])] and mine[-1][1] == dense.size
        assert len(mine) == dense.num_slices


def names() -> list[str]:
    return ["adam", "adagrad", "descent", "sums_in_bfloat16", "as_on_each_rank", "memory_is_shared"]


def main(argv: list[str], enter: Callable[[], World]) -> None:
    collective.run_on_nodes(argv, enter, Checks, names())


if __name__ == "__main__":
    launch(main, sys.argv[1:], prog="dense_node_program")
