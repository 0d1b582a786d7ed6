"""Local steps: each node updates its dense parameters by itself, and the nodes average them every K steps.

Where the network between the nodes is slow, this sends a small part of the bytes (``--local-steps``). Averages of the
weights alone would lose what Adam and Adagrad know of the gradients, so the nodes average the optimizer's state, too.
After that all nodes have the same bits, as a checkpoint, an evaluation and the end of a run need it.

Adam and Adagrad divide each step by the size of past gradients. A node's gradient has more noise than the mean over all
nodes, so it is larger, and steps divided by its size would be too short: by up to sqrt(M) with M nodes. Therefore its
square counts by the ratio q / a, where q is the squared norm of the mean gradient and a the mean of those of the nodes'
gradients. Then the state is, on average, that of steps with the mean gradient, and so are the steps' sizes. (In the
mean over the nodes, the larger noise of each averages out.)

The nodes learn the ratio, and the norm of the mean gradient by which a step is clipped, from a sample: they sum every
``STRIDE``-th number of their gradients at each step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from lapse_elmo.dense_node import EXCHANGED, NodeDense, NodeUpdate
from lapse_elmo.dense_update import DenseNorms
from lapse_elmo.gradient_sample import STRIDE, mean_squares
from lapse_elmo.model.averaging import INTERVAL
from lapse_elmo.model.dense import add_up
from lapse_elmo.model.optimizers import DenseOptimizer
from lapse_elmo.mpi.world import World
from lapse_elmo.node_sums import NodeSums, sum_bytes

_MOST_SUMS = 8  # blocks that are under way at the same time
_MOMENTS = "first_moments"  # they are a mean of gradients, and may be sent as these are


class LocalUpdate(NodeUpdate):
    """Updates the parameters of a :class:`NodeDense` by local steps; see :class:`DenseUpdate` (collective).

    While the batch is so small that some node has no sentence, gradients are averaged over all nodes at each step.

    Args:
        world: The world, of several nodes.
        dense: The parameters that the ranks of this node share.
        optimizer: The optimizer of all parameters, from which each step takes the learning rate.
        every: K, the steps from one average to the next.
        parts: Parts of a step per rank.
        bf16: Whether nodes send each other gradients and their moving averages rounded to bfloat16.

    Raises:
        ConfigError: On every rank, if there is not enough shared memory.
    """

    def __init__(
        self, world: World, dense: NodeDense, optimizer: DenseOptimizer, every: int, parts: int, *, bf16: bool = False
    ) -> None:
        super().__init__(world, dense, optimizer, bf16=bf16)
        self._every = every
        self._parts, self._nodes = parts, world.gather_numbers(np.array([world.node]))[:, 0]
        self._turns = (0, False)  # those of the last step, and whether every node has sentences at each of them
        self._share = world.local_size / world.size  # of this node in all averages
        self._exact_sums = None if self._across is None else NodeSums(self._across, bf16=False)
        # The averages over steps are updated when the nodes have the same parameters, so that they have the same bits.
        self._averages, self._stepper.averages = self._stepper.averages, None
        self._interval = every * -(-INTERVAL // every)
        self._local = self._apart = False
        self._ratio = 1.0
        size, nodes, state = dense.size, world.num_nodes, list(dense.state)
        self._summing_bytes, self._sampling_bytes = self.sent_bytes, nodes * sum_bytes(size / STRIDE, nodes)
        self._averaging_bytes = nodes * averaging_bytes(size, state, nodes, bf16=bf16)

    def start(self, gradients: Sequence[Tensor], squares: bool, turns: int = 1) -> None:
        """Begin to average the gradients over the node; see :meth:`DenseUpdate.start`."""
        super().start(gradients, squares, turns)
        if turns != self._turns[0]:
            self._turns = turns, every_node_takes_part(self._nodes, self._parts, turns)
        self._local = self._turns[1]
        self.sent_bytes = self._sampling_bytes if self._local else self._summing_bytes

    def finish(self) -> DenseNorms:
        """Wait for the means; see :meth:`DenseUpdate.finish`."""
        self._ratio = 1.0
        if not self._local:
            return super().finish()
        own_squares, node_square = add_up(self._slices, self._world.local_size, self._squares, True)
        if self._across is None:
            return DenseNorms(own_squares, 0.0)
        mean_square, of_nodes = mean_squares(self._across, self._share, self._mean[::STRIDE], node_square)
        self._ratio = mean_square / of_nodes if of_nodes else 1.0
        return DenseNorms(own_squares, mean_square / self._world.num_nodes)

    def apply(self, scale: float, step: int, last: bool) -> bool:
        """Update this rank's slice, and average it over the nodes if it is time; see :meth:`DenseUpdate.apply`."""
        self._stepper.learning_rate = self._optimizer.learning_rate
        self._stepper.step([self._mean], scale, self._ratio)
        self._apart |= self._local
        if step % self._every and not last:
            return False
        if self._apart:
            self._average()
        if self._averages is not None:
            self._averages.update(int(self._dense.num_steps), self._interval, step % self._interval == 0)
        return True

    def _average(self) -> None:
        """Replace the slice's weights and state by their means over the nodes (collective)."""
        self._apart = False
        self.sent_bytes += self._averaging_bytes
        waits: deque[Callable[[], None]] = deque()
        for name, array in {"weights": self._dense.weights, **self._dense.state}.items():
            sums = self._sums if name == _MOMENTS else self._exact_sums
            if sums is None:
                return
            for block in array[self._dense.own].mul_(self._share).split(EXCHANGED):
                waits.append(sums.start(block.numpy()))
                if len(waits) > _MOST_SUMS:
                    waits.popleft()()
        for wait in waits:
            wait()


def every_node_takes_part(nodes: np.ndarray, parts: int, turns: int) -> bool:
    """Return whether each node has a part in each of ``turns`` turns, which the parts of all ranks take in order.

    The ranks of a node need not follow one another: a launcher that deals them out like cards gives each node every
    M-th rank, and with M turns all ranks of a node are in the same turn.

    Args:
        nodes: (ranks,) int64, the node of each rank, from 0.
        parts: Parts of a step per rank.
        turns: One in so many parts has sentences at a step.
    """
    if turns <= parts:
        return True
    if turns * (nodes.max() + 1) > nodes.size * parts:
        return False
    turn = np.arange(nodes.size * parts) % turns
    return np.unique(np.repeat(nodes, parts) * turns + turn).size == turns * (nodes.max() + 1)


def averaging_bytes(numbers: float, state: Sequence[str], num_nodes: int, *, bf16: bool) -> float:
    """Return the bytes that each node sends to average so many weights and the named arrays of their state."""
    return sum(sum_bytes(numbers, num_nodes, bf16=bf16 and name == _MOMENTS) for name in ("weights", *state))
