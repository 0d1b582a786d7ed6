"""The ranks of tests/test_local_steps.py: ``NODES FOLDER``."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import pytest
import torch
from torch import Tensor, nn

from lapse_elmo.config.training import parse_train
from lapse_elmo.dense_node import NodeDense, NodeUpdate
from lapse_elmo.errors import ConfigError
from lapse_elmo.gradient_sample import STRIDE
from lapse_elmo.local_steps import LocalUpdate
from lapse_elmo.model.dense import BETAS
from lapse_elmo.model.optimizers import DenseOptimizer, DenseRule
from lapse_elmo.mpi.launch import launch
from lapse_elmo.mpi.world import World
from lapse_elmo.parameters import Parameters
from tests import collective

if TYPE_CHECKING:
    from mpi4py import MPI

SHAPES = ((3, 5), (400, 300), (7,))
RATE, SCALE, EVERY = 0.01, 0.5, 4
ADAM, ADAGRAD, SGD = (DenseRule(kind, average=0.9) for kind in ("adam", "adagrad", "sgd"))


class Checks:
    """Checks that run on every rank."""

    def __init__(self, world: World) -> None:
        self.world = world

    def gradients(self, rank: int, step: int) -> list[Tensor]:
        """Half of their squared norm is noise of the rank."""
        signal, noise = (torch.Generator().manual_seed(seed) for seed in (step, 1000 * step + rank + 1))
        return [torch.randn(shape, generator=signal) + torch.randn(shape, generator=noise) for shape in SHAPES]

    def train(
        self, rule: DenseRule, steps: int, *, turns: int = 1, last: bool = False, bf16: bool = False, every: int = EVERY
    ) -> tuple[NodeDense, DenseOptimizer, list[tuple[float, float]]]:
        """Take steps, the last one perhaps as that of a run; return the sums over the ranks of both norms, too."""
        generator = torch.Generator().manual_seed(0)
        dense = NodeDense(self.world, [nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES], rule)
        optimizer = dense.optimizer(RATE)
        update = LocalUpdate(self.world, dense, optimizer, every, 1, bf16=bf16)
        norms = []
        for step in range(1, steps + 1):
            update.start(self.gradients(self.world.rank, step), squares=True, turns=turns)
            self.world.node_barrier()
            share = update.finish()
            shares = self.world.allgather((share.own_squares, share.mean_square))
            norms.append((sum(own for own, _ in shares), sum(mean for _, mean in shares)))
            ends = last and step == steps
            assert update.apply(SCALE, step, ends) == (ends or step % every == 0)
            self.world.node_barrier()
        return dense, optimizer, norms

    def arrays(self, dense: NodeDense) -> list[Tensor]:
        assert dense.means is not None
        return [dense.weights, *dense.state.values(), dense.means, dense.num_steps]

    def same_everywhere(self, dense: NodeDense) -> bool:
        flat = torch.cat(self.arrays(dense))
        return all(torch.equal(flat, other) for other in self.world.allgather(flat))

    def expected(self, rule: DenseRule, steps: int, dense: NodeDense) -> tuple[Tensor, list[Tensor]]:
        """Return weights and state after ``steps`` steps and an average, in float64, as the description says."""
        generator = torch.Generator().manual_seed(0)
        start = self.flat(dense, [torch.randn(shape, generator=generator) for shape in SHAPES])
        nodes = self.world.allgather(self.world.node)
        members = [[rank for rank, node in enumerate(nodes) if node == number] for number in sorted(set(nodes))]
        shares = torch.tensor([len(ranks) / self.world.size for ranks in members], dtype=torch.float64)
        state = [torch.full_like(start, value) for value in rule.initial_state.values()]
        copies = [(start.clone(), [array.clone() for array in state]) for _ in members]
        for step in range(1, steps + 1):
            means = torch.stack([
                torch.stack([self.flat(dense, self.gradients(rank, step)) for rank in ranks]).mean(0)
                for ranks in members
            ])  # (nodes, size)
            for part in map(dense._slice_of, range(dense.num_slices)):
                sample = means[:, part][:, ::STRIDE]
                ratio = float((shares @ sample).square().sum() / (shares @ sample.square().sum(1)))
                for (weights, own), mean in zip(copies, means, strict=True):
                    move(rule, step, weights[part], [array[part] for array in own], SCALE * mean[part], ratio)
        averaged = [shares @ torch.stack(arrays) for arrays in zip(*([w, *own] for w, own in copies), strict=True)]
        return averaged[0], averaged[1:]

    def flat(self, dense: NodeDense, tensors: list[Tensor]) -> Tensor:
        flat = torch.zeros(dense.size)
        for view, tensor in zip(dense.views(flat), tensors, strict=True):
            view.copy_(tensor)
        return flat.double()

    def check(self, rule: DenseRule) -> None:
        """Nodes differ between averages and have the expected weights and state, with equal bits, after one."""
        dense, _, _ = self.train(rule, 3)
        assert not self.same_everywhere(dense)
        for steps, last in ((4, False), (3, True)):
            dense, _, _ = self.train(rule, steps, last=last)
            assert self.same_everywhere(dense)
            weights, state = self.expected(rule, steps, dense)
            torch.testing.assert_close(dense.weights.double(), weights, rtol=1e-4, atol=1e-5)
            for found, wanted in zip(dense.state.values(), state, strict=True):
                torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)

    def adam(self) -> None:
        self.check(ADAM)

    def adagrad(self) -> None:
        self.check(ADAGRAD)

    def descent(self) -> None:
        self.check(SGD)

    def norms(self) -> None:
        """The norms are those of exact sums; that of the mean is an estimate from 2,000 numbers."""
        _, _, found = self.train(ADAM, 3)
        for step, (own, mean) in enumerate(found, 1):
            every = [torch.cat([g.reshape(-1) for g in self.gradients(r, step)]) for r in range(self.world.size)]
            assert own == pytest.approx(sum(float(one.square().sum()) for one in every), rel=1e-5)
            assert mean == pytest.approx(float(torch.stack(every).mean(0).square().sum()), rel=0.1)

    def averages_over_steps(self) -> None:
        """They are updated at common multiples of the interval and K alone, with equal bits on all nodes."""
        dense, optimizer, _ = self.train(ADAM, 16)
        assert self.same_everywhere(dense)
        assert optimizer.averages is not None and not torch.equal(optimizer.averages.means[0], optimizer.parameters[0])
        longer = self.train(ADAM, 20)[0]
        assert self.same_everywhere(longer)
        assert torch.equal(self.arrays(longer)[-2], self.arrays(dense)[-2])

    def turns(self) -> None:
        """While some node has no sentence, steps are those of exact sums."""
        self.check_turns(self.world.size + 1)

    def dealt_ranks(self) -> None:
        """Likewise if every M-th rank is on a node and there are M turns, so that each step is that of one node."""
        world = self.world
        assert world.comm is not None
        dealt = World(world.comm)
        dealt.node_comm = cast("MPI.Intracomm", world.comm.Split(world.rank % world.num_nodes, world.rank))
        dealt._find_nodes()
        Checks(dealt).check_turns(world.num_nodes)

    def check_turns(self, turns: int) -> None:
        dense, _, norms = self.train(ADAM, 4, turns=turns)
        generator = torch.Generator().manual_seed(0)
        exact = NodeDense(self.world, [nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES], ADAM)
        update = NodeUpdate(self.world, exact, exact.optimizer(RATE))
        for step in range(1, 5):
            update.start(self.gradients(self.world.rank, step), squares=True)
            self.world.node_barrier()
            shares = self.world.allgather(update.finish().mean_square)
            assert sum(shares) == norms[step - 1][1]
            update.apply(SCALE, step, last=False)
            self.world.node_barrier()
        assert torch.equal(dense.weights, exact.weights)
        assert all(torch.equal(array, exact.state[name]) for name, array in dense.state.items())

    def bfloat16(self) -> None:
        """Only first moments are rounded, by 2^-8 of their size at most in each of two roundings."""
        dense, exact = (self.train(ADAM, 4, bf16=bf16)[0] for bf16 in (True, False))
        assert self.same_everywhere(dense)
        assert torch.equal(dense.weights, exact.weights)
        assert torch.equal(dense.state["second_moments"], exact.state["second_moments"])
        rounded, moments = dense.state["first_moments"], exact.state["first_moments"]
        assert not torch.equal(rounded, moments)
        torch.testing.assert_close(rounded, moments, rtol=2**-7, atol=2e-3)

    def zero_and_infinite_gradients(self) -> None:
        """A step without gradients moves nothing; an infinite number outside of the sample shows in the norm."""
        dense = NodeDense(self.world, [nn.Parameter(torch.ones(640))], SGD)
        update = LocalUpdate(self.world, dense, dense.optimizer(RATE), EVERY, 1)
        for value in (0.0, math.inf):
            gradient = torch.zeros(640)
            if self.world.rank == self.world.size - 1:
                gradient[1] = value
            update.start([gradient], squares=False)
            self.world.node_barrier()
            square = sum(self.world.allgather(update.finish().mean_square))
            assert square == 0 if value == 0 else not math.isfinite(square)
            self.world.node_barrier()

    def other_devices_are_refused(self) -> None:
        """Only ranks on CPUs share the parameters of a node."""
        config = parse_train(["--local-steps", "4"])
        with pytest.raises(ConfigError, match="--local-steps 4 needs ranks on CPUs"):
            Parameters(config, 100, self.world, torch.device("meta"))


def move(
    rule: DenseRule, step: int, weights: Tensor, state: list[Tensor], gradient: Tensor, ratio: float
) -> None:
    """Take one step of a rule in float64, where squares count by ``ratio``."""
    if rule.kind == "adam":
        first, second = state
        first.lerp_(gradient, 1 - BETAS[0])
        second.mul_(BETAS[1]).add_((1 - BETAS[1]) * ratio * gradient.square())
        bias_1, bias_2 = (1 - beta**step for beta in BETAS)
        weights -= RATE * (first / bias_1) / ((second / bias_2).sqrt() + rule.epsilon)
    elif rule.kind == "adagrad":
        state[0].add_(ratio * gradient.square())
        weights -= RATE * gradient / (state[0].sqrt() + rule.epsilon)
    else:
        weights -= RATE * gradient


def names() -> list[str]:
    return [
        "adam", "adagrad", "descent", "norms", "averages_over_steps", "turns", "dealt_ranks",
        "bfloat16", "zero_and_infinite_gradients", "other_devices_are_refused",
    ]


def main(argv: list[str], enter: Callable[[], World]) -> None:
    collective.run_on_nodes(argv, enter, Checks, names())


if __name__ == "__main__":
    launch(main, sys.argv[1:], prog="local_steps_program")
