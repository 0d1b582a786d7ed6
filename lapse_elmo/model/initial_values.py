"""Initial values of the LSTM, drawn from an explicit generator: the same on every rank and for any world size.

Values are drawn in float32 on the generator's device, layer by layer, forward before backward. They therefore depend
neither on the LSTM's dtype nor on its implementation. Biases are 0, except for the forget gate's, which are 1
(Jozefowicz et al. 2015).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

LSTM_INITS = ("glorot", "orthogonal")


@torch.no_grad()
def initialize_lstm(lstm: nn.Module, scheme: str, generator: torch.Generator) -> None:
    """Initialize the parameters of an ElmoLstm in place.

    Args:
        lstm: The fused LSTM or AllenNLP's.
        scheme: ``glorot``, as in bilm-tf, treats the input and recurrent weights as one kernel, uniform in
            +-sqrt(6 / (input size + D + 4C)), and draws the projection uniformly in +-sqrt(6 / (C + D)).
            ``orthogonal``, as in AllenNLP, makes each gate's block of the input and recurrent weights orthogonal, and
            draws the projection uniformly in +-1 / sqrt(C).
        generator: Source of the values; it is advanced.
    """
    fill = {"glorot": _glorot, "orthogonal": _orthogonal}[scheme]
    for layer in range(lstm.num_layers):  # type: ignore[arg-type]
        for direction in ("forward", "backward"):
            cell = lstm.get_submodule(f"{direction}_layer_{layer}")
            fill(cell, generator)
            cell_size = cell.cell_size
            bias: Tensor = cell.state_linearity.bias  # type: ignore[union-attr, assignment]
            bias.zero_()
            bias[cell_size : 2 * cell_size] = 1.0  # type: ignore[operator]


def _glorot(cell: nn.Module, generator: torch.Generator) -> None:
    input_weight, state_weight, projection = _weights(cell)
    limit = math.sqrt(6.0 / (input_weight.shape[1] + state_weight.shape[1] + input_weight.shape[0]))
    _uniform(input_weight, limit, generator)
    _uniform(state_weight, limit, generator)
    _uniform(projection, math.sqrt(6.0 / sum(projection.shape)), generator)


def _orthogonal(cell: nn.Module, generator: torch.Generator) -> None:
    input_weight, state_weight, projection = _weights(cell)
    for weight in (input_weight, state_weight):
        for gate in weight.chunk(4):
            drawn = torch.empty(gate.shape, device=generator.device)
            gate.copy_(nn.init.orthogonal_(drawn, generator=generator))
    _uniform(projection, 1.0 / math.sqrt(projection.shape[1]), generator)


def _weights(cell: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Return the input (4C, input size), recurrent (4C, D) and projection (D, C) weights."""
    names = ("input_linearity", "state_linearity", "state_projection")
    input_weight, state_weight, projection = (cell.get_parameter(f"{name}.weight") for name in names)
    return input_weight, state_weight, projection


def _uniform(weight: Tensor, limit: float, generator: torch.Generator) -> None:
    drawn = torch.empty(weight.shape, device=generator.device)
    weight.copy_(drawn.uniform_(-limit, limit, generator=generator))
