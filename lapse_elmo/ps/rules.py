"""Update rules: how the server turns a pushed gradient into a row's next value.

A row of a segment with a rule is ``[weights | state]``. Workers pull weights and push gradients. The step is taken
where the row is, under its lock, from the row's current state. A rule is plain data, independent of any model; rows.c
computes the steps, and :meth:`Rule.changes` is the fallback in torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ADAGRAD, ADAGRAD_PER_ROW, SGD = range(3)  # as in rows.c


@dataclass(frozen=True)
class Rule:
    """Adagrad or plain gradient descent; each push brings its learning rate.

    An Adagrad step with gradient g is ``acc += g * g; weights -= rate * g / (sqrt(acc) + epsilon)``. With ``per_row``
    the row has a single accumulator, to which the mean of ``g * g`` over the row is added (row-wise Adagrad). ``sgd``
    ignores ``per_row`` and ``epsilon``.
    """

    kind: Literal["adagrad", "sgd"]
    per_row: bool = False
    epsilon: float = 1e-7

    def __post_init__(self) -> None:
        assert self.kind in ("adagrad", "sgd") and self.epsilon >= 0

    @property
    def code(self) -> int:
        """Number of the rule in rows.c."""
        if self.kind == "sgd":
            return SGD
        return ADAGRAD_PER_ROW if self.per_row else ADAGRAD

    def state_width(self, width: int) -> int:
        """Return the number of floats of state stored after ``width`` weights."""
        if self.kind == "sgd":
            return 0
        return 1 if self.per_row else width

    def changes(self, rows: Tensor, gradients: Tensor, rate: float) -> Tensor:
        """Compute what one step adds to each of the distinct ``rows``, without changing them.

        Args:
            rows: (n, width + state) float32.
            gradients: (n, width) float32.
            rate: Learning rate.

        Returns:
            (n, width + state) float32.
        """
        if self.kind == "sgd":
            return gradients * -rate
        width = gradients.shape[1]
        out = torch.empty_like(rows)
        weights, state = out[:, :width], out[:, width:]
        torch.mul(gradients, gradients, out=weights)
        state.copy_(weights.mean(1, keepdim=True) if self.per_row else weights)
        denominator = (rows[:, width:] + state).sqrt_().add_(self.epsilon)
        torch.div(gradients * -rate, denominator, out=weights)
        return out
