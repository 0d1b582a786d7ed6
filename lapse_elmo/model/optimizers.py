"""Adagrad and plain gradient descent over dense parameters; those of rows are the server's update rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

_PART = 1 << 17  # numbers; some parts of so many lie in a core's cache together


def in_parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Flat parts of contiguous tensors of one size, so that several operations pass over the memory once: what comes
    in between stays in the cache. Operations on single elements give the same bits. A GPU takes all at once."""
    flat = [tensor.view(-1) for tensor in tensors]
    return zip(*(f.split(_PART if f.device.type == "cpu" else max(f.numel(), 1)) for f in flat), strict=True)


def sum_of_squares(tensor: Tensor) -> float:
    """Return the sum of squares, summed in float64."""
    return sum(float(part.square().sum(dtype=torch.float64)) for (part,) in in_parts(tensor.contiguous()))


class DenseOptimizer:
    """Adagrad, or plain gradient descent, over a list of dense parameters, in place.

    Equal to torch.optim.Adagrad and torch.optim.SGD to the last bit.

    Args:
        parameters: Contiguous tensors to update, in an order that does not change; they are kept by reference.
        learning_rate: The step size.
        initial_accumulator: What Adagrad's accumulators start at; None means plain gradient descent, without any.
        epsilon: Added to the root of Adagrad's accumulators.
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

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], scale: float = 1.0) -> None:
        """One update with ``scale * gradients``, which are not changed.

        Args:
            gradients: One for each parameter, of its shape.
            scale: For instance the factor of a global-norm clip.
        """
        accumulators: Sequence[Tensor | None] = self.accumulators or [None] * len(self.parameters)
        for parameter, given, accumulator in zip(self.parameters, gradients, accumulators, strict=True):
            gradient = given.contiguous()
            if accumulator is None:
                for weights, part in in_parts(parameter, gradient):
                    weights.add_(part if scale == 1.0 else part * scale, alpha=-self.learning_rate)
                continue
            for weights, part, squares in in_parts(parameter, gradient, accumulator):
                scaled = part if scale == 1.0 else part * scale
                # torch.optim.Adagrad's own operations: they round once where a separate delta would round twice.
                squares.addcmul_(scaled, scaled)
                weights.addcdiv_(scaled, squares.sqrt().add_(self.epsilon), value=-self.learning_rate)

    def state_dict(self) -> dict[str, list[Tensor]]:
        """Return the accumulators, by reference, in the order of the parameters; an empty list for gradient descent."""
        return {"accumulators": self.accumulators}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Sequence[Tensor]]) -> None:
        """Copy accumulators from another optimizer's :meth:`state_dict`; their number and shapes must fit."""
        for own, other in zip(self.accumulators, state["accumulators"], strict=True):
            if own.shape != other.shape:
                raise ValueError(f"accumulator of shape {tuple(other.shape)}, expected {tuple(own.shape)}")
            own.copy_(other)
