"""Update rules: how the server turns a gradient that is pushed into a row's next value.

A row of a segment with a rule is ``[weights | state]``. Workers pull weights and push gradients; whoever holds the row
takes the step under the row's lock, from the state that the row has at that moment. A rule is data and knows no model;
rows.c computes the steps, and :meth:`Rule.changes` is its twin in torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ADAGRAD, ADAGRAD_PER_ROW, SGD = range(3)  # as in rows.c


@dataclass(frozen=True)
class Rule:
    """Adagrad or plain gradient descent, with a learning rate that comes with each push.

    Adagrad of a gradient g is ``acc += g * g; weights -= rate * g / (sqrt(acc) + epsilon)``. With ``per_row`` the row
    has one accumulator, which grows by the mean of ``g * g`` over the row (row-wise Adagrad).

    :ivar epsilon: see above; of no effect on gradient descent, as ``per_row``.
    """

    kind: Literal["adagrad", "sgd"]
    per_row: bool = False
    epsilon: float = 1e-7

    def __post_init__(self) -> None:
        assert self.kind in ("adagrad", "sgd") and self.epsilon >= 0

    @property
    def code(self) -> int:
        """The rule's number in rows.c."""
        if self.kind == "sgd":
            return SGD
        return ADAGRAD_PER_ROW if self.per_row else ADAGRAD

    def state_width(self, width: int) -> int:
        """Floats of state that are stored after ``width`` weights."""
        if self.kind == "sgd":
            return 0
        return 1 if self.per_row else width

    def changes(self, rows: Tensor, gradients: Tensor, rate: float) -> Tensor:
        """What one step of each of the distinct ``rows`` adds to it, as (n, width + state).

        :param rows: (n, width + state), not changed.
        :param gradients: (n, width).
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
