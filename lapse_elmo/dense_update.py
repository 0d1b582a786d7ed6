"""One step on the dense parameters: average the gradients of all ranks, then update.

Who averages and updates depends on where the parameters are: in memory that a node's ranks share
(:mod:`lapse_elmo.dense_node`), on each rank's device (:class:`RankUpdate`), or in the parameter server
(:class:`ServerUpdate`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lapse_elmo.dense_mean import open_dense_mean
from lapse_elmo.gradient_sample import mean_squares, sample_of
from lapse_elmo.model.dense import sum_of_squares
from lapse_elmo.model.optimizers import DenseOptimizer
from lapse_elmo.mpi.world import World
from lapse_elmo.node_sums import sum_bytes
from lapse_elmo.tables import DenseTable


@dataclass(frozen=True)
class DenseNorms:
    """One rank's shares in two squared norms; the sums of all ranks' shares are the norms.

    Attributes:
        own_squares: Share in the sum over the ranks of the squared norm of a rank's own gradient; 0 if not asked for.
        mean_square: Share in the squared norm of the mean gradient.
    """

    own_squares: float
    mean_square: float


class DenseUpdate(Protocol):
    """Averages gradients over the ranks and updates the dense parameters.

    All methods are collective: every rank makes the same calls in the same order: ``start``, ``finish``, and
    ``apply`` unless the step is refused.

    Attributes:
        fallback: A warning about a slow way of averaging, or "".
        sent_bytes: Bytes that all ranks have sent to other nodes for the last step, if they sum in a ring.
    """

    fallback: str
    sent_bytes: float

    def start(self, gradients: Sequence[Tensor], squares: bool, turns: int = 1) -> None:
        """Begin to average ``gradients``, one per parameter, which are not changed.

        Args:
            gradients: This rank's gradients.
            squares: Whether ``DenseNorms.own_squares`` is wanted.
            turns: One in so many parts has sentences at this step.
        """

    def finish(self) -> DenseNorms:
        """Wait until the means are known, and return this rank's shares in the norms.

        All ranks of the node must have called :meth:`start` before (a barrier of the node).
        """

    def apply(self, scale: float, step: int, last: bool) -> bool:
        """Update the parameters with ``scale`` times the mean gradients, at the learning rate of the optimizer.

        The ranks of a node may update the same memory: they must wait for each other before they read it.

        Args:
            scale: Factor of the gradients.
            step: The number of the step, from 1.
            last: Whether all nodes must have the same parameters afterwards.

        Returns:
            Whether they have.
        """

    def close(self) -> None:
        """Release resources."""


class RankUpdate:
    """Updates parameters of which every rank has a copy of its own, on any device; see :class:`DenseUpdate`.

    Args:
        world: The world.
        device: Where the parameters are.
        optimizer: Updates them.
    """

    def __init__(self, world: World, device: torch.device, optimizer: DenseOptimizer) -> None:
        self._world, self._optimizer = world, optimizer
        numbers = sum(p.numel() for p in optimizer.parameters)
        self._averager, self.fallback = open_dense_mean(world, device, numbers)
        self.sent_bytes = sum_bytes(numbers, world.size) * world.num_nodes if world.num_nodes > 1 else 0.0
        self._own_squares = 0.0
        self._means: list[Tensor] = []
        self._wait: Callable[[], list[Tensor]] = list

    def start(self, gradients: Sequence[Tensor], squares: bool, turns: int = 1) -> None:
        """Begin to average; see :meth:`DenseUpdate.start`."""
        self._wait = self._averager.start(gradients)
        self._own_squares = squares_of(gradients) if squares else 0.0  # while the gradients are being summed

    def finish(self) -> DenseNorms:
        """Wait for the means; see :meth:`DenseUpdate.finish`."""
        self._means = self._wait()
        return DenseNorms(self._own_squares, squares_of(self._means) / self._world.size)

    def apply(self, scale: float, step: int, last: bool) -> bool:
        """Update this rank's copy; see :meth:`DenseUpdate.apply`."""
        self._optimizer.step(self._means, scale)
        return True

    def close(self) -> None:
        """Release the averager's resources."""
        self._averager.close()


class ServerUpdate:
    """Pushes gradients to parameters that are rows of the server; see :class:`DenseUpdate`.

    The server adds up the ranks' steps, so the mean gradient is not known; its norm is estimated from a sample.

    Args:
        world: The world.
        table: The rows.
    """

    fallback = ""
    sent_bytes = 0.0  # of the sample; the server counts its own

    def __init__(self, world: World, table: DenseTable) -> None:
        self._world, self._table = world, table
        self._gradients: Sequence[Tensor] = ()
        self._squares = False

    def start(self, gradients: Sequence[Tensor], squares: bool, turns: int = 1) -> None:
        """Keep the gradients; see :meth:`DenseUpdate.start`."""
        self._gradients, self._squares = gradients, squares

    def finish(self) -> DenseNorms:
        """Return the norms; see :meth:`DenseUpdate.finish`."""
        own, ranks = squares_of(self._gradients), self._world.size
        sample = sample_of(self._gradients)
        mean_square, _ = mean_squares(self._world, 1 / ranks, sample, own)
        nodes = self._world.num_nodes
        self.sent_bytes = nodes * sum_bytes(sample.numel(), ranks) if nodes > 1 else 0.0
        return DenseNorms(own if self._squares else 0.0, mean_square / ranks)

    def apply(self, scale: float, step: int, last: bool) -> bool:
        """Push the gradients; see :meth:`DenseUpdate.apply`."""
        # With gradients divided by the number of ranks the sum of their steps is a mean.
        self._table.push(self._gradients, scale / self._world.size)
        return True

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


def squares_of(tensors: Sequence[Tensor]) -> float:
    """Return the sum of the squares of all numbers."""
    return sum(map(sum_of_squares, tensors), 0.0)
