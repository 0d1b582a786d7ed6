"""Dense parameters that the ranks of a node share: one copy in shared memory, of which each rank updates a slice.

At each step, every rank copies its gradient to a buffer that the node's ranks can read. Each rank then adds up one
slice of all buffers and exchanges that slice's sum with the ranks of the other nodes that have the same slice. So a
node holds weights and optimizer state once, a gradient crosses the network once per node, and each number is updated by
one rank of the node.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lapse_elmo.dense_update import DenseNorms
from lapse_elmo.model.dense import add_up
from lapse_elmo.model.optimizers import DenseOptimizer, DenseRule, new_step_count
from lapse_elmo.mpi.node_memory import NodeMemory
from lapse_elmo.mpi.world import World
from lapse_elmo.node_sums import NodeSums, sum_bytes

_WEIGHTS, _MEANS, _GRADIENTS = "dense weights", "averaged dense weights", "dense gradients"
_ALIGNMENT = 16  # numbers; each tensor and each slice starts at a cache line of its own
EXCHANGED = 1 << 20  # numbers; while one block of a slice is under way to the other nodes, the next one is added up


class NodeDense:
    """Dense parameters and their optimizer's state in the node's shared memory (construction is collective).

    The parameters keep the values of the node's first rank, and become views of the shared memory.

    Args:
        world: The world.
        parameters: float32 parameters on the CPU, of the same shapes on every rank.
        rule: The update rule, which determines the state.

    Attributes:
        size: Numbers in each shared array: all parameters, with gaps that align them.
        own: The slice of the shared arrays that this rank updates; empty on ranks beyond the smallest node's size.
        num_slices: Number of slices, the same on every node: the number of ranks of the smallest node.
        weights: (size,) the shared weights.
        state: (size,) the shared state, by name.
        means: (size,) the averages of the weights; None for a rule without averages.
        num_steps: (1,) the number of steps taken, counted by each rank for itself.

    Raises:
        ConfigError: On every rank, if there is not enough shared memory.
    """

    def __init__(self, world: World, parameters: Sequence[nn.Parameter], rule: DenseRule) -> None:
        self._rule = rule
        self._shapes = [parameter.shape for parameter in parameters]
        aligned = [-(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT for parameter in parameters]
        self._starts = [0, *itertools.accumulate(aligned)]
        self.size = self._starts[-1]
        self.num_slices = int(world.gather_numbers(np.array([world.local_size])).min())
        self.own = self._slice_of(world.local_rank)
        names = [_WEIGHTS, *(f"dense {name}" for name in rule.initial_state), *([_MEANS] if rule.average else [])]
        memory = NodeMemory(world, dict.fromkeys(names, ((self.size,), np.float32)))

        def reserve() -> None:
            # Each rank reserves its own slice, which places the pages in the memory of its own socket.
            for name in names:
                memory.reserve(name, self.own.start, self.own.stop)

        world.together(reserve)
        self.weights = torch.from_numpy(memory.arrays[_WEIGHTS])
        self.state = {name: torch.from_numpy(memory.arrays[f"dense {name}"]) for name in rule.initial_state}
        self.means = torch.from_numpy(memory.arrays[_MEANS]) if rule.average else None
        self.num_steps = new_step_count()
        for name, value in rule.initial_state.items():
            self.state[name][self.own] = value
        views = self.views(self.weights)
        if world.local_rank == 0:
            for view, parameter in zip(views, parameters, strict=True):
                view.copy_(parameter.detach())
            if self.means is not None:
                self.means.copy_(self.weights)
        world.node_barrier()
        for view, parameter in zip(views, parameters, strict=True):
            parameter.data = view

    def optimizer(self, learning_rate: float) -> DenseOptimizer:
        """Return an optimizer of all parameters, with the shared state."""
        state = {name: self.views(array) for name, array in self.state.items()}
        means = None if self.means is None else self.views(self.means)
        return DenseOptimizer(self.views(self.weights), self._rule, learning_rate, state, self.num_steps, means)

    def own_optimizer(self, learning_rate: float) -> DenseOptimizer:
        """Return an optimizer of this rank's slice, with the shared state."""
        state = {name: [array[self.own]] for name, array in self.state.items()}
        means = None if self.means is None else [self.means[self.own]]
        return DenseOptimizer([self.weights[self.own]], self._rule, learning_rate, state, self.num_steps, means)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Return views of an array (size,), with the shapes of the parameters."""
        return [
            flat[start : start + shape.numel()].view(shape)
            for start, shape in zip(self._starts, self._shapes, strict=False)
        ]

    def _slice_of(self, number: int) -> slice:
        lines, parts = self.size // _ALIGNMENT, self.num_slices
        first, end = (lines * min(edge, parts) // parts * _ALIGNMENT for edge in (number, number + 1))
        return slice(first, end)


class NodeUpdate:
    """Averages gradients and updates the parameters of a :class:`NodeDense`; see :class:`DenseUpdate` (collective).

    Ranks add up in the order of their numbers within a node, so equal gradients give equal bits.

    Args:
        world: The world.
        dense: The shared parameters.
        optimizer: The optimizer of all parameters, from which each step takes the learning rate.
        bf16: Whether nodes send each other gradients rounded to bfloat16.

    Raises:
        ConfigError: On every rank, if there is not enough shared memory.
    """

    fallback = ""

    def __init__(self, world: World, dense: NodeDense, optimizer: DenseOptimizer, *, bf16: bool = False) -> None:
        self._world, self._dense, self._optimizer = world, dense, optimizer
        own, rank = dense.own, world.local_rank
        memory = NodeMemory(world, {_GRADIENTS: ((world.local_size, dense.size), np.float32)})
        world.together(lambda: memory.reserve(_GRADIENTS, rank, rank + 1))
        buffers = torch.from_numpy(memory.arrays[_GRADIENTS])
        self._views = dense.views(buffers[rank])
        self._slices = buffers[:, own]  # of every rank of the node
        self._mean = self._slices[0]  # the sum replaces the first rank's gradient, which is not needed any more
        self._stepper = dense.own_optimizer(optimizer.learning_rate)
        self._across = world.across_nodes(dense.num_slices)
        self._sums = None if self._across is None else NodeSums(self._across, bf16)
        self._squares = False
        self.sent_bytes = world.num_nodes * sum_bytes(dense.size, world.num_nodes, bf16=bf16)

    def start(self, gradients: Sequence[Tensor], squares: bool, turns: int = 1) -> None:
        """Begin to average the gradients; see :meth:`DenseUpdate.start`."""
        self._squares = squares
        for view, gradient in zip(self._views, gradients, strict=True):
            view.copy_(gradient)

    def finish(self) -> DenseNorms:
        """Wait for the means; see :meth:`DenseUpdate.finish`."""
        if self._sums is None:
            return DenseNorms(*add_up(self._slices, self._world.size, self._squares, True))
        own_square, sums = 0.0, []
        for first in range(0, self._mean.numel(), EXCHANGED):
            block = slice(first, first + EXCHANGED)
            own_square += add_up(self._slices[:, block], 1, self._squares, False)[0]
            sums.append(self._sums.start(self._mean[block].numpy()))
        for wait in sums:
            wait()
        _, mean_square = add_up(self._mean[None], self._world.size, False, True)
        return DenseNorms(own_square, mean_square / self._world.num_nodes)

    def apply(self, scale: float, step: int, last: bool) -> bool:
        """Update this rank's slice; see :meth:`DenseUpdate.apply`."""
        self._stepper.learning_rate = self._optimizer.learning_rate
        self._stepper.step([self._mean], scale)
        return True

    def close(self) -> None:
        """Do nothing: the memory is freed with the parameters."""
