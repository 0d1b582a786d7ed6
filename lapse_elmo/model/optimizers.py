"""Adam, Adagrad and plain SGD for the dense parameters; the server's update rules apply to the rows of the tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lapse_elmo.model.averaging import Averages
from lapse_elmo.model.dense import BETAS, Rates, update


@dataclass(frozen=True)
class DenseRule:
    """An update rule, and the state that it has for each weight.

    Attributes:
        kind: ``"adam"``, ``"adagrad"`` or ``"sgd"``.
        initial_accumulator: Initial value of Adagrad's accumulators.
        epsilon: Added to the square root of Adagrad's accumulators and of Adam's second moments.
        average: Fraction of the steps over which the weights are averaged; 0 for no averages.
    """

    kind: str
    initial_accumulator: float = 1.0
    epsilon: float = 1e-7
    average: float = 0.0

    @property
    def initial_state(self) -> dict[str, float]:
        """Names and initial values of the arrays of state, each of which has one number per weight."""
        if self.kind == "adam":
            return {"first_moments": 0.0, "second_moments": 0.0}
        return {"accumulators": self.initial_accumulator} if self.kind == "adagrad" else {}


def new_step_count() -> Tensor:
    """Return a count (1,) of steps, 0 so far: in float64, since float32 does not count beyond 2**24 steps."""
    return torch.zeros(1, dtype=torch.float64)


class DenseOptimizer:
    """Updates a list of dense parameters in place.

    Equal to torch.optim.Adam, torch.optim.Adagrad and torch.optim.SGD: bitwise, except that square roots of float32
    numbers on the CPU are rounded correctly (see :mod:`lapse_elmo.model.dense`).

    Args:
        parameters: Contiguous tensors to update, held by reference. Gradients and state follow their order.
        rule: The update rule.
        learning_rate: The step size.
        state: The rule's state, held by reference; by default new tensors with their initial values.
        num_steps: (1,) the number of steps taken, held by reference, as Adam needs to know; by default a new 0.
        means: Where the rule's averages of the parameters are, held by reference; by default new tensors.

    Attributes:
        averages: The averages; None for a rule without them.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        rule: DenseRule,
        learning_rate: float,
        state: Mapping[str, Sequence[Tensor]] | None = None,
        num_steps: Tensor | None = None,
        means: Sequence[Tensor] | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self.rule = rule
        self.learning_rate = learning_rate
        if state is None:
            state = {
                name: [torch.full_like(p, value, requires_grad=False) for p in self.parameters]
                for name, value in rule.initial_state.items()
            }
        self.state = {name: list(tensors) for name, tensors in state.items()}
        self.num_steps = new_step_count() if num_steps is None else num_steps
        self.averages: Averages | None = None
        if rule.average:
            means = [parameter.detach().clone() for parameter in self.parameters] if means is None else means
            self.averages = Averages(self.parameters, means, rule.average)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], scale: float = 1.0, square: float = 1.0) -> None:
        """Update the parameters with ``scale * gradients``; the gradients themselves are not modified.

        Args:
            gradients: One per parameter, of its shape.
            scale: Factor applied to all gradients, such as that of clipping by global norm.
            square: Factor of the squares of the scaled gradients in the rule's state.
        """
        self.num_steps += 1
        rate, root = self.learning_rate, 1.0
        if self.rule.kind == "adam":  # whose moments start at 0
            bias_1, bias_2 = (1.0 - beta ** float(self.num_steps) for beta in BETAS)
            rate, root = rate / bias_1, math.sqrt(bias_2)
        rates = Rates(scale, rate, self.rule.epsilon, root, square)
        for parameter, gradient, *state in zip(self.parameters, gradients, *self.state.values(), strict=True):
            update(self.rule.kind, parameter, gradient.contiguous(), state, rates)
        if self.averages is not None:
            self.averages.update(int(self.num_steps))

    def named_state(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the state by reference, as ``KIND/NAME`` with one name per parameter, and ``num_steps`` if it counts.

        Averages are not among it: they are a model of their own.
        """
        named = {
            f"{kind}/{name}": tensor
            for kind, tensors in self.state.items() for name, tensor in zip(names, tensors, strict=True)
        }
        counts = self.rule.kind == "adam" or self.averages is not None
        return {**named, "num_steps": self.num_steps} if counts else named
