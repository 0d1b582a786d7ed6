"""Adagrad and plain SGD for the dense parameters; the server's update rules apply them to the rows of the tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

_BLOCK_SIZE = 1 << 17  # elements; a core's cache holds blocks of several tensors at once


def iter_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Return an iterator over corresponding flat blocks of contiguous tensors with equally many elements.

    A chain of elementwise operations on one block at a time keeps the intermediate results in the cache. Its result is
    bitwise the same as on whole tensors. On a GPU there is only one block.
    """
    flat = [tensor.view(-1) for tensor in tensors]
    return zip(*(f.split(_BLOCK_SIZE if f.device.type == "cpu" else max(f.numel(), 1)) for f in flat), strict=True)


def sum_of_squares(tensor: Tensor) -> float:
    """Return the sum of squares, summed in float64."""
    return sum(float(block.square().sum(dtype=torch.float64)) for (block,) in iter_blocks(tensor.contiguous()))


class DenseOptimizer:
    """Adagrad or plain SGD over a list of dense parameters, in place.

    Bitwise equal to torch.optim.Adagrad and torch.optim.SGD.

    Args:
        parameters: Contiguous tensors to update, held by reference. Gradients and state follow their order.
        learning_rate: The step size.
        initial_accumulator: Initial value of Adagrad's accumulators; None selects plain SGD, which has none.
        epsilon: Added to the square root of Adagrad's accumulators.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        learning_rate: float,
        initial_accumulator: float | None = 1.0,
        epsilon: float = 1e-7,
    ) -> None:
        self.parameters = list(parameters)
        self.learning_rate = learning_rate
        self.epsilon = epsilon
        self.accumulators: list[Tensor] = []
        if initial_accumulator is not None:
            self.accumulators = [torch.full_like(p, initial_accumulator, requires_grad=False) for p in self.parameters]

    @classmethod
    def over(
        cls, parameters: Sequence[Tensor], accumulators: Sequence[Tensor] | None, learning_rate: float, epsilon: float
    ) -> DenseOptimizer:
        """Return an optimizer that updates the given accumulators, which it holds by reference; None selects SGD."""
        optimizer = cls(parameters, learning_rate, None, epsilon)
        optimizer.accumulators = list(accumulators or [])
        return optimizer

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], scale: float = 1.0) -> None:
        """Update the parameters with ``scale * gradients``; the gradients themselves are not modified.

        Args:
            gradients: One per parameter, of its shape.
            scale: Factor applied to all gradients, such as that of clipping by global norm.
        """
        accumulators: Sequence[Tensor | None] = self.accumulators or [None] * len(self.parameters)
        for parameter, given, accumulator in zip(self.parameters, gradients, accumulators, strict=True):
            gradient = given.contiguous()
            if accumulator is None:
                for weights, block in iter_blocks(parameter, gradient):
                    weights.add_(block if scale == 1.0 else block * scale, alpha=-self.learning_rate)
                continue
            for weights, block, squares in iter_blocks(parameter, gradient, accumulator):
                scaled = block if scale == 1.0 else block * scale
                # The same operations as torch.optim.Adagrad: adding a separate delta would round once more.
                squares.addcmul_(scaled, scaled)
                weights.addcdiv_(scaled, squares.sqrt().add_(self.epsilon), value=-self.learning_rate)

    def state_dict(self) -> dict[str, list[Tensor]]:
        """Return the accumulators, by reference, in the order of the parameters; an empty list for SGD."""
        return {"accumulators": self.accumulators}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Sequence[Tensor]]) -> None:
        """Copy the accumulators of another optimizer's :meth:`state_dict`.

        Raises:
            ValueError: If their number or a shape differs.
        """
        for own, other in zip(self.accumulators, state["accumulators"], strict=True):
            if own.shape != other.shape:
                raise ValueError(f"accumulator of shape {tuple(other.shape)}, expected {tuple(own.shape)}")
            own.copy_(other)
